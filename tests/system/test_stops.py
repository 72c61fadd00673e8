"""How runs end: told to stop by a signal, finished, or with folders that cannot be written."""

import errno
import gc
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.context import ForkProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_train import config_for, losses, records

from megatron_mamba.checkpoint import read_metadata, resolve
from megatron_mamba.config import ConfigError, WandbConfig
from megatron_mamba.parallel.pipeline import Pipeline
from megatron_mamba.train import diary, loop, plot
from megatron_mamba.train.loop import train


@pytest.mark.parametrize("changes", [{"trainer": {"train_samples": 50}}, {"trainer": {"stop_after_samples": 22}}], ids=str)
def test_the_last_step_is_logged(changes: dict[str, Any], tmp_path: Path) -> None:
    """Whatever the interval of logging, and with train_samples no multiple of the batch."""
    train(config_for(tmp_path, **changes, logging={"interval": 1000}))
    last = 12 if "train_samples" in changes["trainer"] else 5
    assert list(losses(tmp_path)) == [last]


@pytest.mark.parametrize("error", [ValueError("no record"), OSError(28, "No space left"), RuntimeError("of matplotlib")], ids=str)
def test_a_curve_that_cannot_be_drawn_changes_no_exit_code(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr(plot, "plot_run", broken)
    with caplog.at_level("INFO"):
        assert train(config_for(tmp_path, trainer={"train_samples": 12})) == 0
    assert "curve" in caplog.text
    assert read_metadata(tmp_path / "checkpoints/step_00000003")["step"] == 3


def test_a_full_disk_below_run_dir_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Metrics, dashboards, configuration, curve and what is printed have no room; the checkpoints have."""

    def full(*_: object, **__: object) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("FileIO", "atomic_write"):
        monkeypatch.setattr(diary, name, full)
    monkeypatch.setattr(plot, "plot_run", full)
    log = io.StringIO()
    monkeypatch.setattr(log, "write", full)
    monkeypatch.setattr(sys, "stderr", log)
    logging = {"console": True, "tensorboard": True, "wandb": WandbConfig(mode="offline")}
    assert train(config_for(tmp_path / "run", logging=logging, checkpoint={"dir": str(tmp_path / "kept")})) == 0
    assert read_metadata(tmp_path / "kept/step_00000012")["step"] == 12
    for file in ("config.yaml", "metrics.jsonl"):
        assert f"{tmp_path / 'run' / file} cannot be written (No space left on device)" in caplog.text
    assert not (tmp_path / "run/tensorboard").exists()
    assert not (tmp_path / "run/wandb").exists()


def test_an_exit_code_outlives_a_full_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # What is buffered is what Python ends with 120 for.
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "megatron_mamba.train", "--nonsense"]
        assert subprocess.run(command, stdout=full, stderr=full, check=False).returncode == 2


def test_a_run_told_to_stop_before_its_first_step_ends_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to save and nothing to draw."""
    monkeypatch.setattr(loop.StopRequest, "received", property(lambda self: signal.SIGTERM))
    assert train(config_for(tmp_path)) == 0
    assert losses(tmp_path) == {}
    assert "stopping at step 0 on SIGTERM" in records(tmp_path, "event")[-1]["message"]


def test_a_finished_run_that_is_started_again_says_so(tmp_path: Path) -> None:
    config = config_for(tmp_path, trainer={"train_samples": 16})
    assert train(config) == 0
    before = {kind: records(tmp_path, kind) for kind in ("train", "valid", "test")}
    assert train(config) == 0
    assert {kind: records(tmp_path, kind) for kind in before} == before
    message = records(tmp_path, "event")[-1]["message"]
    for part in ("finished: step 4 was the last of trainer.train_samples=16", "raise trainer.train_samples", "run.dir"):
        assert part in message
    # What was left undone is done: the last evaluation, by a run that was cut off in it.
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(line for line in lines if '"test"' not in line))
    assert train(config) == 0
    assert records(tmp_path, "test")[0]["loss"] == before["test"][0]["loss"]
    assert train(config_for(tmp_path, trainer={"train_samples": 24})) == 0
    assert list(losses(tmp_path))[-1] == 6


