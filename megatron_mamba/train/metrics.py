"""Metrics of a run: throughput, time per phase, memory, and the sinks that records go to (on rank 0 only).

A record is a flat or one-level-nested mapping of numbers. The field's names: ``step``, ``consumed_samples``, ``loss``,
``grad_norm``, ``lr``, ``tokens_per_second``, ``tflops_per_device``, ``mfu``, ``memory_gib``, ``seconds`` (per phase).
"""

from __future__ import annotations

import contextlib
import math
import re
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from megatron_mamba.config import Config
from megatron_mamba.files import one_line
from megatron_mamba.progress import Progress, human
from megatron_mamba.train.diary import JsonlSink, Sink, TensorBoardSink, WandbSink, parsed

PEAK_TFLOPS = (
    ("A100", 312.0), ("H100 PCIe", 756.0), ("H100 NVL", 835.0), ("H100", 989.0), ("H200", 989.0), ("GH200", 989.0),
    ("B200", 2250.0), ("GB200", 2500.0),
)  # fmt: skip
"""Dense bf16 peaks (TFLOP/s) from NVIDIA's data sheets, by words of the device's name; the first match counts."""


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


class MetricLogger:
    """Sends records to run_dir/metrics.jsonl (always), the console, TensorBoard and W&B, as ``config.logging`` says.

    On ranks other than 0 (`is_main` false) every method does nothing. A run that resumes after `consumed_samples`, at `step`,
    keeps the records up to there and drops later ones, so the file has one line per step. No sink ever stops a run: what the
    file cannot take waits in memory, and a dashboard that fails is reported once and left out from then on.
    """

    def __init__(
        self,
        config: Config,
        run_dir: str | Path,
        is_main: bool,
        consumed_samples: int = 0,
        step: int = 0,
        train_samples: int | None = None,
    ) -> None:
        self._seq_length, self._main = config.data.seq_length, is_main
        self._sinks: dict[str, Sink] = {}
        self._failures: list[str] = []
        self._latest: dict[str, Any] = {}
        if is_main:
            folder = Path(run_dir)
            self._jsonl = JsonlSink(folder / "metrics.jsonl", consumed_samples)
            dashboards: dict[str, Callable[[], Sink]] = {}
            if config.logging.tensorboard:
                dashboards["TensorBoard"] = lambda: TensorBoardSink(folder, step)
            if config.logging.wandb.mode != "disabled":
                dashboards["W&B"] = lambda: WandbSink(config, folder, went_back=self._jsonl.went_back)
            for name, make in dashboards.items():
                with self._guard(name):
                    if self._jsonl.fails:
                        raise OSError(f"{folder} cannot be written")
                    self._sinks[name] = make()
        # The live bar comes last: W&B may ask for a login on the same terminal.
        total = config.train_samples if train_samples is None else train_samples
        self._bar = Progress(
            total, "train", "samples", completed=consumed_samples, interval=math.inf,
            shown=is_main and config.logging.console,
        )  # fmt: skip
        if is_main and self._jsonl.odd:
            self.log({"message": self._jsonl.odd}, kind="event")
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

    def rewind(self, consumed_samples: int, step: int) -> None:
        """Go on from the records up to `consumed_samples` and `step`, as a run that resumes there."""
        self._bar.skip(consumed_samples - self._bar.completed)
        if self._main:
            self._jsonl.rewind(consumed_samples)
            for name, sink in list(self._sinks.items()):
                with self._guard(name):
                    sink.rewind(step)

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

    @contextlib.contextmanager
    def _guard(self, name: str) -> Iterator[None]:
        """Drop the sink if the block fails: a run must not die of its own diary."""
        try:
            yield
        except Exception as error:
            self._sinks.pop(name, None)
            self._failures.append(f"{name} failed and is left out from here on: {one_line(error)}")

    def _report_failures(self) -> None:
        while self._failures:
            self.log({"message": self._failures.pop()}, kind="event")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


# --------------------------------------------------------------------------------------------------------- helpers


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, without lines that are none or not yet whole; none where there is no such file."""
    file = Path(path)
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    return [record for line in lines if (record := parsed(line)) is not None]


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


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return value.item() if hasattr(value, "item") else value
