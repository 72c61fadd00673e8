"""What the machine of each rank gives: a product that must be right, and how fast it computes, copies and sends to the next rank.

A GPU that is slow or wrong is cheapest to find before training begins, when it has no company. Later a step takes as long on all
ranks, as they wait for each other: a slow one is found by what each does alone, that product, and reading data."""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
import torch.distributed as dist

from megatron_mamba.parallel.context import ParallelContext

SLOW = 0.8
"""Of the median of all ranks: below it a rank is named."""

RATES = {
    "tflops": "TFLOP/s in a bf16 matrix product", "copy_gbps": "GB/s in a copy", "link_gbps": "GB/s to the next rank",
    "free_gib": "GiB of free memory",
}  # fmt: skip

WAITING = 0.05
"""Of the time of a step: from there on it matters that a rank waits for data, and twice as long as the median is too long."""


@dataclass(frozen=True)
class Reading:
    """Of one rank's machine. What was not measured is None."""

    host: str
    correct: bool
    tflops: float
    copy_gbps: float | None = None
    link_gbps: float | None = None
    free_gib: float | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    """By phase of training, since the reading before."""


def examine(context: ParallelContext) -> list[Reading]:
    """Measure every rank's machine at the same time, before it has work (a collective); the same list on every rank."""
    large = context.device.type == "cuda"
    correct, tflops = _product(context.device, 4096 if large else 128)
    _factors(_look_size(context.device))  # A tenth of a second, which the first look would take from a step.
    copy = _copy(context.device, 1 << (28 if large else 20))
    link = _link(context, 1 << (26 if large else 18)) if context.world_size > 1 else None
    free = torch.cuda.mem_get_info(context.device)[0] / 2**30 if large else None
    return context.gather(Reading(socket.gethostname(), correct, tflops, copy, link, free))


def look(context: ParallelContext, seconds: Mapping[str, float]) -> list[Reading]:
    """Between two steps: whether each rank's machine still computes rightly and as fast, and where its time went, `seconds` by
    phase (a collective). Takes 25 MiB and some milliseconds of a GPU."""
    correct, tflops = _product(context.device, _look_size(context.device))
    return context.gather(Reading(socket.gethostname(), correct, tflops, seconds=dict(seconds)))


def wrong(readings: Sequence[Reading]) -> list[str]:
    """The ranks, with their hosts, whose product is not what it must be."""
    return [f"rank {rank} on {reading.host}" for rank, reading in enumerate(readings) if not reading.correct]


def slow(readings: Sequence[Reading]) -> list[str]:
    """A line for each rank that is far below the others in one of the rates, or waits much longer for data."""
    lines = []
    # The last rank of a node sends through the network: its like are the last ranks of others.
    leaves = [reading.host != readings[(rank + 1) % len(readings)].host for rank, reading in enumerate(readings)]
    for name, values in _rates(readings).items():
        for rank, value in enumerate(values):
            like = [v for v, way in zip(values, leaves, strict=True) if name != "link_gbps" or way == leaves[rank]]
            if value < SLOW * (median := statistics.median(like)):
                lines.append(f"rank {rank} on {readings[rank].host}: {value:.3g} {RATES[name]}, the median is {median:.3g}")
    waits = [reading.seconds.get("data", 0.0) for reading in readings]
    median = statistics.median(waits)
    return lines + [
        f"rank {rank} on {readings[rank].host}: {wait:.3g} of {sum(readings[rank].seconds.values()):.3g} s waiting for data, the "
        f"median is {median:.3g}"
        for rank, wait in enumerate(waits)
        if wait > 2 * median and wait > WAITING * sum(readings[rank].seconds.values())
    ]


def summary(readings: Sequence[Reading]) -> dict[str, dict[str, float]]:
    """Least, median and largest of each rate, and of the seconds of each phase, over the ranks."""
    phases = dict.fromkeys(phase for reading in readings for phase in reading.seconds)
    columns = _rates(readings) | {f"{p}_seconds": [reading.seconds.get(p, 0.0) for reading in readings] for p in phases}
    return {
        name: {"min": min(values), "median": statistics.median(values), "max": max(values)} for name, values in columns.items()
    }


def _rates(readings: Sequence[Reading]) -> dict[str, list[float]]:
    """By name those that all ranks have."""
    columns = {name: [getattr(reading, name) for reading in readings] for name in RATES}
    return {name: values for name, values in columns.items() if values and None not in values}


def _look_size(device: torch.device) -> int:
    return 2048 if device.type == "cuda" else 128


@torch.no_grad()
def _product(device: torch.device, size: int) -> tuple[bool, float]:
    """Whether the product of :func:`_factors` is right, by its row sums, which float32 has exactly; and TFLOP/s of it."""
    left, right, expected = _factors(size)
    a, b = left.to(device), right.to(device)
    product = a @ b
    correct = bool(torch.equal(product.sum(1, dtype=torch.float32).cpu(), expected))
    seconds = _seconds(device, lambda: torch.mm(a, b, out=product), 10)
    return correct, 2e-12 * size**3 / seconds


@lru_cache(maxsize=1)
def _factors(size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Square matrices of -1, 0 and 1, with so many zeros that bfloat16 has the elements of their product, up to 256, exactly; and
    the sums of its rows."""
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randint(-1, 2, (size, size), generator=generator) for _ in range(2))
    right *= torch.randint(0, 2, (size, size), generator=generator)
    return left.bfloat16(), right.bfloat16(), (left * right.sum(1)).sum(1).float()


@torch.no_grad()
def _copy(device: torch.device, size: int) -> float:
    """GB/s, read and written, of a copy of so many bytes."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2e-9 * size / _seconds(device, lambda: torch.neg(source, out=target), 10)


def _link(context: ParallelContext, size: int) -> float:
    """GB/s sent to the next rank while as much comes from the one before."""
    rank, world = context.global_rank, context.world_size
    sent = torch.ones(size // 4, device=context.device)
    received = torch.empty_like(sent)

    def exchange() -> None:
        both = [dist.P2POp(dist.isend, sent, (rank + 1) % world), dist.P2POp(dist.irecv, received, (rank - 1) % world)]
        for work in dist.batch_isend_irecv(both):
            work.wait()

    return 1e-9 * size / _seconds(context.device, exchange, 3)


def _seconds(device: torch.device, call: Callable[[], object], times: int) -> float:
    """Of one call, after one that is not counted."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    call()
    wait()
    begin = time.perf_counter()
    for _ in range(times):
        call()
    wait()
    return (time.perf_counter() - begin) / times
