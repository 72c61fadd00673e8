"""Time from the start of a training process to the end of its first step, with nothing compiled before and with all of it.

    python tools/bench_start.py [SETTING ...] [--repeats N]

Runs `python -m megatron_mamba.train`, one step, first with an empty folder in place of Triton's cache and then again with what
that left there. Settings are those of training; the default is a tiny hybrid on random tokens. Seconds are wall time since the
process was started, medians of N (default 3).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_mamba.config import ConfigError, require
from megatron_mamba.train.metrics import read_records

DEFAULT = ("model=hybrid_tiny", "data.seq_length=2048")
ONE_STEP = (
    "data=synthetic", "trainer.train_samples=4", "trainer.global_batch_size=4", "trainer.micro_batch_size=4",
    "logging=minimal", "logging.interval=1",
)  # fmt: skip
EVENTS = ("start", "train")
"""Kinds of records: when the model is built, and after the first step."""


def seconds_until(events: tuple[str, ...], settings: list[str], folder: Path, cache: Path) -> list[float]:
    """Start a run in `folder` and take the time until it has written the first record of each kind."""
    command = [sys.executable, "-m", "megatron_mamba.train", *ONE_STEP, *settings, f"run.dir={folder}"]
    begin = time.perf_counter()
    taken: list[float] = []
    log = folder.with_suffix(".log")
    with log.open("w") as output:
        environment = os.environ | {"TRITON_CACHE_DIR": str(cache)}
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    while len(taken) < len(events) and process.poll() is None:
        time.sleep(0.005)
        kinds = {record.get("event", record["kind"]) for record in read_records(folder / "metrics.jsonl")}
        while len(taken) < len(events) and events[len(taken)] in kinds:
            taken.append(time.perf_counter() - begin)
    require_trained(process.wait() == 0 and len(taken) == len(events), settings, log.read_text())
    return taken


def require_trained(trained: bool, settings: list[str], output: str) -> None:
    """Refuse settings that training did not take, with the end of what it said."""
    what = f"does not train:\n{output[-4000:].strip()}\n"
    require(trained, "SETTING", " ".join(settings), what, "Give settings that megatron_mamba.train takes")


def main(argv: list[str]) -> int:
    """Run, print the table; returns the process's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="SETTING", help=f"default {' '.join(DEFAULT)}")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind (default 3)")
    args = parser.parse_args(argv)
    settings = args.settings or list(DEFAULT)
    times: dict[str, list[list[float]]] = {"empty": [], "filled": []}
    try:
        require(args.repeats > 0, "--repeats", args.repeats, "must be positive", "Use 1 or more")
        with tempfile.TemporaryDirectory() as place:
            for i in range(args.repeats):
                for kind, of_kind in times.items():
                    of_kind.append(seconds_until(EVENTS, settings, Path(place) / f"run{i}{kind}", Path(place) / f"cache{i}"))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    table = Table(title=" ".join(settings))
    for name in ("Triton's cache", "model built, s", "first step done, s"):
        table.add_column(name, justify="right")
    for kind, of_kind in times.items():
        table.add_row(kind, *(f"{statistics.median(column):.2f}" for column in zip(*of_kind, strict=True)))
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
