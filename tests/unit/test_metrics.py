"""Where metrics go, what they say, and that losing a sink never costs a run."""

import errno
import io
import itertools
import json
import math
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_mamba.config import Config, DataConfig, LoggingConfig, ModelConfig, TrainerConfig, WandbConfig, to_dict
from megatron_mamba.progress import Progress, clock, human, progress
from megatron_mamba.train import diary, metrics
from megatron_mamba.train.metrics import MetricLogger, PhaseTimer, Throughput, memory_gib, peak_tflops, read_records
from megatron_mamba.train.plot import plot_comparison, plot_run, read_curves, smoothed

CONFIG = Config(
    model=ModelConfig("tiny", "M", 64),
    data=DataConfig(kind="synthetic", seq_length=128),
    trainer=TrainerConfig(train_samples=100, global_batch_size=10),
    logging=LoggingConfig(tensorboard=False, wandb=WandbConfig(mode="disabled")),
)


def record(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "consumed_samples": 10 * step, "loss": 5.0 - step, **more}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------------ JSONL


def test_records_are_written_at_once_with_what_follows_from_them(tmp_path: Path) -> None:
    with MetricLogger(CONFIG, tmp_path / "new", is_main=True) as log:
        log.log(record(1, grad_norm=torch.tensor(0.5), seconds={"data": 0.25}))
        (written,) = lines(tmp_path / "new")
        assert written.pop("perplexity") == pytest.approx(math.exp(4.0))
        assert written == {"kind": "train", "step": 1, "consumed_samples": 10, "consumed_tokens": 1280, "loss": 4.0,
                           "grad_norm": 0.5, "seconds": {"data": 0.25}}  # fmt: skip
        log.log(record(2, loss=math.nan, grad_norm=math.inf))
        log.log({"message": "stopping", "path": tmp_path}, kind="event")
    bad, event = lines(tmp_path / "new")[1:]
    assert (bad["loss"], bad["perplexity"], bad["grad_norm"]) == (None, None, None)
    assert event == {"kind": "event", "message": "stopping", "path": str(tmp_path)}


def test_resume_drops_what_lies_beyond_it_and_keeps_all_else(tmp_path: Path) -> None:
    with MetricLogger(CONFIG, tmp_path, is_main=True) as log:
        log.log({"message": "at the start"}, kind="event")
        for step in (1, 2, 3):
            log.log(record(step))
            log.log(record(step), kind="valid")
        log.log({"message": "killed here"}, kind="event")
    with MetricLogger(CONFIG, tmp_path, is_main=True, consumed_samples=20, step=2) as log:
        log.log(record(3, loss=7.0))
    found = [(r["kind"], r.get("step"), r.get("loss")) for r in lines(tmp_path)]
    both = [(kind, step, 5.0 - step) for step in (1, 2) for kind in ("train", "valid")]
    assert found == [("event", None, None), *both, ("train", 3, 7.0)]

    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 4, "consumed_samples": 40}')  # complete, but for its end of line
    with MetricLogger(CONFIG, tmp_path, is_main=True, consumed_samples=40, step=4) as log:
        log.log(record(5))
    assert [r.get("step") for r in lines(tmp_path)] == [None, 1, 1, 2, 2, 3, 4, 5]
    with MetricLogger(CONFIG, tmp_path, is_main=True):
        pass
    assert [r["kind"] for r in lines(tmp_path)] == ["event"]


ODD = {
    "torn": '{"kind": "train", "st', "blank": "  ", "a list": "[1]", "a number": "7", "no kind": '{"step": 1}', "text": "# note",
    "a step in words": '{"kind": "train", "step": "two", "consumed_samples": 20}', "no text": "\udcff\udcfe",
    "samples in words": '{"kind": "train", "step": 2, "consumed_samples": null}',
}  # fmt: skip


