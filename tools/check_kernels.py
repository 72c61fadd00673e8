"""Check every fused kernel on this GPU, with the Triton that is here: outputs and gradients against float64, over a grid of shapes.

    python tools/check_kernels.py                          # the whole grid: six minutes on 16 cores, most of them to compile
    python tools/check_kernels.py ssd --every 8            # an eighth of the cases of one operator
    python tools/check_kernels.py --output checks.json     # every case with its errors

Exits with status 1 where a case fails. Run it before a change of a kernel lands, and with every new Triton or GPU: a compiler may
turn a right kernel into a wrong one for some shapes, without a warning (docs/kernels.md).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import cycle, product
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from mamba_kernels.checking import OPERATORS, Case, Result, check

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HALF = DTYPES[:2]
STUCK_SECONDS = 180.0
"""Without a result, after which a process is taken to hang in a kernel."""


# ------------------------------------------------------------------------------------------------------------------ grid


def grid() -> list[Case]:
    """Every case, those that share compiled kernels next to each other."""
    parts = (scans, mixers, selective_scans, convolutions, norms, activations, others)
    return list(dict.fromkeys(case for cases in parts for case in cases()))


BORDERS = (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 192, 255, 256, 257, 384, 1000)
"""Lengths round the borders of blocks, half chunks and chunks, of 32 to 256 tokens."""


def scans() -> Iterator[Case]:
    """SSD: over states and head dims; lengths; heads and groups; what is optional and how tensors lie; long sequences."""
    heads, lengths = cycle([(8, 1), (8, 2), (4, 4), (24, 1), (6, 3)]), cycle([512, 200, 129, 300])
    flags = cycle([(False, False, ""), (True, True, "packed"), (False, True, ""), (True, False, "packed")])
    sizes = list(product((8, 16, 24, 32, 48, 64, 80, 96, 128, 160, 256), (16, 32, 48, 64, 80, 96, 128)))
    for dtype, (N, P) in [*product(HALF, sizes), *product(DTYPES[2:], sizes[::10])]:
        (H, G), S, (documents, state, layout) = next(heads), next(lengths), next(flags)
        yield Case.of("ssd", dtype, S=S, H=H, P=P, G=G, N=N, documents=documents, state=state, layout=layout)
    for dtype, (P, N) in product(HALF, ((64, 16), (64, 128), (48, 24))):
        for S in BORDERS:
            yield Case.of("ssd", dtype, S=S, H=8, P=P, G=1, N=N)
    for S in BORDERS[::3]:
        yield Case.of("ssd", torch.float32, S=S, H=8, P=64, G=1, N=16)
    for (H, G), N in product(((1, 1), (2, 1), (3, 3), (8, 4), (8, 8), (16, 1), (32, 2), (64, 1), (128, 8)), (16, 128)):
        yield Case.of("ssd", torch.bfloat16, S=300 if H % 3 else 256, H=H, P=64, G=G, N=N, B=1 if H == 8 else 2)
    for dtype, N in ((torch.bfloat16, 16), (torch.float16, 128), (torch.float32, 16)):
        for documents, state, options, layout in product((False, True), (False, True), (False, True), ("", "packed")):
            given: dict[str, Any] = {"documents": documents, "state": state, "options": options, "layout": layout}
            yield Case.of("ssd", dtype, S=300, H=8, P=64, G=2, N=N, **given)
    for dtype, (S, H), N in product(HALF, ((4096, 24), (16384, 4)), (16, 128)):
        yield Case.of("ssd", dtype, B=1, S=S, H=H, P=64, G=1, N=N)


def mixers() -> Iterator[Case]:
    """The Mamba-2 mixer on its packed projection."""
    flags = cycle([(False, False, ""), (True, True, "packed"), (False, True, "packed"), (True, False, "")])
    heads = cycle([(8, 1), (8, 2), (8, 8), (24, 1)])
    sizes = ((64, 16), (64, 128), (64, 64), (32, 32), (128, 64), (48, 24))
    for dtype, (P, N) in [*product(HALF, sizes), *product(DTYPES[2:], sizes[::3])]:
        H, G = next(heads)
        for S in (1, 3, 64, 129, 256, 300):
            documents, state, layout = next(flags)
            yield Case.of("mamba2_mixer", dtype, S=S, H=H, P=P, G=G, N=N, documents=documents, state=state, layout=layout)


def selective_scans() -> Iterator[Case]:
    """The Mamba scan: over states and channels; lengths."""
    flags = cycle([(False, False, True, ""), (True, True, True, "packed"), (False, True, False, ""), (True, False, True, "")])
    lengths = cycle([257, 64, 100, 300])
    for dtype, N, E in product(DTYPES, (8, 16, 24, 32, 64, 128, 256), (24, 100, 512)):
        documents, state, options, layout = next(flags)
        yield Case.of(
            "selective_scan", dtype, S=next(lengths), E=E, N=N, documents=documents, state=state, options=options, layout=layout
        )
    for dtype, N, S in product(DTYPES, (16, 128), BORDERS[::4]):
        yield Case.of("selective_scan", dtype, S=S, E=64, N=N, documents=S % 2 == 0)


def convolutions() -> Iterator[Case]:
    """The causal convolution: over widths, channels and lengths, with all that is optional in turn."""
    flags = cycle(product((False, True), (False, True), (True, False), ("", "packed")))
    for dtype, W, C, S in product(DTYPES, (2, 3, 4), (8, 100, 1024), (1, 2, 3, 17, 64, 257, 1000)):
        documents, state, options, layout = next(flags)
        yield Case.of("causal_conv1d", dtype, S=S, C=C, W=W, documents=documents, state=state, options=options, layout=layout)


ROWS = (1, 3, 7, 31, 33, 100, 1000)


def norms() -> Iterator[Case]:
    """With eps = 0 too, where rows that are not there must not be in the sums over rows."""
    flags = cycle([("", 1e-5, ""), ("same", 1e-5, "packed"), ("float32", 0.0, ""), ("", 0.0, "packed"), ("same", 1e-5, "")])
    for dtype, operator, D, T in product(DTYPES, ("rms_norm", "layer_norm"), (8, 100, 256, 1000, 4096), ROWS):
        residual, eps, layout = next(flags)
        yield Case.of(operator, dtype, T=T, D=D, residual=residual, eps=eps, layout=layout)
    for dtype, (E, groups), T in product(DTYPES, ((64, 1), (96, 4), (1000, 1), (1024, 8), (4096, 1), (8192, 8)), ROWS):
        _, eps, layout = next(flags)
        yield Case.of("gated_norm", dtype, T=T, E=E, groups=groups, eps=eps, layout=layout)


def activations() -> Iterator[Case]:
    """Those of the MLP."""
    for dtype, F, T, layout in product(DTYPES, (8, 100, 1000, 4096), (1, 7, 100), ("", "packed")):
        yield Case.of("swiglu", dtype, T=T, F=F, layout=layout)
        yield Case.of("squared_relu", dtype, T=T, F=F, layout=layout)
        yield Case.of("gelu", dtype, T=T, F=F, layout=layout, approximate="tanh" if T == 7 else "none")


def others() -> Iterator[Case]:
    """Rotary embedding, loss, and steps of decoding."""
    layouts = cycle(["", "packed"])
    for dtype, P, part, H, S in product(DTYPES, (16, 64, 128), (1, 2), (1, 6), (1, 7, 64, 257)):
        yield Case.of("rope", dtype, S=S, H=H, P=P, rotary=P // part, layout=next(layouts))
    for dtype, V, T, shard in product(DTYPES, (1, 40, 100, 1000, 50_280), (1, 7, 257), (0, 1)):
        yield Case.of("loss", dtype, T=T, V=V, start=shard * V, layout=next(layouts))
    for dtype, (P, N), B in product(DTYPES, ((16, 8), (64, 16), (64, 128), (48, 24), (128, 64), (64, 256)), (1, 3, 32)):
        yield Case.of("ssd_step", dtype, B=B, H=8, P=P, G=2, N=N, layout=next(layouts))
        yield Case.of("selective_scan_step", dtype, B=B, E=8 * P, N=N, layout=next(layouts))
        yield Case.of("causal_conv1d_step", dtype, B=B, C=P * N // 8, W=2 + B % 3, layout=next(layouts))


# --------------------------------------------------------------------------------------------------------------- running


@dataclass(frozen=True)
class Outcome:
    """Of one case: its errors, or why there are none."""

    case: Case
    result: Result = field(default_factory=lambda: Result({}, 0.0))
    seconds: float = 0.0
    failure: str = ""

    @property
    def passed(self) -> bool:
        return not self.failure and self.result.passed

    @property
    def device_failed(self) -> bool:
        """Whether it raised an error of CUDA's, after which a process can compute nothing."""
        return "CUDA" in self.failure

    @property
    def said(self) -> str:
        bad = [f"{name} {error:.2e}" for name, error in self.result.wrong.items()]
        return f"{self.case}: {self.failure or ', '.join(bad) + f' (limit {self.result.limit:.1e})'}"


