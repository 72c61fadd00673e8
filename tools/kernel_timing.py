"""What tools/bench_kernels.py measures with: clocks, launches compiled beforehand, and the search for launch configurations."""

from __future__ import annotations

import importlib
import itertools
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mamba_kernels import backend
from mamba_kernels.backend import Meta, Tunable

Call = Callable[[], Any]

LONG = 0.5
"""Seconds of one call from which on it is timed once: what the host adds is then below a hundredth of a per cent."""

GAIN = 1.02
"""How many times as fast as the default a configuration must be to be shipped: less is within the spread of two readings."""

AGREEMENT = 0.02
"""Largest difference of two configurations' results, over the largest value: a few roundings to bfloat16."""


def first_line(error: BaseException) -> str:
    """What an exception says, shortly."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"[:200]


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of what an op returns."""
    return [t for t in (value if isinstance(value, list | tuple) else (value,)) if isinstance(t, Tensor)]


def size_of(*tensors: Tensor | None) -> int:
    """Bytes of the elements of tensors (of a view, its own)."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


# ----------------------------------------------------------------------------------------------------------------- time


@dataclass
class Cell:
    """Times of one implementation, in milliseconds; None and the reason in `note` where there is none."""

    graph_ms: float | None = None
    eager_ms: float | None = None
    peak_gib: float | None = None
    note: str = ""


@dataclass
class Clock:
    """Medians on one device: of replays of a CUDA graph, and of wall times of loops with one wait at the end."""

    device: torch.device
    repeats: int = 100
    seconds: float = 0.5
    """About how long a cell's graph, and its loops, are repeated: at least three times, at most `repeats` times."""

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def wall(self, calls: Sequence[Call]) -> float:
        """Seconds from the first call until the device has finished the last."""
        self.wait()
        start = time.perf_counter()
        for call in calls:
            call()
        self.wait()
        return time.perf_counter() - start

    def times(self, seconds: float) -> int:
        """How often to repeat what takes so many seconds."""
        return min(max(int(self.seconds / max(seconds, 1e-9)), 3), max(self.repeats, 1))

    def cell(self, calls: Sequence[Call], *, graph: bool = True) -> Cell:
        """Time one call; `calls` are the same on different data, taken in turn. The first runs before anything is timed."""
        self.wall(calls[:1])
        once = self.wall(calls[:1])
        if once > LONG:
            return Cell(eager_ms=once * 1e3)
        loop = [calls[i % len(calls)] for i in range(max(self.times(once) // 3, 1))]
        eager = statistics.median(self.wall(loop) / len(loop) for _ in range(3)) * 1e3
        cell = Cell(eager_ms=eager)
        if graph and self.device.type == "cuda":
            try:
                cell.graph_ms = self.graph_ms(calls)
            except Exception as error:  # Work that waits for the device cannot be captured; the eager time stands.
                cell.note = f"no graph: {first_line(error)}"
        return cell

    def graph_ms(self, calls: Sequence[Call]) -> float:
        """Milliseconds of a call inside a replayed CUDA graph of all `calls`, each with outputs of its own."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            calls[0]()  # Libraries make what a stream needs at its first use, which a capture cannot.
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            kept = [call() for call in calls]
        graph.replay()
        replays = self.times(self.wall([graph.replay]))
        events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
        events[0].record()
        for event in events[1:]:
            graph.replay()
            event.record()
        self.wait()
        taken = [before.elapsed_time(after) for before, after in itertools.pairwise(events)]
        del kept
        graph.reset()
        return statistics.median(taken) / len(calls)

    def peak_gib(self, call: Call) -> float | None:
        """GiB that a call takes at most beyond what was there before and what it returns; None on a CPU."""
        if self.device.type != "cuda":
            return None
        call()
        self.wait()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        returned = call()
        self.wait()
        peak = torch.cuda.max_memory_allocated(self.device) - before - size_of(*tensors_in(returned))
        return peak / 2**30


def measured_rates(clock: Clock) -> dict[str, float]:
    """Of this device in this run: bytes/s of a large copy (read + written), and FLOP/s of an 8192^3 bf16 matrix product."""
    large = clock.device.type == "cuda"
    source = torch.randn(2**29 if large else 2**20, device=clock.device)
    target, size = torch.empty_like(source), 8192 if large else 256
    a, b = (torch.randn(size, size, device=clock.device, dtype=torch.bfloat16) for _ in range(2))
    product = clock.cell([lambda: a @ b])
    # A copy inside a graph may go to the engines for transfers between devices, which are slower than a kernel that copies.
    copies = [clock.cell([lambda: target.copy_(source)]), clock.cell([lambda: torch.neg(source, out=target)])]
    copied = min(ms for cell in copies for ms in (cell.graph_ms, cell.eager_ms) if ms)
    multiplied = product.graph_ms or product.eager_ms or 0.0
    return {"copy bytes/s": 2e3 * size_of(source) / copied, "matmul FLOP/s": 2e3 * size**3 / multiplied}


# ------------------------------------------------------------------------------------------------------------- launches


MARK = "launched for"
"""Name of an entry that is put into a configuration to know the launches that take it, and that no kernel sees."""


@dataclass
class Launch:
    """A launch of a Triton kernel, with the arguments it had."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    meta: Meta

    def __call__(self) -> None:
        self.kernel[self.grid](*self.arguments, **self.meta)


@contextmanager
def recorded(*, run: bool) -> Iterator[tuple[list[Launch], list[Launch]]]:
    """Collect the launches of what runs inside, all and the marked ones; with `run` they also run."""
    launches: list[Launch] = []
    marked: list[Launch] = []

    def record(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], meta: Meta) -> None:
        launches.append(Launch(kernel, grid, arguments, {name: value for name, value in meta.items() if name != MARK}))
        if MARK in meta:
            marked.append(launches[-1])
        if run:
            launches[-1]()

    before, backend.recorder = backend.recorder, record
    try:
        yield launches, marked
    finally:
        backend.recorder = before


@contextmanager
def configured(tunable: Tunable, key: tuple[Any, ...], meta: Meta, *, mark: bool = True) -> Iterator[None]:
    """Let a tunable have one configuration for one key."""
    before = tunable.used.get(key)
    tunable.used[key] = {**meta, MARK: 1} if mark else meta
    try:
        yield
    finally:
        if before is None:
            del tunable.used[key]
        else:
            tunable.used[key] = before


@dataclass(frozen=True)
class Compilation:
    """What Triton compiles for a launch: numbers stand for all that it compiles the same for."""

    module: str
    kernel: str
    arguments: tuple[Any, ...]
    meta: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, launch: Launch) -> Compilation | None:
        """None where an address is no multiple of 16: what stands for a tensor in another process cannot say so."""
        if any(isinstance(a, Tensor) and a.data_ptr() % 16 for a in launch.arguments):
            return None
        function = launch.kernel.fn
        arguments = tuple(_compiled_for(a) for a in launch.arguments)
        return cls(function.__module__, function.__name__, arguments, tuple(launch.meta.items()))

    def compile(self) -> str:
        """Compile into Triton's cache; "" or why it does not."""
        arguments = [torch.empty(0, dtype=a, device="meta") if isinstance(a, torch.dtype) else a for a in self.arguments]
        try:
            kernel = getattr(importlib.import_module(self.module), self.kernel)
            kernel.warmup(*arguments, grid=(1,), **dict(self.meta))
        except Exception as error:  # A candidate need not compile.
            return first_line(error)
        return ""


def _compiled_for(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.dtype
    if isinstance(argument, int) and not isinstance(argument, bool) and argument != 1:
        return (16 if argument % 16 == 0 else 7) + (2**32 if abs(argument) >= 2**31 else 0)
    return argument


def compile_all(compilations: Iterable[Compilation | None], processes: int) -> dict[Compilation, str]:
    """Compile in so many processes that share Triton's cache with this one; what does not compile, and why."""
    wanted = list(dict.fromkeys(c for c in compilations if c is not None))
    if processes < 2 or len(wanted) < 2:
        outcomes = [compilation.compile() for compilation in wanted]
    else:
        with ProcessPoolExecutor(min(processes, len(wanted)), multiprocessing.get_context("spawn")) as pool:
            outcomes = list(pool.map(Compilation.compile, wanted))
    return {compilation: why for compilation, why in zip(wanted, outcomes, strict=True) if why}


# --------------------------------------------------------------------------------------------------------------- tuning


@dataclass
class Tuning:
    """Configurations of one tunable for one key: milliseconds of each, why some have none, and the one taken."""

    tunable: Tunable
    key: tuple[Any, ...]
    of: str
    times: list[tuple[Meta, float]] = field(default_factory=list)
    skipped: list[tuple[Meta, str]] = field(default_factory=list)
    best: Meta | None = None
    """None where no candidate is faster than the default by more than :data:`GAIN`."""


def used_tunables(run: Call) -> list[tuple[Tunable, tuple[Any, ...]]]:
    """Tunables and keys of what `run` launches; nothing is launched."""
    for tunable in Tunable.ALL.values():
        tunable.used.clear()
    with recorded(run=False):
        run()
    return [(tunable, key) for tunable in Tunable.ALL.values() for key in tunable.used]


def tune(
    cases: Mapping[str, Call], clock_ms: Callable[[Sequence[Call]], float], workers: int, say: Callable[[str], None] = print
) -> list[Tuning]:
    """Time every candidate of every tunable that `cases` use, by name; each tunable and key in the first case that has it.

    A case runs an op on data of its own, the same each time, and returns its results. Of a candidate only the launches are
    timed that take it, all in one graph, with the arguments they have when the whole op runs with it (grids and scratch
    memory may depend on it). Where no launch takes it as it is, because it shapes several kernels, the whole op is timed.
    A candidate that does not compile, does not fit or changes the results is skipped.
    """
    searches: dict[tuple[str, tuple[Any, ...]], tuple[Tuning, Call]] = {}
    for name, run in cases.items():
        for tunable, key in used_tunables(run):
            searches.setdefault((tunable.name, key), (Tuning(tunable, key, name), run))
    if workers > 1:
        wanted: list[Compilation | None] = []
        for search, run in searches.values():
            for meta in search.tunable.candidates(*search.key):
                with configured(search.tunable, search.key, meta), recorded(run=False) as (launches, marked):
                    run()
                wanted += map(Compilation.of, marked or launches)
                launches.clear()  # As in `_search`.
        failed = compile_all(wanted, workers)
        say(f"{len(searches)} searches, {len(wanted)} launches compiled in {workers} processes, {len(failed)} do not compile")
    for search, run in searches.values():
        _search(search, run, clock_ms)
        say(_shown(search))
        if search.best is not None:
            search.tunable.used[search.key] = search.best
    return [search for search, _ in searches.values()]


def _search(search: Tuning, run: Call, clock_ms: Callable[[Sequence[Call]], float]) -> None:
    candidates = search.tunable.candidates(*search.key)
    for meta in candidates:
        try:
            with configured(search.tunable, search.key, meta), recorded(run=True) as (launches, marked):
                results = tensors_in(run())
            launches.clear()  # They hold outputs, and so what autograd has of this stream, which a capture must not touch.
            if meta == candidates[0]:
                expected = results
            elif (difference := largest_difference(results, expected)) > AGREEMENT:
                raise ArithmeticError(f"results differ from the default's by {difference:.2g} of the largest value")
            with configured(search.tunable, search.key, meta, mark=False):
                taken = clock_ms([partial(_launch_all, marked)] if marked else [run])
        except Exception as error:  # Too much shared memory, too many registers: another candidate may do.
            if meta == candidates[0]:
                raise
            search.skipped.append((meta, first_line(error)))
        else:
            search.times.append((meta, taken))
    best, fastest = min(search.times, key=lambda timed: timed[1])
    if fastest * GAIN < search.times[0][1]:
        search.best = best


def _launch_all(launches: Sequence[Launch]) -> None:
    for launch in launches:
        launch()


def largest_difference(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Of corresponding tensors, over the largest value wanted of each; infinite where not finite."""
    worst = 0.0
    for a, b in zip(got, wanted, strict=True):
        if b.numel():
            difference, scale = (a.double() - b.double()).abs().max().item(), b.double().abs().max().item()
            relative = difference / scale if scale > 0.0 else difference
            if not relative < float("inf"):  # NaN is not.
                return float("inf")
            worst = max(worst, relative)
    return worst


def _shown(search: Tuning) -> str:
    times = ", ".join(f"{ms:.4f}" for _, ms in search.times)
    chosen = "default kept" if search.best is None else f"best {search.best}"
    skipped = "".join(f"; skipped {meta}: {why}" for meta, why in search.skipped)
    return f"{search.tunable.name} [{backend.key_name(search.key)}] in {search.of}: {times} ms; {chosen}{skipped}"


def write_tuned(path: Path, architecture: str, searches: Sequence[Tuning]) -> int:
    """Put what is faster than the default into a table as tuned.json is; how many entries. Where the default is the best, its
    key is removed; all others stay."""
    tables: dict[str, dict[str, dict[str, Meta]]] = json.loads(path.read_text()) if path.exists() else {}
    table, written = tables.setdefault(architecture, {}), 0
    for search in searches:
        entries = table.setdefault(search.tunable.name, {})
        entries.pop(backend.key_name(search.key), None)
        if search.best is not None:
            entries[backend.key_name(search.key)] = search.best
            written += 1
    kept = {name: dict(sorted(entries.items())) for name, entries in sorted(table.items()) if entries}
    tables = {name: entries for name, entries in sorted({**tables, architecture: kept}.items()) if entries}
    path.write_text(json.dumps(tables, indent=1) + "\n")
    return written