@pytest.mark.parametrize("where", [0, 2, 5])
@pytest.mark.parametrize("kind", ODD)
def test_an_odd_line_costs_no_other_and_is_kept(tmp_path: Path, kind: str, where: int, capsys: pytest.CaptureFixture[str]) -> None:
    with MetricLogger(CONFIG, tmp_path, is_main=True) as log:
        for step in range(1, 6):
            log.log(record(step))
    file, odd = tmp_path / "metrics.jsonl", ODD[kind].encode(errors="surrogateescape")
    whole = file.read_bytes().splitlines()
    end = b"" if where == 5 else b"\n"
    file.write_bytes(b"\n".join([*whole[:where], odd, *whole[where:]]) + end)
    assert [r["step"] for r in read_records(file)] == [1, 2, 3, 4, 5]
    for _ in range(2):  # Said once, moved once.
        with MetricLogger(CONFIG, tmp_path, is_main=True, consumed_samples=40, step=4) as log:
            log.log(record(5))
    *kept, last = [r for r in lines(tmp_path) if r["kind"] == "train"]
    assert [r["step"] for r in [*kept, last]] == [1, 2, 3, 4, 5]
    messages = [r["message"] for r in lines(tmp_path) if r["kind"] == "event"]
    aside = tmp_path / "metrics.jsonl.odd"
    if kind == "blank":
        assert messages == []
        assert not aside.exists()
    else:
        assert aside.read_bytes() == odd + b"\n"
        told = f"{file}: line {where + 1} is no record and was moved to {aside}; the other lines stay"
        assert messages == [told]
        assert told in capsys.readouterr().err


def full(*_: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FullDisk(io.FileIO):
    """A file of a disk that has room for so many bytes more."""

    room = 0

    def write(self, data: Any) -> int:
        if not FullDisk.room:
            full()
        written = super().write(bytes(data[: FullDisk.room]))
        FullDisk.room -= written
        return written


def test_a_full_disk_costs_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(diary, "FileIO", FullDisk)
    monkeypatch.setattr(FullDisk, "room", 10**6)
    with MetricLogger(CONFIG, tmp_path, is_main=True) as log:
        log.log(record(1))
        FullDisk.room = 50  # Not enough for one.
        for step in (2, 3, 4):
            log.log(record(step))
        assert [r["step"] for r in lines(tmp_path)] == [1], "no torn line"
        (said,) = caplog.messages
        assert said.startswith(f"{tmp_path / 'metrics.jsonl'} cannot be written (No space left on device): training goes on")
        log.rewind(20, 2)
        FullDisk.room = 10**6
        log.log(record(3, loss=1.0))
    assert [(r["step"], r["loss"]) for r in lines(tmp_path)] == [(1, 4.0), (2, 3.0), (3, 1.0)]
    assert caplog.messages[1:] == [f"{tmp_path / 'metrics.jsonl'} can be written again"]


def test_a_disk_that_is_full_at_the_start_drops_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with MetricLogger(CONFIG, tmp_path, is_main=True) as log:
        for step in (1, 2, 3):
            log.log(record(step))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("torn")
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        log = MetricLogger(CONFIG, tmp_path, is_main=True, consumed_samples=20, step=2)
        log.log(record(3, loss=0.5))
        assert (tmp_path / "metrics.jsonl").read_bytes() == before
    log.close()
    assert [(r["step"], r["loss"]) for r in lines(tmp_path)] == [(1, 4.0), (2, 3.0), (3, 0.5)]
    assert (tmp_path / "metrics.jsonl.odd").read_text() == "torn\n"


def test_a_configuration_that_cannot_be_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    diary.write_config(CONFIG, tmp_path)
    before = (tmp_path / "config.yaml").read_text()
    assert yaml.safe_load(before) == to_dict(CONFIG)
    monkeypatch.setattr(os, "fsync", full)
    diary.write_config(replace(CONFIG, logging=LoggingConfig(interval=3)), tmp_path)
    assert (tmp_path / "config.yaml").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    (message,) = caplog.messages
    assert message.startswith(f"{tmp_path / 'config.yaml'} cannot be written (No space left on device)")


def test_other_ranks_write_and_print_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MetricLogger(CONFIG, tmp_path / "run", is_main=False) as log:
        log.log(record(1))
        log.advance(record(2))
        log.log({"message": "quiet"}, kind="event")
        with log.progress(3, "validation") as bar:
            bar.update(3)
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


# ------------------------------------------------------------------------------------------------------ other sinks


class Broken:
    def write(self, record: Any, kind: str) -> None:
        raise OSError("no space\nleft")

    def rewind(self, step: int) -> None:
        raise AssertionError("a dropped sink is not used again")

    def close(self) -> None:
        raise AssertionError("a dropped sink is not used again")


def test_failing_sinks_are_reported_once_and_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, went_back: bool) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(metrics, "TensorBoardSink", lambda *arguments: Broken())
    monkeypatch.setattr(metrics, "WandbSink", refuse)
    logging = replace(CONFIG.logging, tensorboard=True, wandb=WandbConfig(mode="online"))
    with MetricLogger(replace(CONFIG, logging=logging), tmp_path, is_main=True) as log:
        log.log(record(1))
        log.log(record(2))
    messages = [r["message"] for r in lines(tmp_path) if r["kind"] == "event"]
    assert messages == [
        "W&B failed and is left out from here on: no network",
        "TensorBoard failed and is left out from here on: no space left",
    ]
    assert [r["step"] for r in lines(tmp_path) if r["kind"] == "train"] == [1, 2]


