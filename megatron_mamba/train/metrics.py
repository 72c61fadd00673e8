"""Metrics of a run: throughput, time per phase, memory, and the sinks that records go to (on rank 0 only).

A record is a flat or one-level-nested mapping of numbers. The field's names: ``step``, ``consumed_samples``, ``loss``,
``grad_norm``, ``lr``, ``tokens_per_second``, ``tflops_per_device``, ``mfu``, ``memory_gib``, ``seconds`` (per phase).
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import resource
import secrets
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch

from megatron_mamba.config import Config, to_dict
from megatron_mamba.progress import Progress, human

PEAK_TFLOPS = (
    ("A100", 312.0), ("H100 PCIe", 756.0), ("H100 NVL", 835.0), ("H100", 989.0), ("H200", 989.0), ("GH200", 989.0),
    ("B200", 2250.0), ("GB200", 2500.0),
)  # fmt: skip
"""Dense bf16 peaks (TFLOP/s) from NVIDIA's data sheets, by words of the device's name; the first match counts."""

WANDB_START_SECONDS, WANDB_FINISH_SECONDS = 15.0, 60.0
"""How long W&B may hold up the start and the end of a run whose network or login does not work."""


# ------------------------------------------------------------------------------------------------- what is measured


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 peak of a device in TFLOP/s, or None if its name is not known."""
    words = re.sub(r"[-_]", " ", device_name)
    return next((peak for name, peak in PEAK_TFLOPS if re.search(rf"\b{name}\b", words)), None)


class Throughput:
    """Rates by the wall clock. `flops_per_token` counts forward and backward of one token, without recomputation.

    `peak` (TFLOP/s of one device) overrides the known one; where neither is there (a CPU), MFU is left out.
    """

    def __init__(
        self, flops_per_token: float, devices: int, device: torch.device, peak: float | None = None, consumed_tokens: int = 0
    ) -> None:
        known = peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self.flops_per_token, self.devices, self.peak = flops_per_token, devices, peak or known
        self._start, self._tokens, self._paused = time.perf_counter(), consumed_tokens, 0.0

    def rates(self, tokens: int, seconds: float) -> dict[str, float]:
        """tokens_per_second (all devices), tflops_per_device and, where the peak is known, mfu (a fraction)."""
        tflops = tokens * self.flops_per_token / seconds / self.devices / 1e12
        mfu = {} if self.peak is None else {"mfu": tflops / self.peak}
        return {"tokens_per_second": tokens / seconds, "tflops_per_device": tflops, **mfu}

    def lap(self, consumed_tokens: int) -> dict[str, float]:
        """:meth:`rates` since the last lap, without what :meth:`paused` covered. The host must have waited for the device."""
        now = time.perf_counter()
        rates = self.rates(consumed_tokens - self._tokens, now - self._start - self._paused)
        self._start, self._tokens, self._paused = now, consumed_tokens, 0.0
        return rates

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside the ``with`` block (evaluation, checkpoint) out of the next lap."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start


class PhaseTimer:
    """Seconds spent in each phase (data, forward, backward, optimizer, ...) since the last :meth:`lap`.

    On a CUDA device events are recorded in the current stream and read only by `lap`, so that timing never makes the
    host wait in between; a phase's time is then the device's, idle waiting included.
    """

    def __init__(self, device: torch.device, entered: Callable[[str], None] = lambda phase: None) -> None:
        """`entered` is told of the beginning of each phase."""
        self._device, self._cuda, self._entered = device, device.type == "cuda", entered
        self._marks: defaultdict[str, list[tuple[Any, Any]]] = defaultdict(list)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside the ``with`` block as phase `name`."""
        self._entered(name)
        start = self._mark()
        yield
        self._marks[name].append((start, self._mark()))

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def lap(self) -> dict[str, dict[str, float]]:
        """{"seconds": seconds by phase}, and start again from zero. Waits for the device."""
        if self._cuda:
            torch.cuda.synchronize(self._device)
            seconds = {name: sum(a.elapsed_time(b) for a, b in marks) / 1e3 for name, marks in self._marks.items()}
        else:
            seconds = {name: sum(b - a for a, b in marks) for name, marks in self._marks.items()}
        self._marks.clear()
        return {"seconds": seconds}


def memory_gib(device: torch.device) -> dict[str, float]:
    """{"memory_gib": peak so far}: what the allocator held on a CUDA device, the process's resident set on a CPU."""
    if device.type == "cuda":
        return {"memory_gib": torch.cuda.max_memory_reserved(device) / 2**30}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}


