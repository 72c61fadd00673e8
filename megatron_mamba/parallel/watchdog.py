"""Ends ranks that wait in vain for another, after all have said where they are, and lets the first error be the one that is shown.

Each rank has a thread that writes a heartbeat to the store through which the ranks met, and looks at that of the next rank. A rank
whose training makes no progress raises an alarm once that has lasted too long, or as soon as the next rank is not heard of: its
process is stopped or gone, or its host cannot be reached. Then every rank writes the stacks of its threads to its log and reports
where it is, the one that raised the alarm says who did not, and all end. An exception raises an alarm too, so that others need not
find out. What happens next is torchrun's decision (--max-restarts).
"""

from __future__ import annotations

import datetime
import faulthandler
import json
import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from megatron_mamba.parallel.torch_private import last_collectives

EXIT_CODE = 70
"""Of a rank that ends for an alarm."""

SET_UP = "set-up"
"""The phase before the first step, which may take any time as long as all ranks live: checkpoints are read, indices built."""

ANSWER_SECONDS = 5.0
"""How long a rank that raised an alarm waits for the others to say where they are, and one whose connection broke for the cause."""

STOP_SECONDS = 10.0
"""In place of the patience with a silent rank once the run has been told to stop: torchrun stops all when one has failed."""

_now = time.monotonic  # Tests set this clock.

_BROKEN = ("connection closed by peer", "connection reset", "broken pipe", "connection refused", "timed out waiting", "nccl")


class RankError(RuntimeError):
    """A rank was ended because it waited in vain for another."""