def test_tensorboard_shows_each_step_once_after_a_resume_and_a_rewind(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def shown() -> EventAccumulator:
        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        return events

    config = replace(CONFIG, logging=replace(CONFIG.logging, tensorboard=True))
    with MetricLogger(config, tmp_path, is_main=True) as log:
        for step in (1, 2, 3):
            log.log(record(step, seconds={"data": 0.5}))
    (tmp_path / "metrics.jsonl").write_text("")  # TensorBoard's curve does not hang on it.
    time.sleep(1.1)  # event files are ordered by the second of their creation
    with MetricLogger(config, tmp_path, is_main=True, consumed_samples=20, step=2) as log:
        log.log(record(3, loss=0.25))
        log.log(record(3, loss=9.0), kind="valid")
        log.log(record(4, loss=99.0))
        log.rewind(30, 3)
        rewound = [(e.step, e.value) for e in shown().Scalars("train/loss")]
        log.log(record(5, loss=0.125))
    events = shown()
    assert rewound == [(1, 4.0), (2, 3.0), (3, 0.25)]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [*rewound, (5, 0.125)]
    assert [(e.step, e.value) for e in events.Scalars("valid/loss")] == [(3, 9.0)]
    assert [e.step for e in events.Scalars("train/seconds/data")] == [1, 2]


def test_wandb_offline_run_is_continued_under_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    for name in ("WANDB_MODE", "WANDB_RUN_ID", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    rows, write = list[dict[str, Any]](), wandb.Run.log
    monkeypatch.setattr(wandb.Run, "log", lambda self, values: (rows.append(values), write(self, values)))
    config = replace(CONFIG, logging=replace(CONFIG.logging, wandb=WandbConfig(mode="offline")))
    with MetricLogger(config, tmp_path, is_main=True) as log:
        for step in (1, 2, 3):
            log.log(record(step))
        log.rewind(20, 2)  # for a spike
        log.log(record(3, loss=0.25))
    with MetricLogger(config, tmp_path, is_main=True, consumed_samples=30, step=3) as log:
        log.log(record(4))
    with MetricLogger(config, tmp_path, is_main=True, consumed_samples=20, step=2) as log:
        log.log(record(3, loss=0.125))
    assert [r["kind"] for r in lines(tmp_path)] == ["train"] * 3, "no event: nothing failed"
    run_id = (tmp_path / "wandb_run_id").read_text().strip()
    folders = list((tmp_path / "wandb").glob("offline-run-*"))
    assert folders
    assert all(run_id in folder.name for folder in folders)
    # Nothing that was logged is taken back, or left out: of rows with the same step, the one with the most rewinds counts.
    found = [(row["step"], row["rewinds"], row["train/loss"]) for row in rows]
    assert found == [(1, 0, 4.0), (2, 0, 3.0), (3, 0, 2.0), (3, 1, 0.25), (4, 1, 1.0), (3, 2, 0.125)]
    data = b"".join(file.read_bytes() for folder in folders for file in folder.glob("*.wandb"))
    assert all(name in data for name in (b"train/loss", b"consumed_samples", b"rewinds"))


# ------------------------------------------------------------------------------------------------------ what is measured


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100-PCIE-40GB", 312), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989), ("NVIDIA GH200 480GB", 989), ("NVIDIA B200", 2250), ("NVIDIA GB200", 2500), ("NVIDIA T4", None),
        ("NVIDIA RTX A1000", None),
    ],
)  # fmt: skip
def test_peaks_by_device_name(name: str, peak: float | None) -> None:
    assert peak_tflops(name) == peak