def examine(case: Case, device: str) -> Outcome:
    """Run a case in memory that holds NaN where nothing was written."""
    begin = time.perf_counter()
    _poison(device)
    try:
        result = check(case, device, seed=1)
        if device == "cuda":
            torch.cuda.synchronize()
    except Exception as error:  # Whatever it is, it is the outcome of this case, and the others are still to be run.
        message = str(error).strip().splitlines() or [""]
        return Outcome(case, failure=f"{type(error).__name__}: {message[0]}", seconds=time.perf_counter() - begin)
    return Outcome(case, result, time.perf_counter() - begin)


def _poison(device: str) -> None:
    """Leave NaN in the memory that the next tensors are made in."""
    if device == "cuda":
        held = [torch.full((1 << 24,), torch.nan, device=device)]
        held += [torch.full((1 << size,), torch.nan, device=device) for size in range(7, 18) for _ in range(4)]
        del held


def _work(connection: Connection, device: str) -> None:
    """A process: runs the cases that it is sent. It ends after a failure of the device, which no later call survives."""
    torch.set_num_threads(1)
    while True:
        outcome = examine(connection.recv(), device)
        connection.send(outcome)
        if outcome.device_failed:
            return


@dataclass
class Worker:
    """A process, the case it is at, and those it takes next, which share kernels with it."""

    process: Any
    connection: Connection
    case: Case | None = None
    rest: deque[Case] = field(default_factory=deque)
    since: float = 0.0

    def begin(self) -> None:
        """Send the next case."""
        self.case, self.since = self.rest.popleft(), time.monotonic()
        with suppress(BrokenPipeError):  # It has died: `outcome` says so.
            self.connection.send(self.case)

    def outcome(self) -> Outcome | None:
        """Of the case it is at, if there is one yet: also where the process died or hangs."""
        seconds = time.monotonic() - self.since
        try:
            if self.connection.poll():
                outcome: Outcome = self.connection.recv()
                return outcome
        except (EOFError, ConnectionResetError):
            pass
        else:
            if self.process.is_alive() and seconds < STUCK_SECONDS:
                return None
        self.end()
        assert self.case is not None
        failure = f"no result after {seconds:.0f} s; its process ended with {self.process.exitcode}"
        return Outcome(self.case, seconds=seconds, failure=failure)

    def end(self) -> None:
        """Leave no process behind."""
        self.process.kill()
        self.process.join()


