"""Progress of long steps: a live bar on a terminal, a plain line now and then in a log file."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column
from rich.text import Text

REFRESH_SECONDS = 0.1
"""Updates that come faster than this are counted but not drawn."""


def progress(total: int | None, description: str, unit: str = "") -> Progress:
    """Progress of a tool's step, as a context manager: ``with progress(n, "tokenising", "documents") as bar: bar.update(1)``."""
    return Progress(total, description, unit)


class Progress:
    """How far a step of `total` units (None: unknown) is, at what rate, and when it will end.

    On a terminal a bar is drawn live; elsewhere (CI, SLURM's log files) a line is printed every `interval` seconds
    (math.inf: only when :meth:`report` is called), and one at the end. Bytes (unit "B") are shown to three digits.
    `completed` units were done before (a resumed run) and do not count for the rate. A `parent` lends its place on the
    terminal; not `shown` (ranks other than 0), nothing prints.
    """

    def __init__(
        self,
        total: int | None,
        description: str,
        unit: str = "",
        *,
        completed: int = 0,
        interval: float = 10.0,
        parent: Progress | None = None,
        shown: bool = True,
        stream: TextIO | None = None,
    ) -> None:
        self.total, self.description, self.unit, self.completed = total, description, unit, completed
        self.interval, self.shown, self.fields = interval, shown, dict[str, str]()
        self.stream: TextIO = parent.stream if parent else stream or sys.stderr
        self._first = self._printed = (time.monotonic(), completed)
        self._window = deque([self._first], maxlen=64)
        self._owns_bar = parent is None
        self._bar: RichProgress | None = parent._bar if parent else self._start_bar()
        if self._bar:
            self._task = self._bar.add_task(description, total=total, completed=completed, pace="", detail="")

    def _start_bar(self) -> RichProgress | None:
        console = Console(file=self.stream)
        if not (self.shown and self.stream.isatty()) or console.is_dumb_terminal:
            return None
        whole = Column(no_wrap=True)
        columns = TextColumn("{task.description}", table_column=whole), BarColumn(None), TaskProgressColumn()
        bar = _TwoLines(*columns, TextColumn("{task.fields[pace]}", table_column=whole), console=console, expand=True)
        bar.start()
        return bar

    def update(self, n: int = 1, **fields: Any) -> None:
        """Count `n` more units; `fields` are shown beside them until they change (numbers to four digits)."""
        self.completed += n
        self.fields |= {name.replace("_", " "): _show(value) for name, value in fields.items()}
        now = time.monotonic()
        if now - self._window[-1][0] < REFRESH_SECONDS:
            return
        self._window.append((now, self.completed))
        self._draw()
        if self._bar is None and now - self._printed[0] >= self.interval:
            self.report()

    def skip(self, n: int) -> None:
        """Count `n` units as done before, by an earlier call: they do not count for the rate."""
        self.completed += n
        self._first = (self._first[0], self._first[1] + n)
        self._window = deque([(when, done + n) for when, done in self._window], maxlen=64)

    def report(self) -> None:
        """Print the present state as a plain line, unless a live bar shows it already."""
        self._printed = (time.monotonic(), self.completed)
        self._draw()
        if self._bar is None:
            share = "" if not self.total else f" {self.completed / self.total:4.0%}"
            self.message(" · ".join(filter(None, (f"{self.description}{share}", self.pace(), self.detail()))))

    def message(self, text: str) -> None:
        """Print a line (above the live bar, if there is one). Where a log's disk is full it is lost, and work goes on."""
        if not self.shown:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            with suppress(OSError):
                print(text, file=self.stream, flush=True)

    def pace(self) -> str:
        """Units done, the rate over the last updates and the time left, in one line."""
        if self.total is None and not self.completed:
            return ""
        count = human if self.unit == "B" else "{:,}".format
        done = count(self.completed) if self.total is None else f"{count(self.completed)}/{count(self.total)}"
        parts = [f"{done} {self.unit}".rstrip()]
        (start, first), (end, last) = self._window[0], self._window[-1]
        if last > first:
            rate = (last - first) / (end - start)
            parts.append(f"{human(rate)}/s")
            if self.total is not None and self.completed < self.total:
                parts.append(f"ETA {clock((self.total - self.completed) / rate)}")
        return " · ".join(parts)

    def detail(self) -> str:
        """The fields given to :meth:`update`, in one line."""
        return " · ".join(f"{name} {value}" for name, value in self.fields.items())

    def close(self) -> None:
        """Draw or print the last state and leave the terminal."""
        seconds = time.monotonic() - self._first[0]
        self._window = deque([self._first, (self._first[0] + seconds, self.completed)], maxlen=64)
        self._draw()
        if self._bar is None:
            if self._owns_bar and self.interval != math.inf:
                done = f"{self.description} done in {clock(seconds)}"
                self.message(" · ".join(filter(None, (done, self.pace()))))
        elif self._owns_bar:
            self._bar.stop()
        else:
            self._bar.remove_task(self._task)
        self._bar, self.shown = None, False

    def _draw(self) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self.completed, pace=self.pace(), detail=self.detail())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            self.interval = math.inf
        self.close()


class _TwoLines(RichProgress):
    """Rich's bars, with what each task's fields say on a line of its own below."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if task.fields["detail"]:
                yield Text("  " + task.fields["detail"], no_wrap=True, overflow="ellipsis", style="dim")


def _show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def human(number: float) -> str:
    """A quantity to three digits with its SI letter: 12345 -> 12.3k."""
    for letter, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= 0.9995 * size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def clock(seconds: float) -> str:
    """A duration as H:MM:SS, with days from one day on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}d " * (days > 0) + f"{hours}:{minutes:02}:{rest:02}"