def test_throughput_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(100.0, 2.0)
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    cpu = torch.device("cpu")
    # 6e9 FLOPs a token, 50,000 tokens in 2 s on 4 devices: 25,000 tokens/s, 37.5 TFLOP/s each.
    expected = {"tokens_per_second": 25_000.0, "tflops_per_device": pytest.approx(37.5), "mfu": pytest.approx(0.125)}
    rates = Throughput(6e9, 4, cpu, peak=300.0)
    assert rates.rates(50_000, 2.0) == expected
    assert "mfu" not in Throughput(6e9, 4, cpu).rates(50_000, 2.0)

    rates = Throughput(6e9, 4, cpu, peak=300.0, consumed_tokens=1000)
    assert rates.lap(51_000) == expected
    with rates.paused():
        pass
    assert rates.lap(151_000) == {**expected} | {"tokens_per_second": 25_000.0}
    assert rates.lap(201_000) == expected


def test_phases_add_up_and_start_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    timer = PhaseTimer(torch.device("cpu"))
    for seconds, name in ((1.0, "forward"), (2.0, "backward"), (4.0, "forward")):
        with timer.phase(name):
            now[0] += seconds
        now[0] += 100.0
    assert timer.lap() == {"seconds": {"forward": 5.0, "backward": 2.0}}
    assert timer.lap() == {"seconds": {}}


def test_memory_is_the_resident_set_in_gib() -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs Linux's /proc")
    peak_kib = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    assert memory_gib(torch.device("cpu"))["memory_gib"] == pytest.approx(peak_kib / 2**20, rel=0.05)


# --------------------------------------------------------------------------------------------------------- progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_progress_prints_a_line_per_interval_and_one_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    out = io.StringIO()
    with Progress(4000, "tokenising", "documents", stream=out, interval=10.0) as bar:
        for _ in range(40):
            now[0] += 1.0
            bar.update(100, loss=1.23456, file="a.txt")
    first, *_, last = out.getvalue().splitlines()
    assert first == "tokenising  25% · 1,000/4,000 documents · 100/s · ETA 0:00:30 · loss 1.235 · file a.txt"
    assert last == "tokenising done in 0:00:40 · 4,000/4,000 documents · 100/s"
    assert len(out.getvalue().splitlines()) == 5


def test_resumed_work_does_not_count_as_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    bar = Progress(1000, "train", completed=900, stream=io.StringIO())
    now[0] = 10.0
    bar.update(50)
    assert bar.pace() == "950/1,000 · 5/s · ETA 0:00:10"


def test_live_bar_shows_its_fields_messages_and_nested_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    with Progress(10, "train", "samples", stream=out) as bar:
        bar.update(4, loss="3.25")
        time.sleep(0.11)
        bar.update(4, loss="2.75")
        bar.message("valid [loss] 3.0")
        with Progress(2, "validation", parent=bar) as inner:
            inner.update(2)
    text = out.getvalue()
    assert "8/10 samples" in text
    assert "loss 2.75" in text
    assert " 80%" in text
    assert "valid [loss] 3.0" in text
    assert "validation" in text
    assert text.endswith("\x1b[?25h"), "the cursor is shown again"


