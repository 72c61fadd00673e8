"""How many processes of one node start on a large corpus: seconds to the first step, and what each asks of the file system.

    python tools/bench_filesystem.py [SETTING ...] [--tokens 10e9 | --data PREFIX] [--processes 16]

Starts `python -m megatron_mamba.train` under torchrun, first with an empty folder in place of data.cache_dir (cold) and then
with what that left there (warm), and looks at every rank until the end of its first step. The corpus made for it has documents
of 1 to 1,999 tokens, a real .idx and a .bin without content (a sparse file), in the system's folder for temporary files.
Settings are those of training; the default is a tiny hybrid on CPUs.

Seconds are from the launch until the last rank is so far. Operations are counted in runs of their own under `strace`, which
makes them many times slower; without it only opens by Python are counted, no libraries'. What is read through memory maps is no
operation; "mapped" is how much of the index's files lay in a rank's memory maps after the first step.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bench_start import require_trained
from megatron_mamba.config import ConfigError, require
from megatron_mamba.data.indexed import IndexedWriter

DEFAULT = ("model=hybrid_tiny", "data.seq_length=256", "trainer.device=cpu")
MARKS = ("corpus open", "model built", "index ready", "first step")
PLACES = ("tokens", "index", "run folder", "the rest")
"""PREFIX.bin; PREFIX.idx, PREFIX.json and data.cache_dir; run.dir; Python, libraries and the system."""
RANKS = 512
_STRACE = ("strace", "-f", "-y", "-qq", "-s0", "--seccomp-bpf", "-e", "trace=%file,read,pread64,write,pwrite64")
_CALL = re.compile(r'(\w+)\((?:[^"<]*<(?P<fd>/[^>]*)>)?(?:[^"]*"(?P<name>[^"]*)")?.* = (?P<result>-?\d+)')
_END = "/first-step"
"""A name that is looked up after the first step: there the trace ends."""


def make_corpus(prefix: Path, tokens: int) -> None:
    """Documents of 1 to 1,999 tokens, `tokens` in all, that take no room but for their index."""
    lengths = np.random.default_rng(0).integers(1, 2000, tokens // 900 + 100, np.int32)
    lengths = lengths[: np.searchsorted(np.cumsum(lengths, dtype=np.int64), tokens)]
    total = int(lengths.sum(dtype=np.int64))
    with IndexedWriter(prefix, np.uint16) as writer:
        writer._bin.truncate(2 * total)
        writer._extend(lengths, np.arange(1, len(lengths) + 1), total)


def place_of(name: str, folder: Path, prefix: Path) -> str:
    """Which of PLACES a file belongs to."""
    if name == f"{prefix}.bin":
        return "tokens"
    if name.startswith((f"{prefix}.", f"{folder}/cache")):
        return "index"
    return "run folder" if name.startswith(f"{folder}/") else "the rest"


def train_as_rank(folder: Path, prefix: Path, settings: list[str]) -> None:
    """Train, and write down when this rank was how far and what it had opened by then."""
    found: dict[str, Any] = {"built": 0}
    opens: Counter[str] = Counter()

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str) and "first step" not in found:
            opens[f"{place_of(os.path.abspath(arguments[0]), folder, prefix)}: opens"] += 1

    sys.addaudithook(note)
    from megatron_mamba.data.packing import PackedDataset
    from megatron_mamba.train import loop

    def marked(owner: Any, name: str, after: Callable[[], None]) -> None:
        function = getattr(owner, name)

        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            result = function(*arguments, **named)
            after()
            return result

        setattr(owner, name, call)

    def built() -> None:
        found["built"] += 1

    def reached(mark: str) -> None:
        if mark not in found:
            found[mark] = time.time()
        if mark == MARKS[-1] and "opens" not in found:
            Path(_END).exists()
            maps = re.findall(r"^\w+-\w+ .* (/.*)\n(?:.*\n)*?Rss: +(\d+) kB", Path("/proc/self/smaps").read_text(), re.MULTILINE)
            found["mapped"] = sum(int(size) for name, size in maps if place_of(name, folder, prefix) == "index") << 10
            found["opens"] = opens
            (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))

    marked(PackedDataset, "_build_index", built)
    owners = ((loop, "build_datasets"), (loop.Trainer, "__init__"), (PackedDataset, "_load_index"), (loop.Trainer, "_train_step"))
    for mark, (owner, name) in zip(MARKS, owners, strict=True):
        marked(owner, name, functools.partial(reached, mark))
    sys.argv = ["megatron_mamba.train", *settings]
    runpy.run_module("megatron_mamba.train", run_name="__main__", alter_sys=True)


def operations(trace: Path, folder: Path, prefix: Path) -> Counter[str]:
    """What one rank asked of the file system before its first step ended, by place, from strace's record of it."""
    counts: Counter[str] = Counter()
    pending: dict[str, str] = {}
    with trace.open(errors="replace") as lines:
        for line in lines:
            process, _, text = line.partition(" ")
            text = text.strip()
            if text.endswith("<unfinished ...>"):
                pending[process] = text.removesuffix("<unfinished ...>")
                continue
            if text.startswith("<... "):
                text = pending.pop(process, "") + text.partition("resumed>")[2]
            if not (call := _CALL.match(text)):
                continue
            kind, name, moved = call[1], call["name"] or call["fd"] or "", max(int(call["result"]), 0)
            if name == _END:
                break
            transfer = kind.removeprefix("p").removesuffix("64")
            if transfer in ("read", "write"):
                place = place_of(call["fd"] or "", folder, prefix)
                if call["fd"]:
                    counts[f"{place}: {transfer}s"] += 1
                    counts[f"{place}: bytes {'read' if transfer == 'read' else 'written'}"] += moved
            else:
                path = os.path.abspath(os.path.join(call["fd"] or "/", call["name"] or ""))
                what = "opens" if kind in ("open", "openat", "creat") else "stats and other look-ups"
                counts[f"{place_of(path, folder, prefix)}: {what}"] += 1
    return counts


