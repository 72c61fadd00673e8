"""One run at a time in a folder: whose file is there, whether that run lives, and what becomes of one that was taken for gone."""

import errno
import io
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_stops import run_in_a_process
from test_train import config_for, losses

from megatron_mamba.config import ConfigError
from megatron_mamba.train import claim
from megatron_mamba.train.claim import NAME, Claim, claimed
from megatron_mamba.train.loop import train

NEVER = 10**6


def context(**job: str) -> Any:
    """Of a run on one rank."""
    return SimpleNamespace(global_rank=0, dp_size=1, job={"host": socket.gethostname(), **job}, gather=lambda value: [value])


@pytest.fixture(autouse=True)
def _beat(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test waits for a file's time unless it says so."""
    monkeypatch.setattr(claim, "BEAT_SECONDS", NEVER)
    monkeypatch.setattr(claim, "SILENT_BEATS", 3)


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    started = subprocess.Popen(["sleep", "600"])
    yield started
    started.kill()
    started.wait()


def left(folder: Path, **known: Any) -> Path:
    """What a run left in a folder: one of another host if nothing else is said."""
    facts = Claim("node07", "node07 boot", 41, "17", "2026-01-02 03:04:05 UTC", "", 0)._asdict() | known
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NAME).write_text(json.dumps(facts | {"token": "other"}))
    return folder / NAME


