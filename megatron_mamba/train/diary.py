"""What a run writes down about itself: metrics.jsonl, TensorBoard, W&B and its configuration.

None of it is a result, so none of it may end a run: a full disk is reported, and training goes on to the next checkpoint, which may
lie on another.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
from collections import deque
from collections.abc import Iterable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from megatron_mamba.config import Config, to_dict, to_yaml
from megatron_mamba.data.indexed import atomic_write
from megatron_mamba.files import reason

log = logging.getLogger(__name__)

WANDB_START_SECONDS, WANDB_FINISH_SECONDS = 15.0, 60.0
"""How long W&B may hold up the start and the end of a run whose network or login does not work."""

WAITING_LINES = 10_000
"""Records that wait in memory, at most, for a disk with room; the oldest are let go."""

COUNTERS = ("step", "consumed_samples", "consumed_tokens")


def write_config(config: Config, run_dir: Path) -> None:
    """Write run_dir/config.yaml, for people and for ``--config``. If that fails, a warning says so."""
    path = run_dir / "config.yaml"
    try:
        with atomic_write(path) as file:
            file.write(to_yaml(to_dict(config)).encode())
    except OSError as error:
        log.warning("%s cannot be written (%s): the run goes on, and its checkpoints hold its configuration", path, reason(error))


class Sink(Protocol):
    """Takes records of plain numbers and strings; `kind` is "train", "valid", "test" or "event"."""

    def write(self, record: Mapping[str, Any], kind: str) -> None: ...

    def rewind(self, step: int) -> None: ...

    def close(self) -> None: ...


# ---------------------------------------------------------------------------------------------------------- metrics.jsonl


def parsed(line: bytes) -> dict[str, Any] | None:
    """The record that a line of metrics.jsonl is; None for a line that is none: torn, blank, or changed by hand."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        return None
    return record if all(type(record.get(name, 0)) is int for name in COUNTERS) else None


class Sorted(NamedTuple):
    """Lines of a metrics.jsonl, for a run that goes on from somewhere."""

    kept: list[bytes]
    odd: dict[int, bytes]
    """Those that are no records, by their number from 1."""
    went_back: bool
    """Whether there were records of samples beyond, which are dropped."""


def sort_lines(lines: Iterable[bytes], consumed_samples: int) -> Sorted:
    """Part records up to `consumed_samples` from later ones; an event that does not say when it was goes with the record before."""
    kept, odd = list[bytes](), dict[int, bytes]()
    went_back, here = False, True
    for number, line in enumerate(lines, 1):
        record = parsed(line)
        if record is None:
            odd |= {number: line} if line.strip() else {}
            continue
        here = record["consumed_samples"] <= consumed_samples if "consumed_samples" in record else here
        went_back |= not here
        if here:
            kept.append(line)
    return Sorted(kept, odd, went_back)


