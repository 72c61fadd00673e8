"""One run at a time in a folder: a file that says who is at work there.

The first rank makes the file :data:`NAME` in run.dir and in the checkpoints' folder, sets its time every :data:`BEAT_SECONDS`, and
removes it at the end. It is made with O_EXCL, which NFS and Lustre keep; locks they may not have, or only within a node. A run that
finds the file of another asks whether that one is still at work:

- Of its own machine, which boot and process namespace tell from others, the number of the process and when it started say so. Every
  rank looks, as the first one may be on another machine at each start.
- The earlier starts of a SLURM job are over when SLURM starts it again.
- Of others it watches the time of the file: a run that sets it is at work, one that has not for :data:`SILENT_BEATS` is gone.

A run that is wrongly taken for gone, as it was paused for minutes, finds the other's file at its next beat and ends.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from megatron_mamba.config import Config, ConfigError
from megatron_mamba.files import reason
from megatron_mamba.parallel.context import ParallelContext
from megatron_mamba.parallel.watchdog import record
from megatron_mamba.train.checks import check_start
from megatron_mamba.train.resilience import TrainingError

log = logging.getLogger(__name__)

NAME = ".running"
BEAT_SECONDS = 10.0
SILENT_BEATS = 9
"""A run is gone if its file's time has not changed at so many looks, a beat apart."""


@contextmanager
def claimed(config: Config, context: ParallelContext, end: Callable[[int], Any] = os._exit) -> Iterator[None]:
    """Check that the run can start, and keep other runs out of its folders while it runs (a collective).

    Raises ConfigError, on all ranks, for what :func:`check_start` refuses and where another run is at work. `end` is called,
    with the exit code, if another run has taken a folder over.
    """
    check_start(config, context)
    own, taken = _claim(context), list[Path]()
    beats = _Beats(own, taken, end)
    try:
        for field, folder in (("run.dir", config.run.dir), ("checkpoint.dir", config.checkpoint_dir)):
            path = Path(folder).resolve() / NAME
            if path not in taken:
                _take(field, folder, path, own, context)
                taken.append(path)
        if context.global_rank == 0:
            beats.start()
        yield
    finally:
        beats.stop()
        for path in taken if context.global_rank == 0 else []:
            with suppress(OSError):
                if _read(path) == own:
                    path.unlink()


class Claim(NamedTuple):
    """What the file says of the run that made it. It also holds a random token, so that no two files are equal."""

    host: str = "a host that it does not name"
    place: str = ""
    pid: int = 0
    started: str = ""
    since: str = "a time that it does not name"
    slurm_job: str = ""
    slurm_restarts: int = 0

    @classmethod
    def of(cls, text: str) -> Claim:
        """What a file says; one that is cut off, or not of ours, says nothing."""
        try:
            known = json.loads(text)
            return cls(**{field: type(default)(known[field]) for field, default in cls()._asdict().items()})
        except (ValueError, TypeError, KeyError, RecursionError):
            return cls()

    def __str__(self) -> str:
        job = f" (SLURM job {self.slurm_job})" if self.slurm_job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"

    def lives(self) -> bool | None:
        """Whether the run is at work, or None if it was not on this machine."""
        return None if self.place != _place() else _start_of(self.pid) == self.started


def _claim(context: ParallelContext) -> str:
    """The text of a claim for this process."""
    job = context.job
    since = time.strftime("%F %T UTC", time.gmtime())
    slurm_job, restarts = job.get("slurm_job", ""), int(job.get("slurm_restarts", "0"))
    claim = Claim(socket.gethostname(), _place(), os.getpid(), _start_of(os.getpid()), since, slurm_job, restarts)
    return json.dumps(claim._asdict() | {"token": uuid.uuid4().hex}) + "\n"


def _place() -> str:
    """What tells this machine, since its last boot, from others; and containers with processes of their own from each other."""
    host = socket.gethostname()
    with suppress(OSError):  # Elsewhere than on Linux.
        return f"{host} {Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return host