def test_a_fork_collects_no_garbage_of_its_parent_s() -> None:
    """A process group among it would be freed by threads that the fork does not have (tests/conftest.py)."""
    parent = os.getpid()

    class Left:
        def __del__(self) -> None:
            if os.getpid() != parent:
                os._exit(3)

    def body() -> None:
        gc.collect()

    gc.disable()
    try:
        left = Left()
        left.__dict__["itself"] = left
        del left
        process = get_context("fork").Process(target=body)
        process.start()
        process.join(60)
    finally:
        gc.enable()
    assert process.exitcode == 0


@contextmanager
def run_in_a_process(run_dir: Path) -> Iterator[ForkProcess]:
    """A run that a terminal has started, two steps in: Ctrl-C reaches it. It never outlives the test."""

    def body() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        train(config_for(run_dir, trainer={"train_samples": 4_000_000}, checkpoint={"interval": 10**6}, eval={"interval": 0}))

    process = get_context("fork").Process(target=body)
    process.start()
    try:
        until = time.monotonic() + 120
        while process.is_alive() and max(losses(run_dir), default=0) < 2:
            assert time.monotonic() < until, "no second step within 120 s"
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.join()


@pytest.mark.ranks
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_and_a_closed_terminal_save(number: signal.Signals, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C twice at once, as torchrun sends it, is one."""
    with run_in_a_process(tmp_path) as process:
        for _ in range(2):
            os.kill(process.pid or 0, number)
        process.join(60)
        assert process.exitcode == 0
    last = max(losses(tmp_path))
    assert resolve(tmp_path).name == f"step_{last:08d}"
    assert f"stopping at step {last} on {number.name}" in records(tmp_path, "event")[-1]["message"]
    printed = capfd.readouterr().err
    assert ("Ctrl-C again ends at once" in printed) == (number == signal.SIGINT)
    assert "Traceback" not in printed


@pytest.mark.ranks
def test_a_second_ctrl_c_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Also in a step that takes for ever."""
    monkeypatch.setattr(loop.StopRequest, "IMPATIENT_SECONDS", 0.2)
    step = loop.Trainer._train_step

    def slow(self: loop.Trainer, batches: Any) -> dict[str, Any]:
        until = time.monotonic() + (120.0 if self.step == 2 else 0.0)
        while time.monotonic() < until:
            time.sleep(0.01)
        return step(self, batches)

    monkeypatch.setattr(loop.Trainer, "_train_step", slow)
    with run_in_a_process(tmp_path) as process:
        os.kill(process.pid or 0, signal.SIGINT)
        time.sleep(0.5)
        assert process.is_alive()
        os.kill(process.pid or 0, signal.SIGINT)
        process.join(10)
        assert process.exitcode == -signal.SIGINT
    assert "Traceback" not in capfd.readouterr().err


def test_a_terminal_s_signals_that_are_ignored_stay_so() -> None:
    """Under nohup, and of a process in the background. SIGUSR1, which launch/torchrun.sh ignores before, is taken."""
    before, unused = signal.signal(signal.SIGHUP, signal.SIG_IGN), signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with loop.StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
            assert stop.received is None
            os.kill(os.getpid(), signal.SIGUSR1)
            assert stop.received == signal.SIGUSR1
        assert signal.getsignal(signal.SIGHUP) is signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
        signal.signal(signal.SIGUSR1, unused)


@pytest.mark.parametrize("asked", [None, 11, 12, "in the evaluation", "after the evaluation"])
def test_a_run_with_nothing_left_to_do_leaves_a_file(asked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What started it need not start it again. One that was told to stop leaves it only if that was too late to leave anything."""
    file, step, evaluate = tmp_path / "finished", loop.Trainer._train_step, loop.Trainer._evaluate

    def told() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def signalled_step(self: loop.Trainer, batches: Any) -> dict[str, Any]:
        if self.step + 1 == asked:
            told()
        return step(self, batches)

    def signalled_evaluation(self: loop.Trainer, split: str, dataset: Any) -> None:
        if split == "test" and asked == "in the evaluation":
            told()
        evaluate(self, split, dataset)
        if split == "test" and asked == "after the evaluation":
            told()

    monkeypatch.setenv("FINISHED_FILE", str(file))
    monkeypatch.setattr(loop.Trainer, "_train_step", signalled_step)
    monkeypatch.setattr(loop.Trainer, "_evaluate", signalled_evaluation)
    assert train(config_for(tmp_path)) == 0
    assert file.exists() == (asked in (None, "after the evaluation"))
    file.unlink(missing_ok=True)
    monkeypatch.setattr(loop.Trainer, "_evaluate", evaluate)
    assert train(config_for(tmp_path)) == 0
    assert file.exists()
    file.unlink()
    # One that ends where it was to stop, and one whose last step left nothing to evaluate.
    assert train(config_for(tmp_path, trainer={"train_samples": 80, "stop_after_samples": 60})) == 0
    assert file.exists()
    file.unlink()
    asked = 20
    assert train(config_for(tmp_path, trainer={"train_samples": 80}, eval={"samples": 0})) == 0
    assert file.exists()
    monkeypatch.setenv("FINISHED_FILE", str(tmp_path / "nowhere" / "file"))
    assert train(config_for(tmp_path, trainer={"train_samples": 80}, eval={"samples": 0})) == 0


@pytest.mark.parametrize("total", [20, 60], ids=["shorter", "longer"])
def test_the_end_of_a_run_whose_sequences_changed_their_length(total: int) -> None:
    """A configuration of 40 samples counts them all in the length of now; the run's own count says when it is evaluated."""
    config = SimpleNamespace(train_samples=40, trainer=SimpleNamespace(stop_after_samples=None))
    trainer: Any = SimpleNamespace(config=config, train_samples=total, consumed_samples=total, _batch_size=lambda: 4)
    trainer._last_sample = lambda: loop.Trainer._last_sample(trainer)
    trainer._is_evaluated = lambda: False
    assert not loop.Trainer.has_ended(trainer)
    config.trainer.stop_after_samples = trainer.consumed_samples = total - 8
    assert loop.Trainer.has_ended(trainer)


@pytest.mark.parametrize(
    ("folder", "problem"),
    [("file", "is a file"), ("file/below", "lies below a file"), ("/proc/run", "cannot be"), ("x" * 300, "File name too long")],
)
@pytest.mark.parametrize("setting", ["run.dir", "checkpoint.dir"])
def test_folders_that_cannot_be_written(setting: str, folder: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    changes: dict[str, Any] = {"checkpoint": {"dir": str(tmp_path / folder)}}
    if setting == "run.dir":
        changes = {"run": {"dir": str(tmp_path / folder)}, "checkpoint": {"dir": str(tmp_path / "elsewhere")}}
    with pytest.raises(ConfigError, match=rf"{setting} = .*{problem}.*Choose a folder"):
        train(config_for(tmp_path / "run", **changes))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing stopped."""
    run_dir = tmp_path_factory.mktemp("whole")
    assert train(config_for(run_dir)) == 0
    return run_dir


@pytest.mark.parametrize("where", ["before", "within", "at the end"])
def test_a_stop_saves_before_it_evaluates(where: str, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the middle of an evaluation; what was left out is evaluated at the next start, and the losses are the same."""
    at, asked, evaluate, step = (12 if where == "at the end" else 8), [], Pipeline.evaluate, loop.Trainer._train_step

    def told() -> None:
        asked.append(1)
        os.kill(os.getpid(), signal.SIGTERM)

    def signalled_step(self: loop.Trainer, batches: Any) -> dict[str, Any]:
        if where != "within" and self.step == at - 1:
            told()
        return step(self, batches)

    def signalled_evaluation(self: Any, *arguments: Any, **options: Any) -> Any:
        if where == "within" and not asked and len(losses(tmp_path)) == at:
            told()
        assert where == "within" or not asked, "evaluated after a stop"
        return evaluate(self, *arguments, **options)

    monkeypatch.setattr(loop.Trainer, "_train_step", signalled_step)
    monkeypatch.setattr(Pipeline, "evaluate", signalled_evaluation)
    assert train(config_for(tmp_path)) == 0
    assert asked
    assert resolve(tmp_path).name == f"step_{at:08d}"
    assert at not in {r["step"] for r in records(tmp_path, "valid")}
    monkeypatch.undo()
    assert train(config_for(tmp_path)) == 0
    assert losses(tmp_path) == losses(whole)
    for split in ("valid", "test"):
        assert {r["step"]: r["loss"] for r in records(tmp_path, split)} == {r["step"]: r["loss"] for r in records(whole, split)}