def run(cases: Sequence[Case], processes: int, device: str = "cuda") -> Iterator[Outcome]:
    """The outcome of each case, as it comes. A process that hangs or dies costs the case it was at, and is replaced."""
    context = multiprocessing.get_context("spawn")
    groups, workers = deque(_groups(cases)), list[Worker]()
    try:
        while groups or workers:
            while groups and len(workers) < processes:
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs, device), daemon=True)
                process.start()
                theirs.close()  # So that its end is seen here.
                workers.append(Worker(process, ours, rest=deque(groups.popleft())))
                workers[-1].begin()
            wait([worker.connection for worker in workers], timeout=1.0)
            for worker in list(workers):
                outcome = worker.outcome()
                if outcome is None:
                    continue
                yield outcome
                if outcome.device_failed or not worker.process.is_alive():
                    if worker.rest:
                        groups.append(list(worker.rest))
                elif worker.rest or groups:
                    worker.rest = worker.rest or deque(groups.popleft())
                    worker.begin()
                    continue
                worker.end()
                workers.remove(worker)
    finally:
        for worker in workers:
            worker.end()


def _groups(cases: Sequence[Case], most: int = 6) -> Iterator[list[Case]]:
    """Neighbours of one operator and dtype: they share kernels, which two processes would compile twice. The slow ones first."""
    groups: list[list[Case]] = []
    for case in cases:
        last = groups[-1] if groups else []
        if not last or len(last) == most or (last[0].operator, last[0].dtype) != (case.operator, case.dtype):
            groups.append(last := [])
        last.append(case)
    slow = ("ssd", "mamba2_mixer", "selective_scan")
    yield from sorted(groups, key=lambda group: group[0].operator not in slow)