class Watchdog:
    """Watches over one rank; used as a context manager around its training.

    `seconds` without progress are too many, and `heartbeat_seconds` without a sign of the next rank, if this one waits as long;
    None watches nothing. `store` is None for a rank alone. `stopping` says whether the run was told to stop. NCCL's last
    collectives are written to files that begin with `traces`.
    """

    def __init__(
        self, rank: int, world_size: int, store: dist.Store | None, seconds: float | None, heartbeat_seconds: float, *,
        stopping: Callable[[], bool] = lambda: False, traces: str | None = None, interval: float = 1.0,
        end: Callable[[int], Any] = os._exit,
    ) -> None:  # fmt: skip
        self._rank, self._world, self._store = rank, world_size, store if world_size > 1 else None
        self._seconds, self._patience, self._stopping, self._interval = seconds, heartbeat_seconds, stopping, interval
        self._end, self._traces, self._host, self._next = end, traces, socket.gethostname(), (rank + 1) % world_size
        self._step, self._phase, self._since = 0, SET_UP, _now()
        self._asked = math.inf  # Since when the store owes an answer.
        self._beats, self._heard, self._heard_at = 0, "", _now()
        self._done, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._guard = threading.Thread(target=self._watch_store, name="watchdog of the store", daemon=True)

    def reached(self, step: int, phase: str) -> None:
        """Note progress: training is now at `phase` of the step after `step`."""
        self._step, self._phase, self._since = step, phase, _now()

    def failed(self, error: BaseException) -> None:
        """Tell the other ranks of an exception that only this one may have; first wait for the cause if it tells of a lost
        connection, as others' failures do."""
        if self._store is None:
            return
        try:
            until = time.monotonic() + (ANSWER_SECONDS if is_consequence(error) else 0.0)
            while (alarm := self._raised()) is None and not self._stopping() and time.monotonic() < until:
                time.sleep(self._interval / 10)
            if alarm is None and not self._stopping():  # Else torchrun, which stops all, knows of a failure.
                self._raise("failure", f"{type(error).__name__}: {_first_line(error)}")
        except RuntimeError:  # The store went with its host; the error itself will be shown.
            return

    def __enter__(self) -> Watchdog:
        if self._seconds is not None:
            if self._store is not None:
                self._store.set(f"process {self._rank}", f"{self._host} {os.getpid()}")
                self._guard.start()
            self.reached(self._step, self._phase)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._done.set()
        if self._thread.is_alive() and self._store is not None:
            self._thread.join(2 * self._interval)
            with suppress(RuntimeError), self._asking():  # The rank that held the store may have ended.
                self._store.set(f"beat {self._rank}", "end")
        self._over.set()

    # ---------------------------------------------------------------------------------------------------- the thread

    def _watch(self) -> None:
        self._heard_at = _now()
        while not self._done.wait(self._interval):
            self._look()

    def _look(self) -> None:
        """Give a sign of life, and raise an alarm or answer one where there is reason to."""
        waited, patience = _now() - self._since, self._patient()
        assert self._seconds is not None
        if self._store is None:
            if waited > self._seconds and self._phase != SET_UP:
                self._leave(f"no progress for {waited:.0f} s", [], stacks=True)
            return
        try:
            self._beats += 1
            with self._asking():
                self._store.set(f"beat {self._rank}", str(self._beats))
            if (alarm := self._raised()) is not None:
                self._answer(alarm)
                return
            beat = self._read(f"beat {self._next}") or ""
        except RuntimeError as error:
            if waited > patience:
                self._leave(f"the store of the run does not answer ({_first_line(error)}): its host is gone", [], stacks=True)
            return
        if beat != self._heard or beat == "end":
            self._heard, self._heard_at = beat, _now()
        silent = _now() - self._heard_at
        if waited > self._seconds and self._phase != SET_UP:
            self._alarm(f"no progress for {waited:.0f} s")
        elif silent > patience and waited > patience:
            self._alarm(
                f"rank {self._next} has not been heard of for {silent:.0f} s: its process is stopped or gone, or its host "
                "cannot be reached",
                suspect=self._next,
            )

    def _watch_store(self) -> None:
        """End this rank where an answer of the store never comes, as over a cut network: who asked waits without end."""
        while not self._over.wait(self._interval):
            now, patience = _now(), self._patient()
            if min(now - self._asked, now - self._since) > patience:
                self._leave(f"the store of the run has not answered for {patience:.0f} s: its host is cut off", [], stacks=True)

    def _patient(self) -> float:
        return min(STOP_SECONDS, self._patience) if self._stopping() else self._patience

    def _alarm(self, reason: str, suspect: int | None = None) -> None:
        """Raise an alarm, or answer the one that another rank raised just before."""
        alarm = self._raise("hang", reason, suspect)
        if alarm["rank"] != self._rank:
            self._answer(alarm)
            return
        self._dump()
        places: list[str] = []
        with suppress(RuntimeError):
            places = self._places()
        self._leave(reason, places, stacks=False, suspect=suspect)

    def _answer(self, alarm: dict[str, Any]) -> None:
        """Say where this rank is and end; after a failure elsewhere, only if it does not go on to end by itself."""
        where = f"rank {alarm['rank']} on {alarm['host']}"
        if alarm["kind"] == "failure":
            # The rank that failed ends first, and breaks the connections of those that wait for it.
            if alarm["rank"] != self._rank and not self._done.wait(ANSWER_SECONDS) and (_now() - self._since > ANSWER_SECONDS):
                self._say(f"{where} failed ({alarm['reason']}); rank {self._rank} ends")
                self._end(EXIT_CODE)
            return
        self._dump()
        self._say(f"{where}: {alarm['reason']}; rank {self._rank} ends")
        time.sleep(2 * ANSWER_SECONDS)  # The rank that raised the alarm ends first: what it says is the cause.
        self._kill(alarm["suspect"])
        self._end(EXIT_CODE)

    def _leave(self, reason: str, places: list[str], *, stacks: bool, suspect: int | None = None) -> None:
        if stacks:
            self._dump(tell=False)
        here = f"rank {self._rank} on {self._host}, step {self._step}, {self._phase}"
        message = "\n  ".join([f"{here}: {reason}. The stacks of every rank that answered are in its log.", *places])
        self._say(message)
        record(RankError(message))
        self._kill(suspect)
        self._end(EXIT_CODE)

    def _kill(self, suspect: int | None) -> None:
        """Kill a silent rank of this host: torchrun asks a process to end first, which one that is stopped does not hear."""
        with suppress(RuntimeError):
            host, _, pid = ("" if suspect is None else self._read(f"process {suspect}") or "").rpartition(" ")
            if host == self._host and int(pid) != os.getpid() and _parent(int(pid)) == os.getppid():
                os.kill(int(pid), signal.SIGKILL)

    def _dump(self, *, tell: bool = True) -> None:
        """Write the stacks of all threads to stderr, NCCL's last collectives beside the logs, and tell the store the place."""
        waited = _now() - self._since
        with suppress(RuntimeError):  # The store may be what is gone.
            if tell and self._store is not None:
                self._store.set(f"place {self._rank}", json.dumps([self._step, self._phase, round(waited), self._host]))
        self._say(f"rank {self._rank} on {self._host}: step {self._step}, {self._phase} for {waited:.0f} s. Stacks of its threads:")
        faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
        if self._traces and torch.cuda.is_available() and torch.cuda.is_initialized():
            with suppress(RuntimeError, OSError):
                Path(f"{self._traces}{self._rank}").write_bytes(last_collectives())

    def _places(self) -> list[str]:
        """Where the ranks are, those at the same place in one line; those that do not answer last."""
        assert self._store is not None
        until, missing = time.monotonic() + ANSWER_SECONDS, set(range(self._world))
        found: dict[tuple[int, str], list[tuple[int, int, str]]] = {}
        while missing and time.monotonic() < until:
            for rank in sorted(missing):
                if (text := self._read(f"place {rank}")) is not None:
                    step, phase, waited, host = json.loads(text)
                    found.setdefault((step, phase), []).append((rank, waited, host))
                    missing.discard(rank)
            time.sleep(self._interval / 10)
        lines = [
            f"{_ranks(sorted(rank for rank, _, _ in ranks))}: step {step}, {phase} for {max(waited for _, waited, _ in ranks)} s"
            for (step, phase), ranks in sorted(found.items())
        ]
        return [*lines, f"{_ranks(sorted(missing))}: no answer"] if missing else lines

    # ----------------------------------------------------------------------------------------------------- the store

    def _raise(self, kind: str, reason: str, suspect: int | None = None) -> dict[str, Any]:
        """Put an alarm where all see it; returns the one that was there first."""
        assert self._store is not None
        alarm = json.dumps({"rank": self._rank, "host": self._host, "kind": kind, "reason": reason, "suspect": suspect})
        with self._asking():
            first: dict[str, Any] = json.loads(self._store.compare_set("alarm", "", alarm))
        return first

    def _raised(self) -> dict[str, Any] | None:
        text = self._read("alarm")
        return None if text is None else json.loads(text)

    def _read(self, key: str) -> str | None:
        assert self._store is not None
        with self._asking():
            return self._store.get(key).decode() if self._store.check([key]) else None

    @contextmanager
    def _asking(self) -> Iterator[None]:
        self._asked = _now()
        try:
            yield
        finally:
            self._asked = math.inf

    def _say(self, text: str) -> None:
        with suppress(OSError):  # The disk of the log may be full.
            print(f"watchdog: {text}", file=sys.__stderr__, flush=True)


