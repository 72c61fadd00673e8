"""What a run does when it is told to stop, or when a step goes wrong."""

from __future__ import annotations

import math
import os
import random
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch

from megatron_mamba.config import SpikeConfig

LEAST_SPREAD = 1e-3
"""Of the mean: what a loss may differ by without being a spike, however steady it was."""


class TrainingError(RuntimeError):
    """Training cannot go on, on every rank alike; what it was doing when, and what to do about it."""


class StopRequest:
    """Takes note of the signals that ask a process to end, while used as a context manager.

    A second Ctrl-C ends it at once; what comes within `IMPATIENT_SECONDS` is the first, of which torchrun sends another. The
    terminal's signals stay ignored where they were, under nohup and in the background; SIGUSR1 does not, as launch/torchrun.sh
    ignores it for what is not yet set up. The handlers of before come back at the end.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
    IMPATIENT_SECONDS = 2.0

    def __init__(self, speaks: bool = False) -> None:
        """`speaks`: answer Ctrl-C on stderr, as the step that must end first may take long."""
        self._speaks = speaks
        self._interrupted: float | None = None
        self._received: int | None = None
        self._pipe: tuple[int, int] | None = None

    def __enter__(self) -> StopRequest:
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, False)
        terminal = (signal.SIGINT, signal.SIGHUP)
        taken = [n for n in self.SIGNALS if n not in terminal or signal.getsignal(n) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._receive) for number in taken}
        # Python runs handlers in the main thread alone, and not while that waits in a library, say for a collective without end.
        self._woken = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._pipe is not None
        signal.set_wakeup_fd(self._woken)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        pipe, self._pipe = self._pipe, None
        for end in pipe:
            os.close(end)

    @property
    def received(self) -> int | None:
        """A signal that has come, in whatever thread this is asked and wherever the main thread is."""
        if self._received is None and (pipe := self._pipe) is not None:
            with suppress(OSError):  # Nothing came, or this is being left.
                for number in os.read(pipe[0], 4096):
                    if number in self.SIGNALS:
                        self._received = number
        return self._received

    def _receive(self, number: int, _: FrameType | None) -> None:
        self._received = number
        if number != signal.SIGINT:
            return
        if self._interrupted is None:
            self._interrupted = time.monotonic()
            if self._speaks:
                with suppress(OSError):  # A closed terminal, a log on a full disk.
                    os.write(2, b"\nstopping: a checkpoint is written after this step; Ctrl-C again ends at once, without one\n")
        elif time.monotonic() - self._interrupted > self.IMPATIENT_SECONDS:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)


class Finding(NamedTuple):
    """What is wrong with a step: FINE, a SPIKE or NOT_FINITE, and in words."""

    severity: int
    what: str


FINE, SPIKE, NOT_FINITE = range(3)


class Trouble:
    """Steps that go wrong, those whose loss or gradient is not finite and spikes: which they are, and how many there were.

    A spike is a step whose loss or gradient norm is more than `spike.sigmas` standard deviations above the mean of the last
    `spike.window` steps that changed weights (the measure of OLMo-core's SkipStepOptimizer).
    """

    COUNTERS = ("skipped_steps", "transient_faults", "spikes", "rewinds")

    def __init__(self, spike: SpikeConfig, max_skipped: int) -> None:
        self.spike, self.max_skipped = spike, max_skipped
        self.skipped_steps = self.transient_faults = self.spikes = self.rewinds = 0
        self.skipped_in_a_row = self.spikes_in_a_row = 0
        self._recent = np.empty((0, 2))  # An array, as this is looked at in every step.

    def of(self, loss: float, grad_norm: float) -> Finding:
        """What is wrong with a step."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return Finding(NOT_FINITE, f"was not finite (loss {loss}, grad norm {grad_norm})")
        if self.spike.policy == "off" or len(self._recent) < self.spike.window:
            return Finding(FINE, "")
        columns = self._recent.mean(0).tolist(), self._recent.std(0).tolist()
        for name, value, mean, deviation in zip(("loss", "grad norm"), (loss, grad_norm), *columns, strict=True):
            spread = max(deviation, LEAST_SPREAD * abs(mean))
            if value > mean + self.spike.sigmas * spread:
                said = f"({name} {value:.6g}, the last {len(self._recent)} steps had {mean:.6g} with deviation {spread:.3g})"
                return Finding(SPIKE, f"is a spike {said}")
        return Finding(FINE, "")

    def skips(self, severity: int, loss: float, grad_norm: float) -> bool:
        """Count a step whose passes, run again or not, ended so, on the rank that has it worst; whether it changes no weight."""
        spike = severity == SPIKE
        skipped = severity == NOT_FINITE or (spike and self.spike.policy != "report")
        self.spikes += spike
        self.spikes_in_a_row = self.spikes_in_a_row + 1 if spike else self.spikes_in_a_row * (severity == NOT_FINITE)
        self.skipped_steps += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if not skipped:
            self._recent = np.concatenate([self._recent, [[loss, grad_norm]]])[-self.spike.window :]
        return skipped

    @property
    def exhausted(self) -> bool:
        return self.skipped_in_a_row >= self.max_skipped

    @property
    def rewinds_now(self) -> bool:
        return self.spike.policy == "rewind" and self.spikes_in_a_row >= self.spike.patience

    def counters(self) -> dict[str, int]:
        """For records of metrics."""
        return {name: getattr(self, name) for name in self.COUNTERS}

    def state(self) -> dict[str, Any]:
        """For checkpoints."""
        return {**self.counters(), "skipped_in_a_row": self.skipped_in_a_row, "recent": self._recent.tolist()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state`; what an older one lacks is zero."""
        for name in (*self.COUNTERS, "skipped_in_a_row"):
            setattr(self, name, state.get(name, 0))
        self.spikes_in_a_row = 0
        self._recent = np.array(state.get("recent", [])).reshape(-1, 2)[-self.spike.window :]


def verdict(transient: bool, skipped: bool, own: Sequence[tuple[str, float, float]]) -> str:
    """What running a step's passes again has told. `own`: of each rank its host and its own share of the loss, both times."""
    if not transient:
        fate = "The step is skipped" if skipped else "The step is taken as it is (trainer.spike.policy)"
        return f"the fault comes again: of the samples, the weights or the settings. {fate}"
    changed = [
        f"rank {rank} on {host} ({first:.6g}, then {second:.6g})"
        for rank, (host, first, second) in enumerate(own)
        if not math.isclose(first, second, rel_tol=1e-6)
    ]
    where = "No rank's share of the loss changed: it was in a backward pass or between ranks"
    if changed:
        where = f"The share of the loss changed of {', '.join(changed[:8])}"
    fate = "The second result is a spike, and the step is skipped" if skipped else "The step goes on with the second result"
    return f"the fault was transient: a machine's, not that of data or settings. {where}. {fate}"


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch. Weights and samples do not depend on it; they have seeds of their own."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
