"""Heartbeats between ranks that are threads here, on one store."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch.distributed as dist

from megatron_mamba.parallel import watchdog
from megatron_mamba.parallel.watchdog import SET_UP, Watchdog, is_consequence

INTERVAL = 0.02
PATIENCE = 60.0


class Ranks:
    """Watchdogs of a world on one store, and the exit codes of those that ended their ranks."""

    def __init__(self, world: int, seconds: float | None, heartbeat_seconds: float, stopping: Callable[[], bool] = lambda: False):
        self.ended: dict[int, int] = {}
        store = dist.HashStore()
        self.dogs = [
            Watchdog(
                rank, world, store, seconds, heartbeat_seconds, stopping=stopping, interval=INTERVAL,
                end=lambda code, rank=rank: self.end(rank, code),
            )
            for rank in range(world)
        ]  # fmt: skip

    def end(self, rank: int, code: int) -> None:
        self.ended.setdefault(rank, code)
        self.dogs[rank]._done.set()

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait, while those ranks make progress that are in `lively`."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, self.ended
            for dog in self.lively:
                dog.reached(3, "forward")
            time.sleep(INTERVAL / 4)

    lively: tuple[Watchdog, ...] = ()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(watchdog, "ANSWER_SECONDS", 0.5)
    yield
    for thread in [t for t in threading.enumerate() if t.name == "watchdog"]:
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_a_silent_rank_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    ranks = Ranks(3, seconds=PATIENCE, heartbeat_seconds=0.3)
    first, silent, last = ranks.dogs
    for dog in (first, last):
        dog.reached(7, "backward")
        dog.__enter__()
        dog._phase, dog._step = "backward", 7
    ranks.until(lambda: set(ranks.ended) == {0, 2})
    error = capfd.readouterr().err
    assert set(ranks.ended.values()) == {watchdog.EXIT_CODE}
    assert "rank 1 has not been heard of for" in error
    assert "ranks 0, 2: step 7, backward for" in error
    assert "rank 1: no answer" in error
    assert error.count("Stacks of its threads") == 2
    assert "test_a_silent_rank_is_named" in error
    assert not silent._thread.is_alive()


def test_a_rank_that_waits_is_not_alarmed_while_the_others_live() -> None:
    ranks = Ranks(2, seconds=PATIENCE, heartbeat_seconds=0.2)
    with ranks.dogs[0], ranks.dogs[1]:
        time.sleep(1.0)
        assert not ranks.ended


def test_a_rank_that_goes_on_does_not_mind_a_silent_one() -> None:
    ranks = Ranks(2, seconds=PATIENCE, heartbeat_seconds=0.2)
    with ranks.dogs[0]:
        ranks.lively = (ranks.dogs[0],)
        begin = time.monotonic()
        ranks.until(lambda: time.monotonic() - begin > 1.0)
        assert not ranks.ended


def test_a_rank_that_has_ended_is_not_missed() -> None:
    ranks = Ranks(2, seconds=PATIENCE, heartbeat_seconds=0.2)
    with ranks.dogs[0]:
        with ranks.dogs[1]:
            time.sleep(0.1)
        time.sleep(1.0)
        assert not ranks.ended


@pytest.mark.parametrize("world", [1, 2])
def test_no_progress(world: int, capfd: pytest.CaptureFixture[str]) -> None:
    ranks = Ranks(world, seconds=0.5, heartbeat_seconds=PATIENCE)
    for dog in ranks.dogs:
        dog.__enter__()
    ranks.lively = tuple(ranks.dogs)
    begin = time.monotonic()
    ranks.until(lambda: time.monotonic() - begin > 1.0)
    assert not ranks.ended
    ranks.lively = tuple(ranks.dogs[1:])
    ranks.until(lambda: len(ranks.ended) == world)
    error = capfd.readouterr().err
    assert "no progress for" in error
    assert "step 3, forward" in error


def test_setting_up_may_take_any_time() -> None:
    ranks = Ranks(1, seconds=0.1, heartbeat_seconds=PATIENCE)
    with ranks.dogs[0]:
        assert ranks.dogs[0]._phase == SET_UP
        time.sleep(0.5)
        assert not ranks.ended


def test_a_failure_ends_the_others_that_wait(capfd: pytest.CaptureFixture[str]) -> None:
    ranks = Ranks(3, seconds=PATIENCE, heartbeat_seconds=PATIENCE)
    for dog in ranks.dogs:
        dog.__enter__()
    ranks.dogs[1].failed(ValueError("a bad sample\nsecond line"))
    ranks.dogs[1].__exit__(None, None, None)
    ranks.until(lambda: set(ranks.ended) == {0, 2})
    error = capfd.readouterr().err
    assert "rank 1 on" in error
    assert "failed (ValueError: a bad sample); rank 0 ends" in error
    assert "Stacks" not in error


def test_a_broken_connection_is_not_the_cause_if_there_is_another() -> None:
    ranks = Ranks(2, seconds=None, heartbeat_seconds=PATIENCE)
    late = threading.Timer(0.1, lambda: ranks.dogs[1].failed(ValueError("the cause")))
    late.start()
    ranks.dogs[0].failed(RuntimeError("Connection closed by peer [127.0.0.1]:1"))
    alarm = ranks.dogs[0]._raised()
    late.join()
    assert alarm is not None
    assert (alarm["rank"], alarm["reason"]) == (1, "ValueError: the cause")


def test_of_a_rank_that_was_killed_torchrun_knows() -> None:
    """It stops the others, whose broken connections then are no failures of theirs."""
    ranks = Ranks(2, seconds=None, heartbeat_seconds=PATIENCE, stopping=lambda: True)
    ranks.dogs[0].failed(RuntimeError("Connection reset by peer"))
    assert ranks.dogs[0]._raised() is None


class GoneStore:
    """A store whose host has gone after the start."""

    def __init__(self) -> None:
        self.there = True

    def __getattr__(self, name: str) -> Callable[..., None]:
        if not self.there:
            raise dist.DistStoreError(f"{name}: connection reset")
        return {"set": lambda *a: None, "check": lambda *a: False}[name]


def test_without_the_store_a_rank_that_waits_ends(capfd: pytest.CaptureFixture[str]) -> None:
    ranks, store = Ranks(2, seconds=PATIENCE, heartbeat_seconds=0.3), GoneStore()
    ranks.dogs[0]._store = store
    ranks.dogs[0].__enter__()
    store.there = False
    ranks.lively = (ranks.dogs[0],)
    begin = time.monotonic()
    ranks.until(lambda: time.monotonic() - begin > 1.0)
    assert not ranks.ended
    ranks.lively = ()
    ranks.until(lambda: ranks.ended == {0: watchdog.EXIT_CODE})
    error = capfd.readouterr().err
    assert "the store of the run does not answer (set: connection reset): its host is gone" in error
    assert "Stacks of its threads" in error


def test_consequences() -> None:
    assert is_consequence(dist.DistBackendError("NCCL communicator was aborted"))
    assert is_consequence(RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:10430"))
    assert not is_consequence(RuntimeError("CUDA out of memory"))
    assert not is_consequence(ValueError("connection closed by peer"))


def test_ranks_are_told_in_spans() -> None:
    assert watchdog._ranks([4]) == "rank 4"
    assert watchdog._ranks([0, 1, 2, 5, 7, 8]) == "ranks 0-2, 5, 7-8"
