"""What the checks of a run cost: steps with all of them beside steps with none, and each by itself.

    python tools/bench_checks.py [SETTING ...] [--processes N] [--steps 250] [--interval 50] [--repeats 2]
    torchrun --nproc-per-node N tools/bench_checks.py [SETTING ...] [--steps 250]

The first trains under torchrun in turn with the defaults (watchdog, comparison of replicas, looks at the machines' health, spikes)
and without any, each --repeats times. A figure is the time of a step over --interval steps, by what the run's own metrics say; the
first interval, in which kernels are compiled, is left out. Comparisons happen every --interval steps, and looks at the machines
too, both more often than by default; saves are left out, as runs are ended before.

The second times each check in a run that has all, waiting for the GPU and the other ranks before and after it, and adds up what a
step has of each by default.

Settings are those of training; the default is a hybrid of four layers of the 8B model's width with a copy of all weights on each
GPU and four sequences of 4096 tokens a step, a tiny one without GPUs.
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
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench_start import require_trained
from megatron_mamba.config import ConfigError, TrainerConfig, require
from megatron_mamba.parallel.context import ParallelContext
from megatron_mamba.parallel.watchdog import Watchdog
from megatron_mamba.train import loop
from megatron_mamba.train.__main__ import compose
from megatron_mamba.train.metrics import read_records
from megatron_mamba.train.resilience import Trouble

WIDE = ("model=hybrid_8b", "model.pattern=M-M*", "model.vocab_size=32000", "data.seq_length=4096", "parallel.dp_shard=1")
TINY = ("model=hybrid_tiny", "model.pattern=M-M*", "data.seq_length=32", "parallel.dp_shard=1")
MICRO_BATCHES = 4
NONE = (
    "trainer.watchdog_seconds=null", "trainer.health_check=false", "trainer.replica_check_interval=1000000000",
    "trainer.spike.policy=off",
)  # fmt: skip
ENDLESS = (
    "data=synthetic", "trainer.train_samples=1000000000", "eval.samples=0", "checkpoint.interval=1000000000", "logging=minimal",
)  # fmt: skip


def _batch(processes: int) -> list[str]:
    size = f"trainer.global_batch_size={MICRO_BATCHES * processes}"
    return [size, "trainer.micro_batch_size=1", f"parallel.dp_replicate={processes}"]


def seconds_a_step(processes: int, steps: int, interval: int, settings: list[str], folder: Path) -> list[float]:
    """Train in `folder` for so many steps, and end that: the mean time of a step of each interval but the first."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    own = [f"logging.interval={interval}", f"run.dir={folder}"]
    command = [*launch, "-m", "megatron_mamba.train", *ENDLESS, *_batch(processes), *own, *settings]
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


def each_check(settings: list[str], steps: int) -> None:
    """Train with all checks as a rank of torchrun, and have the first rank print what each took."""
    processes, default, seconds = int(os.environ["WORLD_SIZE"]), TrainerConfig(), defaultdict[str, list[float]](list)
    often = ["trainer.replica_check_interval=10", "trainer.health_interval=10"]
    config = compose([*ENDLESS, *_batch(processes), "run.dir=none", *settings, *often])
    trainer = replace(config.trainer, train_samples=steps * config.trainer.global_batch_size)
    context, inside = ParallelContext.create(config.parallel, trainer.device), set[str]()

    def wait() -> None:
        if context.device.type == "cuda":
            torch.cuda.synchronize()

    def time_calls(owner: type, method: str, what: str) -> None:
        """Of a method, but where another of these calls it, from when all ranks are there until the GPU is done."""
        original = getattr(owner, method)

        def timed(*arguments: Any) -> Any:
            if inside:
                return original(*arguments)
            inside.add(what)
            wait()
            context.barrier()
            wait()
            begin, result = time.perf_counter(), original(*arguments)
            wait()
            seconds[what].append(time.perf_counter() - begin)
            inside.clear()
            return result

        setattr(owner, method, timed)

    watch = Watchdog._look

    def look(watchdog: Watchdog) -> None:
        """As the watchdog's, whose thread runs beside training: the processor's time."""
        begin = time.thread_time()
        watch(watchdog)
        seconds["watchdog, a second"].append(time.thread_time() - begin)

    # Calls a step by default, and of what.
    checks: dict[str, tuple[float, type, tuple[str, ...]]] = {
        "agreement on a step": (1.0, ParallelContext, ("largest",)),
        "is it a spike": (2.0, Trouble, ("of", "skips")),
        "comparison of replicas": (1 / default.replica_check_interval, loop.Trainer, ("_check_replicas",)),
        "look at the machines": (1 / default.health_interval, loop.Trainer, ("_look",)),
    }
    for what, (_, owner, methods) in checks.items():
        for method in methods:
            time_calls(owner, method, what)
    setattr(Watchdog, "_look", look)  # noqa: B010 - the type checker minds an assignment
    with tempfile.TemporaryDirectory() as own:
        folder = context.gather(own)[0]  # One for all ranks.
        loop.train(replace(config, trainer=trainer, run=replace(config.run, dir=folder)))
    if int(os.environ["RANK"]) == 0:
        table, total = Table(title=f"{' '.join(settings)}, {processes} ranks, {steps} steps"), 0.0
        for column in ("", "calls", "least, ms", "median", "most", "a step by default"):
            table.add_column(column, justify="right")
        for what, laps in seconds.items():
            milliseconds = [1e3 * value for value in (min(laps), statistics.median(laps), max(laps))]
            part = checks[what][0] * milliseconds[1] if what in checks else 0.0
            total += part
            table.add_row(what, str(len(laps)), *(f"{value:.3f}" for value in milliseconds), f"{part:.4f}" if part else "")
        table.add_row("together", "", "", "", "", f"{total:.4f}")
        Console().print(table)


def main(argv: list[str]) -> int:
    """Run, print the table; returns the process's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="SETTING")
    parser.add_argument("--processes", type=int, default=max(torch.cuda.device_count(), 2), help="ranks (default: one a GPU, or 2)")
    parser.add_argument("--steps", type=int, default=250, help="of a run (default 250)")
    parser.add_argument("--interval", type=int, default=50, help="steps of a figure (default 50)")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each kind (default 2)")
    args = parser.parse_args(argv)
    settings = args.settings or list(WIDE if torch.cuda.is_available() else TINY)
    checks = [f"trainer.replica_check_interval={args.interval}", f"trainer.health_interval={args.interval}"]
    kinds = {"all checks": checks, "none": list(NONE)}
    found = {kind: list[float]() for kind in kinds}
    try:
        for name in ("processes", "steps", "interval", "repeats"):
            require(getattr(args, name) > 0, f"--{name}", getattr(args, name), "must be positive", "Use 1 or more")
        if "RANK" in os.environ:
            each_check(settings, args.steps)
            return 0
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
