"""What a run does when it is told to stop, or when a step goes wrong."""

from __future__ import annotations

import random
import signal
from types import FrameType

import numpy as np
import torch

from megatron_mamba.parallel.context import ParallelContext


class TrainingError(RuntimeError):
    """Training cannot go on, on every rank alike; what it was doing when, and what to do about it."""


class StopRequest:
    """Turns SIGTERM and SIGUSR1 into a question that all ranks answer alike between two steps.

    Use as a context manager: the handlers that were there before come back at the end.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, context: ParallelContext) -> None:
        self.context = context
        self.received: int | None = None

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.received = number

    def asked(self) -> bool:
        """True on every rank once any rank received a signal (a collective: call it on all ranks alike)."""
        return self.context.any_rank(self.received is not None)


class SkipCounter:
    """Counts steps that were skipped for a non-finite loss or gradient, in total and in a row, and those that were not because
    the same passes run again were finite."""

    def __init__(self, limit: int) -> None:
        self.limit, self.total, self.in_a_row, self.transient = limit, 0, 0, 0

    def record(self, finite: bool) -> None:
        """Note one step's outcome."""
        self.total += not finite
        self.in_a_row = 0 if finite else self.in_a_row + 1

    @property
    def exhausted(self) -> bool:
        return self.in_a_row >= self.limit


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch. Weights and samples do not depend on it; they have seeds of their own."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
