"""How long a pipeline takes: what its ranks do is gone through in the schedule's order, with a time for each stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from megatron_mamba.layout import ParallelConfig
from megatron_mamba.model.stages import rank_of
from megatron_mamba.parallel.dry_run import Action, pipeline_actions

ROUNDS = 4
"""A step of more micro-batches than so many times the ranks goes on as it did between half and all of these."""


class StageTime(NamedTuple):
    """Seconds of one stage with one micro-batch: forward pass, and backward pass for its input and for its weights."""

    forward: float
    backward: float
    weights: float = 0.0


PARTS = {"F": ("forward",), "I": ("backward",), "W": ("weights",), "B": ("backward", "weights")}
"""What takes the time of each kind of action."""


class StepTime(NamedTuple):
    """Seconds of a step from the first to the last of any rank, and of these what each rank works."""

    total: float
    busy: tuple[float, ...]

    @property
    def idle(self) -> float:
        """Share of the ranks' time in which they wait."""
        return 1 - sum(self.busy) / (self.total * len(self.busy))


def pipeline_time(parallel: ParallelConfig, micro_batches: int, times: Sequence[StageTime], hop: float = 0.0) -> StepTime:
    """A step of `micro_batches` over stages of `times`; `hop`: seconds to hand a micro-batch to another rank, which does not
    keep the sender from going on."""

    def run(count: int) -> StepTime:
        return simulate(pipeline_actions(parallel.schedule, parallel.pp, len(times), count), parallel, times, hop)

    known = ROUNDS * parallel.pp
    if micro_batches <= known:
        return run(micro_batches)
    half, whole = run(known // 2), run(known)
    more = (micro_batches - known) / (known - known // 2)
    busy = tuple(b + more * (b - a) for a, b in zip(half.busy, whole.busy, strict=True))
    return StepTime(whole.total + more * (whole.total - half.total), busy)


def simulate(
    orders: Sequence[Sequence[Action]], parallel: ParallelConfig, times: Sequence[StageTime], hop: float
) -> StepTime:
    """Every rank goes through its order, waiting for what an action needs: the forward pass of the stage before, the backward
    pass of the stage behind."""
    ranks = [rank_of(stage, parallel) for stage in range(len(times))]
    done: dict[tuple[bool, int, int], float] = {}
    clock, busy, at = [0.0] * len(orders), [0.0] * len(orders), [0] * len(orders)
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(orders):
            while at[rank] < len(order):
                kind, stage, batch = order[at[rank]]
                ready, forward = 0.0, kind == "F"
                seconds = sum(getattr(times[stage], part) for part in PARTS.get(kind, ()))
                if kind in ("F", "I", "B") and 0 <= (source := stage - 1 if forward else stage + 1) < len(times):
                    if (forward, source, batch) not in done:
                        break
                    ready = done[forward, source, batch] + (hop if ranks[source] != rank else 0.0)
                clock[rank] = max(clock[rank], ready) + seconds
                busy[rank] += seconds
                if kind in ("F", "I", "B"):
                    done[forward, stage, batch] = clock[rank]
                at[rank] += 1
                moved = True
    if any(place < len(order) for place, order in zip(at, orders, strict=True)):
        raise ValueError(f"the order of {parallel.schedule} over {parallel.pp} ranks waits for itself")
    return StepTime(max(clock), tuple(busy))