def _start_of(pid: int) -> str:
    """When a process of this machine started, in the kernel's ticks; "" if it is over."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else fields[18]
    except OSError:
        if Path("/proc/self/stat").exists():
            return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "unknown"


# ------------------------------------------------------------------------------------------------------- taking a folder


def _take(field: str, folder: str, path: Path, own: str, context: ParallelContext) -> None:
    """Make the file `path` with the text `own` (a collective). Raises ConfigError where another run is at work."""
    is_main, claim = context.global_rank == 0, Claim.of(own)

    def on_first(action: Callable[[], Any]) -> Any:
        outcome = None
        if is_main:
            try:
                outcome = action()
            except OSError as error:
                outcome = error
        found = context.gather(outcome)[0]
        if isinstance(found, OSError):
            problem = f"{NAME} in it cannot be written or read ({reason(found)})"
            raise ConfigError(field, folder, problem, "Choose a folder that can be made and written to")
        return found

    while (text := on_first(partial(_make, path, own))) is not None:
        other = Claim.of(text)
        verdicts = context.gather(other.lives())
        earlier = other.slurm_job == claim.slurm_job != "" and other.slurm_restarts < claim.slurm_restarts
        lives = True if True in verdicts else False if False in verdicts or earlier else None
        if lives is None:
            if is_main:
                log.warning("%s = %s is held by %s; watching it for up to %g s", field, folder, other, SILENT_BEATS * BEAT_SECONDS)
            lives = on_first(partial(_beats, path, text))
        if lives:
            raise ConfigError(
                field, folder, f"another run is at work there: {other}", f"Wait for its end or stop it, or choose another {field}"
            )
        if lives is False:
            if is_main:
                log.warning("%s = %s was left by a run that is gone: %s", field, folder, other)
            on_first(partial(_remove, path, text))


def _make(path: Path, text: str) -> str | None:
    """Make a file with that text; if there is one already, its text."""
    while True:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            with suppress(FileNotFoundError):  # Removed in between.
                return _read(path)
            continue
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
        except OSError:
            path.unlink()
            raise
        return None


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _beats(path: Path, text: str) -> bool | None:
    """Whether somebody sets the time of a file; None once it is another file, or gone."""

    def look() -> int | None:
        try:
            with open(path, encoding="utf-8", errors="replace") as file:  # NFS asks the server when a file is opened.
                return os.fstat(file.fileno()).st_mtime_ns if file.read() == text else None
        except FileNotFoundError:
            return None

    first = look()
    for _ in range(SILENT_BEATS):
        time.sleep(BEAT_SECONDS)
        now = look()
        if now is None or first is None:
            return None
        if now != first:
            return True
    return False


def _remove(path: Path, text: str) -> None:
    """Remove a file with that text. One that another run makes in its place in this moment comes back."""
    aside = path.with_name(f"{NAME}-{uuid.uuid4().hex[:8]}")
    try:
        if _read(path) != text:
            return
        os.rename(path, aside)
    except FileNotFoundError:
        return
    if _read(aside) != text:
        with suppress(OSError):  # Where it cannot, its run makes it again at its next beat.
            os.link(aside, path)
    aside.unlink()


class _Beats:
    """The thread that sets the files' time, and that ends the run if one is another's."""

    def __init__(self, own: str, paths: Sequence[Path], end: Callable[[int], Any]) -> None:
        self._own, self._paths, self._end = own, paths, end
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="claim", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(BEAT_SECONDS)

    def _run(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            for path in self._paths:
                with suppress(OSError):  # A file system that is away for a while.
                    if (text := _make(path, self._own) or self._own) != self._own:
                        self._leave(path, Claim.of(text))
                        return
                    os.utime(path)

    def _leave(self, path: Path, other: Claim) -> None:
        message = f"{path.parent} was taken over by another run, {other}: this one, taken for gone, ends without a checkpoint"
        with suppress(OSError):  # The disk of the log may be full.
            print(f"error: {message}", file=sys.__stderr__, flush=True)
        record(TrainingError(message))
        self._end(1)