class JsonlSink:
    """One JSON object a line, each written at once. Infinite and undefined numbers are written as null.

    Records beyond `consumed_samples` are dropped, and lines that are no records are moved to metrics.jsonl.odd. What cannot be
    written waits for the next record: a warning says when that begins and when it ends.
    """

    def __init__(self, path: Path, consumed_samples: int) -> None:
        self.path, self._consumed = path, consumed_samples
        self.went_back = False
        self.odd = ""
        """What is to be said of lines that were no records."""
        self._file: FileIO | None = None
        self._end = 0
        self._waiting: deque[bytes] = deque(maxlen=WAITING_LINES)
        self.fails = False
        """Whether the last records could not be written."""
        self._flush()

    def write(self, record: Mapping[str, Any], kind: str) -> None:
        line = {"kind": kind, **_finite(record)}
        self._waiting.append(json.dumps(line, allow_nan=False, default=str).encode())
        self._flush()

    def rewind(self, consumed_samples: int) -> None:
        """Drop the records beyond `consumed_samples`."""
        self._close()
        self._consumed = consumed_samples
        self._waiting = deque(sort_lines(self._waiting, consumed_samples).kept, WAITING_LINES)
        self._flush()

    def close(self) -> None:
        self._flush()
        self._close()
        if self._waiting:
            log.warning("%s lacks the last %d records, which could not be written", self.path, len(self._waiting))

    def _flush(self) -> None:
        try:
            if self._file is None:
                self._open()
            assert self._file is not None
            data = memoryview(b"".join(line + b"\n" for line in self._waiting))
            end = self._end + len(data)
            try:
                while data:
                    data = data[self._file.write(data) :]
            except OSError:
                self._file.truncate(self._end)  # A torn line would spoil the next one.
                raise
            self._end = end
            self._waiting.clear()
        except OSError as error:
            if not self.fails:
                log.warning("%s cannot be written (%s): training goes on, and records wait in memory", self.path, reason(error))
            self.fails = True
            return
        if self.fails:
            log.warning("%s can be written again", self.path)
        self.fails = False

    def _open(self) -> None:
        """Bring the file to where the run goes on, and open it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = self.path.read_bytes() if self.path.exists() else b""
        kept, odd, self.went_back = sort_lines(content.split(b"\n"), self._consumed)
        if odd:
            aside = self.path.with_name(f"{self.path.name}.odd")
            before = aside.read_bytes() if aside.exists() else b""
            with atomic_write(aside) as file:
                file.write(before + b"".join(line + b"\n" for line in odd.values()))
            numbers = ", ".join(map(str, list(odd)[:8])) + (f" and {len(odd) - 8} more" if len(odd) > 8 else "")
            self.odd = f"{self.path}: line {numbers} is no record and was moved to {aside}; the other lines stay"
        new = b"".join(line + b"\n" for line in kept)
        if content.startswith(new):
            if content != new:
                os.truncate(self.path, len(new))  # Takes no room, where a disk is full.
        else:
            with atomic_write(self.path) as file:
                file.write(new)
        self._file, self._end = FileIO(self.path, "a"), len(new)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


# -------------------------------------------------------------------------------------------------------------- dashboards


class TensorBoardSink:
    """Event files in run_dir/tensorboard; what an interrupted or rewound run wrote beyond `step` is hidden."""

    def __init__(self, run_dir: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._open = lambda step: SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)
        self._writer = self._open(step)

    def rewind(self, step: int) -> None:
        """Go on in a new file, which tells TensorBoard to forget what was written of later steps."""
        self._writer.close()
        self._writer = self._open(step)
        self._writer.flush()  # Seen at once, not with the next record.

    def write(self, record: Mapping[str, Any], kind: str) -> None:
        for name, value in _flat(record).items():
            if isinstance(value, int | float) and name != "step":
                self._writer.add_scalar(f"{kind}/{name}", value, record.get("step"))

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """A Weights & Biases run in run_dir/wandb; a resumed run goes on under the id kept in run_dir/wandb_run_id.

    W&B takes nothing back. Its own count of rows goes on when the run goes back to an earlier step; curves are drawn over ``step``,
    and ``rewinds`` of a row is how often the run had gone back: of rows with the same step, the one with the most counts.
    """

    def __init__(self, config: Config, run_dir: Path, went_back: bool) -> None:
        import wandb

        kept = run_dir / "wandb_run_id"
        run_id = kept.read_text().strip() if kept.exists() else ""
        if not run_id:
            run_id = secrets.token_hex(4)
            _keep(kept, run_id)
        self._count = run_dir / "wandb_rewinds"
        counted = self._count.read_text().strip() if self._count.exists() else ""
        self._rewinds = int(counted) if counted.isdecimal() else 0
        settings = wandb.Settings(
            silent=True, console="off", init_timeout=WANDB_START_SECONDS,
            finish_timeout=WANDB_FINISH_SECONDS, finish_timeout_raises=True,
        )  # fmt: skip
        options = config.logging.wandb
        if options.mode == "online" and not wandb.login(timeout=int(WANDB_START_SECONDS), verify=False):
            raise RuntimeError("nobody logged in; run `wandb login`, or set logging.wandb.mode=offline")
        self._run = wandb.init(
            id=run_id, resume="allow", mode=options.mode, project=options.project, entity=options.entity,
            name=config.run.name, dir=str(run_dir), config=to_dict(config), settings=settings,
        )  # fmt: skip
        self._run.define_metric("*", step_metric="step")
        if went_back:
            self._went_back()

    def write(self, record: Mapping[str, Any], kind: str) -> None:
        values = {name if name == "step" else f"{kind}/{name}": value for name, value in _flat(record).items()}
        self._run.log(values | {"rewinds": self._rewinds})

    def rewind(self, step: int) -> None:
        self._went_back()

    def _went_back(self) -> None:
        self._rewinds += 1
        _keep(self._count, str(self._rewinds))

    def close(self) -> None:
        self._run.finish()


# ----------------------------------------------------------------------------------------------------------------- helpers


def _keep(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(f"{text}\n".encode())


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in record.items():
        flat |= _flat(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