# --------------------------------------------------------------------------------------------------- where it goes


class Sink(Protocol):
    """Takes records of plain numbers and strings; `kind` is "train", "valid", "test" or "event"."""

    def write(self, record: Mapping[str, Any], kind: str) -> None: ...

    def close(self) -> None: ...


class MetricLogger:
    """Sends records to run_dir/metrics.jsonl (always), the console, TensorBoard and W&B, as ``config.logging`` says.

    On ranks other than 0 (`is_main` false) every method does nothing. A run that resumes after `consumed_samples` keeps
    the records up to there and drops later ones, so the file has one line per step. TensorBoard and W&B never stop a run:
    one that fails is reported once and left out from then on.
    """

    def __init__(self, config: Config, run_dir: str | Path, is_main: bool, consumed_samples: int = 0) -> None:
        self._seq_length, self._main = config.data.seq_length, is_main
        self._sinks: dict[str, Sink] = {}
        self._failures: list[str] = []
        self._latest: dict[str, Any] = {}
        if is_main:
            run_dir = Path(run_dir)
            run_dir.mkdir(parents=True, exist_ok=True)
            self._path = run_dir / "metrics.jsonl"
            self._jsonl = JsonlSink(self._path, consumed_samples)
            if config.logging.tensorboard:
                self._open("TensorBoard", lambda: TensorBoardSink(run_dir, self._jsonl.last_step + 1))
            if config.logging.wandb.mode != "disabled":
                self._open("W&B", lambda: WandbSink(config, run_dir))
        # The live bar comes last: W&B may ask for a login on the same terminal.
        self._bar = Progress(
            config.train_samples, "train", "samples", completed=consumed_samples, interval=math.inf,
            shown=is_main and config.logging.console,
        )  # fmt: skip
        self._report_failures()

    def log(self, record: Mapping[str, Any], kind: str = "train") -> None:
        """Write one record; `kind` is "train", "valid", "test" or "event" (best with a ``message``).

        All but events need ``step`` and ``consumed_samples``. Tensors are read (the host waits for them);
        ``consumed_tokens`` and ``perplexity`` are added where they follow.
        """
        if not self._main:
            return
        plain: dict[str, Any] = _plain(record)
        if "consumed_samples" in plain:
            plain.setdefault("consumed_tokens", plain["consumed_samples"] * self._seq_length)
        if "loss" in plain:
            plain.setdefault("perplexity", math.exp(min(plain["loss"], 700.0)))
        self._jsonl.write(plain, kind)
        if kind == "train":
            self.advance(plain)
            self._bar.report()
        else:
            self._bar.message(message_of(plain, kind))
        for name, sink in list(self._sinks.items()):
            with self._guard(name):
                sink.write(plain, kind)
        self._report_failures()

    def advance(self, record: Mapping[str, Any]) -> None:
        """Show a training record on the live bar only: for every step, where :meth:`log` is for every logging.interval."""
        self._latest |= record
        self._bar.update(record["consumed_samples"] - self._bar.completed, **describe(self._latest))

    def rewind(self, consumed_samples: int) -> None:
        """Go on from the records up to `consumed_samples`, as a run that resumes there; TensorBoard and W&B keep the others."""
        self._bar.skip(consumed_samples - self._bar.completed)
        if self._main:
            self._jsonl.close()
            self._jsonl = JsonlSink(self._path, consumed_samples)

    def progress(self, total: int, description: str, unit: str = "") -> Progress:
        """Progress of a step inside the run (validation, say), drawn below the run's own bar."""
        return Progress(total, description, unit, parent=self._bar, shown=self._bar.shown)

    def close(self) -> None:
        """Flush and close every sink."""
        while self._sinks:
            name, sink = self._sinks.popitem()
            with self._guard(name):
                sink.close()
        self._report_failures()
        self._bar.close()
        if self._main:
            self._jsonl.close()

    def _open(self, name: str, make: Callable[[], Sink]) -> None:
        with self._guard(name):
            self._sinks[name] = make()

    @contextlib.contextmanager
    def _guard(self, name: str) -> Iterator[None]:
        """Drop the sink if the block fails: a run must not die of its own diary."""
        try:
            yield
        except Exception as error:
            self._sinks.pop(name, None)
            reason = " ".join(str(error).split()) or type(error).__name__
            self._failures.append(f"{name} failed and is left out from here on: {reason}")

    def _report_failures(self) -> None:
        while self._failures:
            self.log({"message": self._failures.pop()}, kind="event")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class JsonlSink:
    """One JSON object a line, flushed line by line. Infinite and undefined numbers are written as null."""

    def __init__(self, path: Path, consumed_samples: int) -> None:
        self.last_step = _drop_records_after(path, consumed_samples) if path.exists() else -1
        self._file = path.open("a", buffering=1, encoding="utf-8")

    def write(self, record: Mapping[str, Any], kind: str) -> None:
        line = {"kind": kind, **_finite(record)}
        self._file.write(json.dumps(line, allow_nan=False, default=str) + "\n")

    def close(self) -> None:
        self._file.close()


