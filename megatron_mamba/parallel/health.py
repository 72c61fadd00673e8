"""What the machine of each rank gives before training begins: a product that must be right, and how fast it computes, copies and
sends to the next rank. A GPU that is slow or wrong is cheapest to find before it has company."""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_mamba.parallel.context import ParallelContext

SLOW = 0.8
"""Of the median of all ranks: below it a rank is named."""

RATES = {"tflops": "TFLOP/s in a bf16 matrix product", "copy_gbps": "GB/s in a copy", "link_gbps": "GB/s to the next rank"}


@dataclass(frozen=True)
class Reading:
    """Of one rank's machine. `link_gbps` is None for a rank alone."""

    host: str
    correct: bool
    tflops: float
    copy_gbps: float
    link_gbps: float | None


def examine(context: ParallelContext) -> list[Reading]:
    """Measure every rank's machine at the same time (a collective); the same list on every rank."""
    large = context.device.type == "cuda"
    correct, tflops = _product(context.device, 4096 if large else 128)
    copy = _copy(context.device, 1 << (28 if large else 20))
    link = _link(context, 1 << (26 if large else 18)) if context.world_size > 1 else None
    reading = Reading(socket.gethostname(), correct, tflops, copy, link)
    if context.world_size == 1:
        return [reading]
    everywhere: list[Any] = [None] * context.world_size
    dist.all_gather_object(everywhere, reading)
    return everywhere


def wrong(readings: Sequence[Reading]) -> list[str]:
    """The ranks, with their hosts, whose product is not what it must be."""
    return [f"rank {rank} on {reading.host}" for rank, reading in enumerate(readings) if not reading.correct]


def slow(readings: Sequence[Reading]) -> list[str]:
    """A line for each rank that is far below the others in one of the rates."""
    lines = []
    for name, what in RATES.items():
        values = [getattr(reading, name) for reading in readings]
        if len(values) < 2 or None in values:
            continue
        median = statistics.median(values)
        lines += [
            f"rank {rank} on {readings[rank].host}: {value:.3g} {what}, the median is {median:.3g}"
            for rank, value in enumerate(values)
            if value < SLOW * median
        ]
    return lines


def summary(readings: Sequence[Reading]) -> dict[str, dict[str, float]]:
    """Least, median and largest of each rate over the ranks."""
    columns = {name: [asdict(reading)[name] for reading in readings] for name in RATES}
    return {
        name: {"min": min(values), "median": statistics.median(values), "max": max(values)}
        for name, values in columns.items()
        if None not in values
    }


@torch.no_grad()
def _product(device: torch.device, size: int) -> tuple[bool, float]:
    """Whether the product of :func:`_factors` is right, by its row sums, which are known in integers; and TFLOP/s of it."""
    left, right = _factors(size)
    expected = (left * right.sum(1)).sum(1)
    a, b = (t.to(device, torch.bfloat16) for t in (left, right))
    product = a @ b
    correct = bool(torch.equal(product.long().sum(1).cpu(), expected))
    seconds = _seconds(device, lambda: torch.mm(a, b, out=product), 10)
    return correct, 2e-12 * size**3 / seconds


def _factors(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Square matrices of -1, 0 and 1, with so many zeros that bfloat16 has the elements of their product, up to 256, exactly."""
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randint(-1, 2, (size, size), generator=generator) for _ in range(2))
    return left, right * torch.randint(0, 2, (size, size), generator=generator)


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
