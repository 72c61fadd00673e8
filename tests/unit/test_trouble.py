"""Signals that end a run, which steps are spikes, what is counted of them, and what running a step again tells."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import signal
import threading
import time
from dataclasses import replace
from typing import Any

import pytest

from megatron_mamba.config import ConfigError, SpikeConfig
from megatron_mamba.train.resilience import FINE, NOT_FINITE, SPIKE, StopRequest, Trouble, verdict

NAN = float("nan")


def filled(policy: Any = "skip", window: int = 32, **settings: int) -> Trouble:
    """After `window` steps with losses of 3 +- 0.1 and gradient norms of 1 +- 0.1."""
    trouble, rng = Trouble(SpikeConfig(policy=policy, window=window, **settings), max_skipped=3), random.Random(0)
    for _ in range(window):
        loss, norm = rng.uniform(2.9, 3.1), rng.uniform(0.9, 1.1)
        assert trouble.of(loss, norm) == (FINE, "")
        assert not trouble.skips(FINE, loss, norm)
    return trouble


@pytest.mark.parametrize("number", StopRequest.SIGNALS)
def test_a_signal_is_noticed_while_the_main_thread_waits_in_a_library(number: signal.Signals) -> None:
    """Where Python runs no handlers, as in a collective with a rank that is gone: the watchdog's thread has to know."""
    library, lock, noticed = ctypes.CDLL(None), ctypes.create_string_buffer(128), list[int | None]()

    def tell_and_ask() -> None:
        time.sleep(0.5)  # Until the main thread is in the library.
        os.kill(os.getpid(), number)
        end = time.monotonic() + 10.0
        while stop.received is None and time.monotonic() < end:
            time.sleep(0.01)
        noticed.append(stop.received)
        library.pthread_mutex_unlock(lock)

    before = [signal.getsignal(other) for other in StopRequest.SIGNALS]
    with StopRequest() as stop:
        library.pthread_mutex_lock(lock)
        thread = threading.Thread(target=tell_and_ask)
        thread.start()
        library.pthread_mutex_lock(lock)  # Until the thread unlocks it: a signal does not end this.
        thread.join()
        assert noticed == [number]
    assert stop.received == number
    assert [signal.getsignal(other) for other in StopRequest.SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_ctrl_c_is_noted_where_nothing_can_be_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with StopRequest(speaks=True) as stop:
        monkeypatch.setattr(os, "write", full)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT


SEEN = [(3.2, 1.2, ""), (3.5, 1.0, "loss 3.5"), (3.0, 1.5, "grad norm 1.5"), (1.0, 0.1, "")]


@pytest.mark.parametrize(("loss", "norm", "what"), SEEN)
def test_far_above_the_steps_before_is_a_spike(loss: float, norm: float, what: str) -> None:
    found = filled().of(loss, norm)
    assert found.severity == (SPIKE if what else FINE)
    assert what in found.what
    assert filled("off").of(loss, norm).severity == FINE


def test_too_few_steps_have_no_spikes_and_steady_ones_forgive_a_little() -> None:
    trouble = Trouble(SpikeConfig(window=4), max_skipped=3)
    for _ in range(4):
        assert trouble.of(100.0, 100.0).severity == FINE
        trouble.skips(FINE, 2.0, 1.0)
    assert trouble.of(2.011, 1.0).severity == FINE
    assert trouble.of(2.013, 1.0).severity == SPIKE


@pytest.mark.parametrize(("policy", "skipped"), [("report", False), ("skip", True), ("rewind", True)])
def test_what_a_spike_changes(policy: str, skipped: bool) -> None:
    trouble = filled(policy, patience=2)
    before = trouble.state()["recent"]
    assert trouble.skips(trouble.of(9.0, 1.0).severity, 9.0, 1.0) is skipped
    assert not trouble.rewinds_now
    assert (trouble.spikes, trouble.skipped_steps) == (1, int(skipped))
    # What changed no weight is not what later steps are compared with.
    assert trouble.state()["recent"] == (before if skipped else [*before[1:], [9.0, 1.0]])
    trouble.skips(NOT_FINITE, NAN, 1.0)  # Ends no row of spikes.
    assert not trouble.rewinds_now
    trouble.skips(SPIKE, 9.0, 1.0)
    assert trouble.rewinds_now is (policy == "rewind")
    trouble.skips(FINE, 3.0, 1.0)
    assert not trouble.rewinds_now


def test_a_step_that_is_not_finite_is_skipped_whatever_the_policy() -> None:
    for policy in ("off", "report", "skip", "rewind"):
        trouble = filled(policy)
        for _ in range(3):
            assert not trouble.exhausted
            assert trouble.skips(trouble.of(NAN, 1.0).severity, NAN, 1.0)
        assert trouble.exhausted
        assert not trouble.rewinds_now
        assert (trouble.spikes, trouble.skipped_steps) == (0, 3)


def test_goes_on_from_its_state() -> None:
    trouble = filled()
    trouble.skips(SPIKE, 9.0, 1.0)
    other = Trouble(trouble.spike, 3)
    other.restore(trouble.state())
    assert other.state() == trouble.state()
    assert other.of(3.5, 1.0) == trouble.of(3.5, 1.0)
    assert other.of(3.5, 1.0).severity == SPIKE
    other.restore({"skipped_steps": 4, "skipped_in_a_row": 1})
    assert other.counters() == {"skipped_steps": 4, "transient_faults": 0, "spikes": 0, "rewinds": 0}
    assert other.of(3.5, 1.0).severity == FINE


def test_a_transient_fault_is_its_rank_s() -> None:
    own = [("a", 1.0, 1.0), ("b", NAN, 0.75), ("b", 0.5, 0.5 + 1e-9), ("c", 9.0, 0.8)]
    said = verdict(True, False, own)
    assert "changed of rank 1 on b (nan, then 0.75), rank 3 on c (9, then 0.8). The step goes on" in said
    assert "No rank's share of the loss changed: it was in a backward pass" in verdict(True, False, own[:1])
    assert verdict(True, True, own).endswith("The second result is a spike, and the step is skipped")
    assert "comes again" in verdict(False, True, own)
    assert "rank" not in verdict(False, True, own)


@pytest.mark.parametrize(("name", "value"), [("window", 1), ("sigmas", 0.0), ("patience", 0), ("max_rewinds", 0)])
def test_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"trainer\.spike\.{name} = {value}"):
        replace(SpikeConfig(), **{name: value}).validate()