def of(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """What a process of this machine would have left."""
    return {"host": socket.gethostname(), "place": claim._place(), "pid": process.pid, "started": claim._start_of(process.pid)}


def test_a_folder_is_held_and_given_back(tmp_path: Path) -> None:
    """Also where a run fails; the checkpoints' folder too."""
    config = config_for(tmp_path, checkpoint={"dir": str(tmp_path / "elsewhere")})
    for error in (None, ValueError("of training")):
        with suppress(ValueError), claimed(config, context(slurm_job="5")):
            for folder in (tmp_path, tmp_path / "elsewhere"):
                found = Claim.of((folder / NAME).read_text())
                assert (found.host, found.pid, found.slurm_job, found.lives()) == (socket.gethostname(), os.getpid(), "5", True)
            if error:
                raise error
        assert not list(tmp_path.rglob(f"{NAME}*"))


@pytest.mark.parametrize("setting", ["run.dir", "checkpoint.dir"])
def test_a_run_that_lives_is_named(setting: str, tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    """Two runs with folders of their own may meet in that of their checkpoints."""
    config = config_for(tmp_path / "run", checkpoint={"dir": str(tmp_path / "checkpoints")})
    folder = Path(config.run.dir if setting == "run.dir" else config.checkpoint_dir)
    path = left(folder, **of(process), slurm_job="41")
    before = path.read_text()
    who = rf"process {process.pid} on {socket.gethostname()} \(SLURM job 41\), since 2026-01-02 03:04:05 UTC"
    with (
        pytest.raises(ConfigError, match=rf"{setting} = .*another run is at work there: {who}\. Wait .* another {setting}$"),
        claimed(config, context()),
    ):
        pass
    assert path.read_text() == before
    assert list(tmp_path.rglob(f"{NAME}*")) == [path]


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"pid": 1}', json.dumps(Claim()._asdict() | {"slurm_restarts": [2]})])
def test_a_file_that_is_not_ours_says_nothing(text: str) -> None:
    assert Claim.of(text) == Claim()


@pytest.mark.parametrize("how", ["ended", "killed and not waited for", "another process has its number"])
def test_a_run_of_this_machine_that_is_gone(how: str, tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    known = of(process)
    if how == "another process has its number":
        known["started"] = "1"
    else:
        process.kill()
        end = time.monotonic() + 60
        while claim._start_of(process.pid):
            assert time.monotonic() < end
            time.sleep(0.01)
        if how == "ended":
            process.wait()
    left(tmp_path, **known)
    with claimed(config_for(tmp_path), context()):
        assert Claim.of((tmp_path / NAME).read_text()).pid == os.getpid()
    assert not list(tmp_path.rglob(f"{NAME}*"))


@pytest.mark.parametrize(("job", "restarts", "gone"), [("7", 2, True), ("7", 1, False), ("7", 0, False), ("8", 2, False)])
def test_an_earlier_start_of_a_slurm_job_is_over(
    job: str, restarts: int, gone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Wherever it was; another job, or another step of the same start, may not be."""
    watched: list[Path] = []
    monkeypatch.setattr(claim, "_beats", lambda path, text: bool(watched.append(path)))
    left(tmp_path, slurm_job="7", slurm_restarts=1)
    with claimed(config_for(tmp_path), context(slurm_job=job, slurm_restarts=str(restarts))):
        pass
    assert bool(watched) != gone


@pytest.mark.parametrize("text", [None, "", '{"host": "node07", "pl'])
def test_a_run_of_another_machine_that_is_silent_is_gone(
    text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    """As is what was cut off when it was written."""
    monkeypatch.setattr(claim, "BEAT_SECONDS", 0.02)
    path = left(tmp_path)
    if text is not None:
        path.write_text(text)
    with claimed(config_for(tmp_path), context()):
        assert Claim.of(path.read_text()).pid == os.getpid()
    assert "is held by process" in caplog.text
    assert "was left by a run that is gone" in caplog.text


def test_a_run_of_another_machine_that_beats_is_at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "BEAT_SECONDS", 0.05)
    path, over = left(tmp_path), threading.Event()

    def beat() -> None:
        while not over.wait(0.01):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with (
            pytest.raises(ConfigError, match="at work there: process 41 on node07, since 2026-01-02 03:04:05 UTC"),
            claimed(config_for(tmp_path), context()),
        ):
            pass
    finally:
        over.set()
        thread.join()
    assert path.exists()


def until(condition: Any) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_run_sets_its_file_s_time_and_makes_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "BEAT_SECONDS", 0.01)
    path = tmp_path / NAME
    with claimed(config_for(tmp_path), context()):
        first, text = path.stat().st_mtime_ns, path.read_text()
        until(lambda: path.stat().st_mtime_ns > first)
        path.unlink()
        until(lambda: path.exists() and path.read_text() == text)
    assert not path.exists()


def full(_: str) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("log_is_full", [False, True])
def test_a_run_whose_folder_was_taken_over_ends(
    log_is_full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It was stopped for so long that it was taken for gone; it leaves the other's file alone."""
    if log_is_full:
        log = io.StringIO()
        monkeypatch.setattr(log, "write", full)
        monkeypatch.setattr(sys, "__stderr__", log)
    monkeypatch.setattr(claim, "BEAT_SECONDS", 0.01)
    ended: list[int] = []
    with claimed(config_for(tmp_path), context(), end=ended.append):
        (tmp_path / NAME).unlink()
        until(lambda: (tmp_path / NAME).exists())
        (tmp_path / "new").mkdir()
        os.replace(left(tmp_path / "new"), tmp_path / NAME)
        until(lambda: ended)
    assert ended == [1]
    assert Claim.of((tmp_path / NAME).read_text()).host == "node07"
    assert f"error: {tmp_path} was taken over by another run, process 41 on node07" in capfd.readouterr().err or log_is_full


def test_a_file_made_in_the_place_of_one_that_is_removed_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs have found the same one to be of a run that is gone, and the other was first."""
    path, rename = left(tmp_path), os.rename
    gone = path.read_text()

    def late(source: Path, target: Path) -> None:
        path.write_text("the other's")
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    claim._remove(path, gone)
    assert path.read_text() == "the other's"
    claim._remove(path, gone)
    assert [file.name for file in tmp_path.iterdir()] == [NAME]


def test_of_many_that_start_at_once_one_runs(tmp_path: Path) -> None:
    """In a folder that a run has left which is gone."""
    config, start, won, lost = config_for(tmp_path), threading.Barrier(6), [], []
    left(tmp_path, host=socket.gethostname(), place=claim._place(), pid=os.getpid(), started="1")

    def one() -> None:
        start.wait()
        try:
            with claimed(config, context()):
                won.append(1)
                until(lambda: len(won) + len(lost) == 6)
        except ConfigError as error:
            lost.append(error)

    threads = [threading.Thread(target=one) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (len(won), len(lost)) == (1, 5)


@pytest.mark.ranks
def test_a_second_run_is_refused_and_one_after_kill_9_is_not(tmp_path: Path) -> None:
    config = config_for(tmp_path, trainer={"train_samples": 16})
    with run_in_a_process(tmp_path) as process:
        before = (tmp_path / "config.yaml").read_text()
        with pytest.raises(ConfigError, match=rf"run\.dir = .*another run is at work there: process {process.pid} on"):
            train(config)
        other = config_for(tmp_path / "other", checkpoint={"dir": str(tmp_path / "checkpoints")})
        with pytest.raises(ConfigError, match=r"checkpoint\.dir = .*another run is at work there"):
            train(other)
        assert (tmp_path / "config.yaml").read_text() == before
        process.kill()
        process.join()
    assert (tmp_path / NAME).exists()
    again = multiprocessing.get_context("fork").Process(target=train, args=(config,))
    again.start()
    again.join(120)
    assert again.exitcode == 0
    assert max(losses(tmp_path)) == 4
    assert not list(tmp_path.rglob(f"{NAME}*"))


@pytest.mark.parametrize(
    ("variable", "launcher"), [("SLURM_STEP_NUM_TASKS", "srun"), ("OMPI_COMM_WORLD_SIZE", "mpirun"), ("PMI_SIZE", "mpiexec")]
)
def test_processes_that_do_not_know_of_one_another_are_refused(
    variable: str, launcher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """One alone is let in, as is a job's own script, and what torchrun started."""
    config = config_for(tmp_path / "run")
    for name in ("RANK", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv(variable, "2")
    with (
        pytest.raises(ConfigError, match=rf"{launcher} started 2 processes \({variable}\).*launch/torchrun\.sh, once on each node"),
        claimed(config, context()),
    ):
        pass
    assert not (tmp_path / "run").exists()
    for name, value in ((variable, "1"), (variable, "2"), ("RANK", "0")):
        monkeypatch.setenv(name, value)
        if (os.environ[variable], "RANK" in os.environ) != ("2", False):
            with claimed(config, context()):
                pass