class TensorBoardSink:
    """Event files in run_dir/tensorboard; records from `purge_step` on of an interrupted run are hidden."""

    def __init__(self, run_dir: Path, purge_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step)

    def write(self, record: Mapping[str, Any], kind: str) -> None:
        for name, value in _flat(record).items():
            if isinstance(value, int | float) and name != "step":
                self._writer.add_scalar(f"{kind}/{name}", value, record.get("step"))

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """A Weights & Biases run in run_dir/wandb; a resumed run goes on under the id kept in run_dir/wandb_run_id."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        import wandb

        kept = run_dir / "wandb_run_id"
        run_id = kept.read_text().strip() if kept.exists() else secrets.token_hex(4)
        kept.write_text(run_id + "\n")
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

    def write(self, record: Mapping[str, Any], kind: str) -> None:
        values = {name if name == "step" else f"{kind}/{name}": value for name, value in _flat(record).items()}
        self._run.log(values)

    def close(self) -> None:
        self._run.finish()


# --------------------------------------------------------------------------------------------------------- helpers


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, without one that is not yet written to its end; none where there is no such file."""
    file = Path(path)
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def describe(record: Mapping[str, Any]) -> dict[str, str]:
    """The numbers of a record that a person wants to see, formatted, by short names."""
    shown: dict[str, tuple[str, Callable[[Any], str]]] = {
        "step": ("step", "{:,}".format),
        "loss": ("loss", "{:.4f}".format),
        "tokens_per_second": ("tokens/s", human),
        "grad_norm": ("grad norm", "{:.3g}".format),
        "lr": ("lr", "{:.2e}".format),
        "tflops_per_device": ("TFLOP/s", "{:.3g}".format),
        "mfu": ("MFU", "{:.1%}".format),
        "perplexity": ("ppl", "{:.4g}".format),
        "memory_gib": ("memory", "{:.3g} GiB".format),
    }
    counters = {"skipped_steps": "skipped", "transient_faults": "transient faults", "spikes": "spikes", "rewinds": "rewinds"}
    shown |= {name: (short, str) for name, short in counters.items()}
    present = (name for name in shown if name in record and (record[name] or name not in counters))
    return {shown[name][0]: shown[name][1](record[name]) for name in present}


def message_of(record: Mapping[str, Any], kind: str) -> str:
    """The line that stands for an event (its ``message``, or all it says) or an evaluation on the console."""
    if kind == "event":
        return str(record.get("message") or " · ".join(f"{name} {value}" for name, value in record.items()))
    return " · ".join([kind, *(f"{name} {value}" for name, value in describe(record).items())])


def _drop_records_after(path: Path, consumed_samples: int) -> int:
    """Cut the file before the first record beyond `consumed_samples` (or torn line); returns the last step kept, or -1."""
    keep, last_step = 0, -1
    with path.open("rb+") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n") or record.get("consumed_samples", 0) > consumed_samples:
                break
            keep, last_step = keep + len(line), max(last_step, record.get("step", -1))
        file.truncate(keep)
    return last_step


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return value.item() if hasattr(value, "item") else value


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in record.items():
        flat |= _flat(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