def start(processes: int, folder: Path, prefix: Path, settings: list[str], traced: bool) -> list[dict[str, Any]]:
    """One start of training on `processes` ranks: what each wrote down, with its operations if `traced`."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    for file in [Path(f"{prefix}.idx"), *(folder / "cache").glob("*")]:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # Read from the disk, as on a node that never did.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "--no-python"]
    launch += ["--log-dir", f"{folder}/logs"]
    strace = [*_STRACE, "-o", f"{folder}/trace${{local_rank}}"] if traced else []
    rank = [sys.executable, __file__, f"--as-rank={folder}", f"--data={prefix}"]
    one_step = [
        f"data.path={prefix}", f"data.cache_dir={folder}/cache", f"run.dir={folder}/run", "trainer.micro_batch_size=1",
        f"trainer.train_samples={processes}", f"trainer.global_batch_size={processes}", "eval.samples=0", "logging=minimal",
    ]  # fmt: skip
    begin = time.time()
    done = subprocess.run([*launch, *strace, *rank, *one_step, *settings], capture_output=True, text=True)
    files = [folder / f"rank{i}.json" for i in range(processes)]
    require_trained(done.returncode == 0 and all(map(Path.exists, files)), settings, done.stdout + done.stderr)
    ranks = []
    for i, file in enumerate(files):
        found = json.loads(file.read_text())
        counts = operations(folder / f"trace{i}", folder, prefix) if traced else Counter(found["opens"])
        counts["index: mapped, bytes"] = found["mapped"]
        ranks.append({"built": found["built"], "counts": counts} | {mark: found[mark] - begin for mark in MARKS})
        file.unlink()
    return ranks


def report(console: Console, runs: dict[str, list[dict[str, Any]]], counted: dict[str, list[dict[str, Any]]]) -> None:
    """Print times and operations."""
    table = Table(title="Seconds from launch until the last rank is so far")
    for column in ("cache of the index", *MARKS, "ranks that built the index"):
        table.add_column(column, justify="right")
    for kind, ranks in runs.items():
        seconds = (f"{max(rank[mark] for rank in ranks):.1f}" for mark in MARKS)
        table.add_row(kind, *seconds, str(sum(rank["built"] > 0 for rank in ranks)))
    console.print(table)
    for kind, ranks in counted.items():
        table = Table(title=f"Until the end of the first step, {kind}: operations of a rank")
        for column in ("", "least", "median", "most", "rank 0", f"{RANKS} ranks, computed"):
            table.add_column(column, justify="left" if not column else "right")
        for name in sorted({name for rank in ranks for name in rank["counts"]}, key=lambda n: (PLACES.index(n.split(":")[0]), n)):
            values = [rank["counts"][name] for rank in ranks]
            median = int(statistics.median_low(values))
            computed = RANKS * median + sum(value - median for value in values)
            table.add_row(name, *(f"{value:,}" for value in (min(values), median, max(values), values[0], computed)))
        console.print(table)
    console.print(
        f"computed: {RANKS} times the median, and once what the {len(next(iter(counted.values())))} ranks did beyond theirs; "
        "a node's ranks share its page cache, so that what is mapped is read once a node"
    )


def main(argv: list[str]) -> int:
    """Run, print the tables; returns the process's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="SETTING", help=f"default {' '.join(DEFAULT)}")
    parser.add_argument("--tokens", type=float, default=10e9, help="of the corpus that is made (default 10e9)")
    parser.add_argument("--data", type=Path, metavar="PREFIX", help="take this corpus (PREFIX.bin, PREFIX.idx) instead")
    parser.add_argument("--processes", type=int, default=16, help="ranks (default 16)")
    parser.add_argument("--as-rank", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.as_rank:
        train_as_rank(args.as_rank, args.data, args.settings)
        return 0
    console, settings = Console(), args.settings or list(DEFAULT)
    runs: dict[bool, dict[str, list[dict[str, Any]]]] = {False: {}, True: {}}
    try:
        require(args.processes > 0, "--processes", args.processes, "must be positive", "Use 1 or more")
        require(args.tokens >= 10_000, "--tokens", args.tokens, "is too few for a corpus", "Use 10,000 or more")
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place).resolve()
            prefix = args.data.absolute() if args.data else folder.with_name(f"{folder.name}-corpus") / "corpus"
            try:
                if not args.data:
                    make_corpus(prefix, int(args.tokens))
                for traced in (False, True) if shutil.which("strace") else (False,):
                    shutil.rmtree(folder / "cache", ignore_errors=True)
                    for kind in ("cold", "warm"):
                        runs[traced][kind] = start(args.processes, folder, prefix, settings, traced)
            finally:
                if not args.data:
                    shutil.rmtree(prefix.parent, ignore_errors=True)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report(console, runs[False], runs[True] or runs[False])
    if not runs[True]:
        console.print("strace was not found: opens by Python only, no libraries', and neither look-ups nor reads and writes")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
