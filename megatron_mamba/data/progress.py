"""Progress of a long step: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0


class ByteProgress:
    """Bytes of `total` done, documents, MB/s and remaining time, on stderr. `total` None: only the time that has passed."""

    def __init__(self, title: str, total: int | None) -> None:
        self._title, self._total = title, total
        self._bytes, self._documents, self._resumed = 0, 0, 0
        self._began = self._printed = time.monotonic()
        live = sys.stderr.isatty()
        columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn()]
        self._bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) if live else None
        self._task = self._bar.add_task(title, total=total, note="") if self._bar is not None else None

    def advance(self, n_bytes: int, n_documents: int = 0, *, resumed: bool = False) -> None:
        """Count input as done; `resumed`: by an earlier call, so that it does not count as speed."""
        self._bytes += n_bytes
        self._documents += n_documents
        self._resumed += n_bytes if resumed else 0
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._bytes, note=self._note())
        elif time.monotonic() - self._printed > _SECONDS_BETWEEN_LINES:
            self._print()

    def _note(self) -> str:
        seconds = max(time.monotonic() - self._began, 1e-6)
        documents = f"{self._documents:,} documents, " if self._documents else ""
        return f"{documents}{(self._bytes - self._resumed) / seconds / 1e6:.1f} MB/s"

    def _print(self) -> None:
        self._printed = time.monotonic()
        seconds, speed = self._printed - self._began, (self._bytes - self._resumed) / max(self._printed - self._began, 1e-6)
        left = f", {((self._total or 0) - self._bytes) / speed:.0f} s left" if self._total and speed else ""
        share = f"{100 * self._bytes / self._total:.0f} %, {self._note()}, " if self._total else ""
        print(f"{self._title}: {share}{seconds:.0f} s{left}", file=sys.stderr, flush=True)

    def __enter__(self) -> ByteProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            self._print()