def own_store(environment: Mapping[str, str], device: torch.device) -> dist.Store | None:
    """A connection of its own to the store that torchrun's processes meet at, for this start of them (a collective); None for a
    rank alone. The one that the process group has may be waited on by the thread that trains.
    """
    if "RANK" not in environment or int(environment.get("WORLD_SIZE", "1")) == 1:
        return None
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=datetime.timedelta(seconds=20))
    # A store may outlive a start, and torchrun's agents may count starts differently.
    start = torch.tensor(time.time_ns(), device=device)
    dist.broadcast(start, src=0)
    return dist.PrefixStore(f"watchdog {start.item()}", store)


def is_consequence(error: BaseException) -> bool:
    """Whether an exception only tells that a connection to another rank broke."""
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _BROKEN)


def record(error: BaseException) -> None:
    """Leave an exception and its traceback where torchrun, if it started this process, finds it: it shows a group's first one.

    Returns a second later: torchrun goes by whole seconds, and others may end as soon as this process does.
    """
    if dist.is_torchelastic_launched():
        try:
            raise error
        except BaseException as raised:  # What it writes is the exception that is handled.
            with suppress(OSError):  # As above: what failed first is to be shown.
                get_error_handler().record_exception(raised)
        time.sleep(1.0)


def crash(error: BaseException) -> NoReturn:
    """End this process for an exception that nothing expected: among ranks without cleaning up, which might wait for others."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        raise error
    with suppress(OSError):
        traceback.print_exception(error)
    if not is_consequence(error):  # Torchrun would print them all.
        record(error)
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(1)


def _parent(pid: int) -> int | None:
    """The process that started `pid`; None where there is no such process, or nothing to look it up."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def _ranks(numbers: list[int]) -> str:
    """For example ``ranks 0-3, 6``."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    shown = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    return f"rank {shown}" if len(numbers) == 1 else f"ranks {shown}"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
