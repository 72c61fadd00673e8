"""What the checks of a run cost: steps with all of them beside steps with none.

    python tools/bench_checks.py [SETTING ...] [--processes N] [--steps 400] [--interval 100] [--repeats 2]

Trains under torchrun in turn with the defaults (watchdog, comparison of replicas, looks at the machines' health, spikes) and
without any, each --repeats times. A figure is the time of a step over --interval steps, by what the run's own metrics say; the
first interval, in which kernels are compiled, is left out. Comparisons happen every --interval steps, and looks at the machines
too, ten times as often as by default; saves are left out, as runs are ended before. Settings are those of training; the default
is a hybrid of four layers of the 8B model's width with a copy of all weights on each GPU, a tiny one without GPUs.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench_start import require_trained
from megatron_mamba.config import ConfigError, require
from megatron_mamba.train.metrics import read_records

WIDE = ("model=hybrid_8b", "model.pattern=M-M*", "model.vocab_size=32000", "data.seq_length=2048", "parallel.dp_shard=1")
TINY = ("model=hybrid_tiny", "data.seq_length=128", "parallel.dp_shard=1")
NONE = (
    "trainer.watchdog_seconds=null", "trainer.health_check=false", "trainer.replica_check_interval=1000000000",
    "trainer.spike.policy=off",
)  # fmt: skip
ENDLESS = (
    "data=synthetic", "trainer.train_samples=1000000000", "eval.interval=0", "checkpoint.interval=1000000000", "logging=minimal",
)  # fmt: skip


def seconds_a_step(processes: int, steps: int, interval: int, settings: list[str], folder: Path) -> list[float]:
    """Train in `folder` for so many steps, and end that: the mean time of a step of each interval but the first."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    batch = [f"trainer.global_batch_size={processes}", "trainer.micro_batch_size=1", f"parallel.dp_replicate={processes}"]
    own = [f"logging.interval={interval}", f"run.dir={folder}"]
    command = [*launch, "-m", "megatron_mamba.train", *ENDLESS, *batch, *own, *settings]
    log, laps = folder.with_suffix(".log"), list[float]()
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    while process.poll() is None and len(laps) < steps // interval:
        time.sleep(0.1)
        trained = [record for record in read_records(folder / "metrics.jsonl") if record["kind"] == "train"]
        tokens = [0, *(record["consumed_tokens"] for record in trained)]
        laps = [(b - a) / interval / r["tokens_per_second"] for (a, b), r in zip(itertools.pairwise(tokens), trained, strict=True)]
    require_trained(process.poll() is None, settings, log.read_text())
    # Torchrun would let its ranks save first.
    ranks = [int(rank) for task in Path(f"/proc/{process.pid}/task").iterdir() for rank in (task / "children").read_text().split()]
    for number in (process.pid, *ranks):
        os.kill(number, signal.SIGKILL)
    process.wait()
    return laps[1:]


def main(argv: list[str]) -> int:
    """Run, print the table; returns the process's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="SETTING")
    parser.add_argument("--processes", type=int, default=max(torch.cuda.device_count(), 2), help="ranks (default: one a GPU, or 2)")
    parser.add_argument("--steps", type=int, default=400, help="of a run (default 400)")
    parser.add_argument("--interval", type=int, default=100, help="steps of a figure (default 100)")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each kind (default 2)")
    args = parser.parse_args(argv)
    settings = args.settings or list(WIDE if torch.cuda.is_available() else TINY)
    checks = [f"trainer.replica_check_interval={args.interval}", f"trainer.health_interval={args.interval}"]
    kinds: dict[str, list[str]] = {"all checks": checks, "none": list(NONE)}
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    try:
        for name in ("processes", "interval", "repeats"):
            require(getattr(args, name) > 0, f"--{name}", getattr(args, name), "must be positive", "Use 1 or more")
        require(args.steps >= 2 * args.interval, "--steps", args.steps, "has one interval", "Use twice --interval, or more")
        with tempfile.TemporaryDirectory() as place:
            for i in range(args.repeats):
                for kind, own in kinds.items():
                    folder = Path(place) / f"{kind.split()[0]}{i}"
                    found[kind] += seconds_a_step(args.processes, args.steps, args.interval, [*settings, *own], folder)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    table = Table(title=f"{' '.join(settings)}, {args.processes} ranks")
    for column in ("", "least, ms a step", "median", "most", "over none"):
        table.add_column(column, justify="right")
    base = statistics.median(found["none"])
    for kind, laps in found.items():
        median = statistics.median(laps)
        shown = (f"{1e3 * value:.2f}" for value in (min(laps), median, max(laps)))
        table.add_row(kind, *shown, "" if kind == "none" else f"{median / base - 1:+.2%}")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
