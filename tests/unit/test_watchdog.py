"""Heartbeats between ranks that are threads here, on one store."""

from __future__ import annotations

import io
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_mamba.parallel import watchdog
from megatron_mamba.parallel.watchdog import SET_UP, Watchdog, is_consequence

INTERVAL = 0.02
PATIENCE = 60.0


class Clock:
    """Time as a watchdog reads it, which passes when a test says so: no load of the machine makes a rank late."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


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
        self.dogs[rank]._over.set()

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for what the watchdogs' threads do."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, self.ended
            time.sleep(INTERVAL / 4)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(watchdog, "ANSWER_SECONDS", 0.5)
    yield
    left = [thread for thread in threading.enumerate() if thread.name.startswith("watchdog")]
    deadline = time.monotonic() + PATIENCE
    for thread in left:
        thread.join(max(deadline - time.monotonic(), 0.0))
    assert not [thread for thread in left if thread.is_alive()]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(watchdog, "_now", clock)
    return clock


def test_a_silent_rank_is_named(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    ranks = Ranks(3, seconds=100.0, heartbeat_seconds=10.0)
    first, silent, last = ranks.dogs
    for dog in (first, last):
        dog.reached(7, "backward")
        dog.__enter__()
    while first._raised() is None:
        beats = first._beats, last._beats
        ranks.until(lambda beats=beats: (first._beats > beats[0] and last._beats > beats[1]) or first._raised() is not None)
        clock.now += 1.0
    ranks.until(lambda: set(ranks.ended) == {0, 2})
    error = capfd.readouterr().err
    assert set(ranks.ended.values()) == {watchdog.EXIT_CODE}
    assert "rank 1 has not been heard of for" in error
    assert "ranks 0, 2: step 7, backward for" in error
    assert "rank 1: no answer" in error
    assert error.count("Stacks of its threads") == 2
    assert "test_a_silent_rank_is_named" in error
    assert not silent._thread.is_alive()


def test_a_log_on_a_full_disk_keeps_no_rank_alive(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(sys, "__stderr__", io.TextIOWrapper(full, write_through=True))
        ranks = Ranks(1, seconds=100.0, heartbeat_seconds=10.0)
        ranks.dogs[0].reached(7, "backward")
        clock.now = 101.0
        ranks.dogs[0]._look()
        assert ranks.ended == {0: watchdog.EXIT_CODE}


def test_a_rank_that_waits_is_not_alarmed_while_the_others_live(clock: Clock) -> None:
    ranks = Ranks(2, seconds=100.0, heartbeat_seconds=10.0)
    for _ in range(99):
        clock.now += 1.0
        for dog in ranks.dogs:
            dog._look()
    assert not ranks.ended


def test_a_rank_that_goes_on_does_not_mind_a_silent_one(clock: Clock) -> None:
    ranks = Ranks(2, seconds=100.0, heartbeat_seconds=10.0)
    for _ in range(50):
        clock.now += 1.0
        ranks.dogs[0].reached(3, "forward")
        ranks.dogs[0]._look()
    assert not ranks.ended
    for _ in range(11):
        clock.now += 1.0
        assert not ranks.ended
        ranks.dogs[0]._look()
    assert set(ranks.ended) == {0}


def test_a_rank_that_has_ended_is_not_missed(clock: Clock) -> None:
    ranks = Ranks(2, seconds=100.0, heartbeat_seconds=10.0)
    with ranks.dogs[1]:
        ranks.until(lambda: ranks.dogs[1]._beats > 0)
    for _ in range(50):
        clock.now += 1.0
        ranks.dogs[0]._look()
    assert not ranks.ended


@pytest.mark.parametrize("world", [1, 2])
def test_no_progress(world: int, clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    ranks = Ranks(world, seconds=10.0, heartbeat_seconds=PATIENCE)
    stuck, others = ranks.dogs[0], ranks.dogs[1:]
    stuck.reached(3, "forward")
    for _ in range(10):
        clock.now += 1.0
        for dog in ranks.dogs:
            dog._look()
        for dog in others:
            dog.reached(4, "backward")
    assert not ranks.ended
    clock.now += 1.0
    for dog in ranks.dogs:
        dog._look()
    assert len(ranks.ended) == world
    error = capfd.readouterr().err
    assert "rank 0 on" in error
    assert "step 3, forward: no progress for 11 s" in error


@pytest.mark.parametrize("world", [1, 2])
def test_setting_up_may_take_any_time(world: int, clock: Clock) -> None:
    ranks = Ranks(world, seconds=10.0, heartbeat_seconds=20.0)
    for _ in range(50):
        clock.now += 1.0
        for dog in ranks.dogs:
            assert dog._phase == SET_UP
            dog._look()
    assert not ranks.ended


def test_a_failure_ends_the_others_that_wait(capfd: pytest.CaptureFixture[str]) -> None:
    ranks = Ranks(3, seconds=PATIENCE, heartbeat_seconds=PATIENCE)
    for dog in ranks.dogs:
        dog.__enter__()
        dog._since -= PATIENCE  # However long they have waited, the one that failed ends first.
    begin = time.monotonic()
    ranks.dogs[1].failed(ValueError("a bad sample\nsecond line"))
    ranks.dogs[1].__exit__(None, None, None)
    ranks.until(lambda: set(ranks.ended) == {0, 2})
    assert time.monotonic() - begin > watchdog.ANSWER_SECONDS
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


def test_without_the_store_a_rank_that_waits_ends(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    ranks, store = Ranks(2, seconds=100.0, heartbeat_seconds=10.0), GoneStore()
    dog = ranks.dogs[0]
    dog._store = store  # type: ignore[assignment]
    dog._look()
    store.there = False
    for _ in range(50):
        clock.now += 1.0
        dog.reached(3, "forward")
        dog._look()
    for _ in range(11):
        assert not ranks.ended
        clock.now += 1.0
        dog._look()
    assert ranks.ended == {0: watchdog.EXIT_CODE}
    error = capfd.readouterr().err
    assert "the store of the run does not answer (set: connection reset): its host is gone" in error
    assert "Stacks of its threads" in error


class MuteStore:
    """A store to which the network is cut: no answer comes, and no error."""

    def __init__(self) -> None:
        self.cut, self.over = threading.Event(), threading.Event()

    def set(self, key: str, value: str) -> None:
        """Is sent, and has no answer."""

    def check(self, keys: list[str]) -> bool:
        if self.cut.is_set():
            self.over.wait(PATIENCE)
        return False


def test_a_store_that_never_answers_ends_a_rank_that_waits(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    store, ended = MuteStore(), []

    def end(code: int) -> None:
        ended.append(code)
        dog._done.set()
        dog._over.set()
        store.over.set()

    dog = Watchdog(1, 2, store, 100.0, 10.0, interval=INTERVAL, end=end)  # type: ignore[arg-type]
    dog.__enter__()
    store.cut.set()
    begin = time.monotonic()
    while dog._asked == math.inf or clock.now < 50.0:
        assert time.monotonic() - begin < PATIENCE
        dog.reached(3, "forward")
        clock.now += 1.0
        time.sleep(INTERVAL)
    assert not ended
    while not ended:
        assert time.monotonic() - begin < PATIENCE
        clock.now += 1.0
        time.sleep(INTERVAL)
    assert ended == [watchdog.EXIT_CODE]
    error = capfd.readouterr().err
    assert "step 3, forward: the store of the run has not answered for" in error
    assert "Stacks of its threads" in error


def test_consequences() -> None:
    assert is_consequence(dist.DistBackendError("NCCL communicator was aborted"))
    assert is_consequence(RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:10430"))
    assert not is_consequence(RuntimeError("CUDA out of memory"))
    assert not is_consequence(ValueError("connection closed by peer"))


def test_what_is_recorded_is_a_second_older_than_what_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    watchdog.record(ValueError("the cause"))
    recorded = json.loads((tmp_path / "error.json").read_text())["message"]
    assert recorded["message"] == "ValueError: the cause"
    assert int(recorded["extraInfo"]["timestamp"]) < int(time.time())


def test_ranks_are_told_in_spans() -> None:
    assert watchdog._ranks([4]) == "rank 4"
    assert watchdog._ranks([0, 1, 2, 5, 7, 8]) == "ranks 0-2, 5, 7-8"