# ---------------------------------------------------------------------------------------------------------------- report


def table(outcomes: Sequence[Outcome]) -> str:
    """By operator and dtype: cases, failed ones, and the worst error of outputs and of each gradient among those that passed."""
    by: dict[tuple[str, torch.dtype], list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        by[outcome.case.operator, outcome.case.dtype].append(outcome)
    lines = ["| operator | dtype | cases | failed | limit | worst errors | seconds |", "|---|---|---|---|---|---|---|"]
    for operator, dtype in sorted(by, key=lambda key: (list(OPERATORS).index(key[0]), DTYPES.index(key[1]))):
        of = by[operator, dtype]
        worst: dict[str, float] = {}
        for outcome in of:
            for name, error in outcome.result.errors.items():
                kind = "outputs" if name.startswith("output") else name.removeprefix("gradient of ")
                worst[kind] = max(worst.get(kind, 0.0), error)
        shown = ", ".join(f"{name} {error:.1e}" for name, error in worst.items())
        failed, limit = sum(not outcome.passed for outcome in of), max(outcome.result.limit for outcome in of)
        seconds = sum(outcome.seconds for outcome in of)
        lines.append(
            f"| {operator} | {str(dtype).removeprefix('torch.')} | {len(of)} | {failed} | {limit:.1e} | {shown} | {seconds:.0f} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases asked for; 0 if all passed, 1 if not, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operators", nargs="*", help=f"only these of {', '.join(OPERATORS)}", metavar="OPERATOR")
    parser.add_argument("--every", type=int, default=1, metavar="K", help="only every K-th case")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="at a time (default: one for each core)")
    parser.add_argument("--output", type=Path, help="write every case with its errors to this file, as JSON")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.operators if name not in OPERATORS]:
        parser.error(f"no such operator: {', '.join(unknown)}. Choose from {', '.join(OPERATORS)}")
    if options.every < 1 or options.processes < 1:
        parser.error("--every and --processes must be 1 or more")
    if not torch.cuda.is_available():
        print("check_kernels: there is no GPU here; tests/kernels runs kernels in Triton's interpreter", file=sys.stderr)
        return 2
    cases = [case for case in grid() if not options.operators or case.operator in options.operators][:: options.every]
    from mamba_kernels.checking.fused import toolchain

    print(f"{len(cases)} cases on {toolchain()}; {options.processes} processes", flush=True)
    begin, outcomes = time.monotonic(), list[Outcome]()
    try:
        for outcome in run(cases, options.processes):
            outcomes.append(outcome)
            if not outcome.passed:
                print(f"FAILED {outcome.said}", flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    failed = Counter(outcome.case.operator for outcome in outcomes if not outcome.passed)
    print(table(outcomes))
    said = ", ".join(f"{operator} {count}" for operator, count in failed.items()) or "none"
    print(f"{len(outcomes)} of {len(cases)} cases in {time.monotonic() - begin:.0f} s; failed: {said}")
    if options.output is not None:
        rows = [
            {"case": str(o.case), "passed": o.passed, **o.result._asdict(), "failure": o.failure} for o in outcomes
        ]
        options.output.write_text(json.dumps({"on": toolchain(), "cases": rows}, indent=1))
    return int(bool(failed) or len(outcomes) < len(cases))


if __name__ == "__main__":
    sys.exit(main())