def test_the_loggers_bar_follows_the_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MetricLogger(CONFIG, tmp_path, is_main=True) as log:
        log.advance(record(1, skipped_steps=0))
        log.log(record(2, lr=1e-4, grad_norm=0.5, tokens_per_second=12345.0, mfu=0.4123))
        log.log(record(2), kind="valid")
    (train, valid) = capsys.readouterr().err.splitlines()
    assert train.startswith("train  20% · 20/100 samples")
    assert "step 2 · loss 3.0000 · tokens/s 12.3k · grad norm 0.5 · lr 1.00e-04 · MFU 41.2% · ppl 20.09" in train
    assert valid == "valid · step 2 · loss 3.0000 · ppl 20.09"


def test_a_silent_console_prints_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(CONFIG, logging=replace(CONFIG.logging, console=False))
    with MetricLogger(config, tmp_path, is_main=True) as log:
        log.log(record(1))
        log.log(record(1), kind="valid")
    assert capsys.readouterr() == ("", "")


def test_a_tools_progress_and_its_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(None, "reading", "bytes") as bar:
        bar.update(5)
    assert capsys.readouterr().err.startswith("reading done in 0:00:00 · 5 bytes")
    assert [human(x) for x in (0.5, 999, 999.9, 1234, 5.678e9)] == ["0.5", "999", "1k", "1.23k", "5.68G"]
    assert [clock(s) for s in (59.6, 3661, 90061)] == ["0:01:00", "1:01:01", "1d 1:01:01"]


# ------------------------------------------------------------------------------------------------------------- plots


def write_run(path: Path, losses: list[float | None], valid: tuple[float, ...] = ()) -> Path:
    rows = [{"kind": "train", "consumed_tokens": 100 * i, "loss": x, "lr": 1e-3} for i, x in enumerate(losses, 1)]
    rows += [{"kind": "valid", "consumed_tokens": 100 * i, "loss": x} for i, x in enumerate(valid, 1)]
    rows += [{"kind": "event", "message": "x"}, {"kind": "test", "consumed_tokens": 100, "loss": 1.0}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "train", "lo')
    return path


def test_curves_skip_what_is_not_finite_and_spikes_do_not_bend_them(tmp_path: Path) -> None:
    train, valid = read_curves(write_run(tmp_path / "a.jsonl", [3.0, None, 2.0], valid=(2.5,)))
    assert [r["loss"] for r in train] == [3.0, 2.0]
    assert [r["loss"] for r in valid] == [2.5]
    assert smoothed([1.0] * 200 + [50.0] + [1.0] * 200) == pytest.approx([1.0] * 401)
    line = [float(400 - i) for i in range(400)]
    assert smoothed(line)[:350] == pytest.approx(line[:350]), "a slope is followed without lag, from its first point"
    assert smoothed([4.0]) == [4.0]
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        read_curves(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"b\.jsonl holds no training record"):
        plot_run(write_run(tmp_path / "b.jsonl", [None]), tmp_path / "b.png")


def test_pictures_hold_the_curves(tmp_path: Path) -> None:
    from matplotlib.image import imread

    runs = {
        name: write_run(tmp_path / f"{name}.jsonl", [9.0, 5.0 - i, 3.0 - i], (6.0, 4.0, 3.0))
        for i, name in enumerate(("one", "two"))
    }
    single = imread(plot_run(runs["one"], tmp_path / "new" / "run.png", "title"))
    both = imread(plot_comparison(runs, tmp_path / "both.png"))
    blue, vermilion = (0.0, 0x72 / 255, 0xB2 / 255), (0xD5 / 255, 0x5E / 255, 0.0)
    for picture in (single, both):
        for colour in (blue, vermilion):
            columns = (abs(picture[..., :3] - colour) < 0.02).all(-1).any(0)
            assert columns.sum() > picture.shape[1] // 2, "a curve of this colour spans the picture"
