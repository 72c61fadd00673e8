"""What breaks on purpose under torchrun: how it ends, what is shown of it, and that nothing that was saved is lost.

A rank killed and a rank stopped, and with ``--slow`` all, on four ranks, ten times each, at random moments.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_launch import records, until
from test_torchrun import MODEL, RUN, run

ROOT = Path(__file__).resolve().parents[2]
STEPS = 30
pytestmark = pytest.mark.xdist_group("faults")  # They share what an undisturbed run gives.
FAULTY = str(Path(__file__).with_name("faulty.py"))


class Job:
    """Training of STEPS steps through launch/torchrun.sh, or with a fault of the program under torchrun, on CPUs."""

    def __init__(self, folder: Path, ranks: int, *settings: str, restarts: int = 0, fault: str = "") -> None:
        self.folder, self.output = folder, folder.with_suffix(".txt")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", FAULTY]
        script = [str(ROOT / "launch/torchrun.sh")]
        arguments = [*MODEL, *RUN, f"trainer.train_samples={4 * STEPS}", "trainer.device=cpu", "parallel.tp=2", f"run.dir={folder}",
                     "trainer.micro_batch_size=1", *settings]  # fmt: skip
        environment = os.environ | {
            "NPROC_PER_NODE": str(ranks), "MAX_RESTARTS": str(restarts), "OMP_NUM_THREADS": "1", "PYTHON": sys.executable,
            "FAULT": fault,
        }  # fmt: skip
        with self.output.open("w") as output:
            command = [*(torchrun if fault else script), *arguments]
            self.process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)

    def worker(self, rank: int) -> int:
        """The process of a rank."""
        for process in Path("/proc").glob("[0-9]*"):
            try:
                started = f"run.dir={self.folder}".encode() in (process / "cmdline").read_bytes().split(b"\0")
                if started and f"RANK={rank}".encode() in (process / "environ").read_bytes().split(b"\0"):
                    return int(process.name)
            except OSError:  # It has ended.
                continue
        raise AssertionError(f"no rank {rank}")

    def steps(self) -> int:
        return len(records(self.folder, "train")) if (self.folder / "metrics.jsonl").exists() else 0

    def wait_for_step(self, step: int) -> None:
        until(lambda: self.steps() >= step or self.process.poll() is not None, f"step {step}", self.shown)
        assert self.process.poll() is None, self.shown()

    def ends(self) -> float:
        """Seconds until torchrun has ended."""
        begin = time.monotonic()
        until(lambda: self.process.poll() is not None, "end", self.shown)
        return time.monotonic() - begin

    def shown(self) -> str:
        return self.output.read_text()[-6000:]

    def losses(self) -> dict[int, float]:
        return {line["step"]: line["loss"] for line in records(self.folder, "train")}


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of a run that nothing disturbs, on one rank."""
    return run(tmp_path_factory.mktemp("clean") / "run", 1, "cpu", f"trainer.train_samples={4 * STEPS}")


def root_cause(shown: str) -> str:
    return shown.rpartition("Root Cause")[2]


@pytest.fixture
def ranks(slow: bool) -> int:
    return 4 if slow else 2


@pytest.fixture
def times(slow: bool) -> int:
    return 10 if slow else 1


def test_a_killed_rank_is_started_again_from_the_last_checkpoint(
    tmp_path: Path, ranks: int, times: int, clean: dict[int, float]
) -> None:
    for i in range(times):
        job = Job(tmp_path / f"run{i}", ranks, restarts=1)
        job.wait_for_step(random.Random(i).randint(4, STEPS // 2))
        os.kill(job.worker(ranks - 1), signal.SIGKILL)
        job.ends()
        assert job.process.returncode == 0, job.shown()
        assert job.losses() == pytest.approx(clean, rel=1e-10)
        resumed = [line for line in records(job.folder, "event") if line.get("event") == "resume"]
        assert [line["job"]["torchrun_restarts"] for line in resumed] == ["1"]


def test_a_stopped_rank_is_named_and_ended(tmp_path: Path, ranks: int, times: int, clean: dict[int, float]) -> None:
    for i in range(times):
        job = Job(tmp_path / f"run{i}", ranks, "trainer.heartbeat_seconds=4", restarts=i % 2)
        job.wait_for_step(random.Random(i).randint(4, STEPS // 2))
        os.kill(job.worker(ranks - 1), signal.SIGSTOP)
        job.ends()
        if i % 2:
            assert job.process.returncode == 0, job.shown()
            assert job.losses() == pytest.approx(clean, rel=1e-10)
            continue
        assert job.process.returncode == 1
        assert "Stacks of its threads" in job.output.read_text()
        cause = root_cause(job.shown())
        assert f"rank {ranks - 1} has not been heard of for" in cause
        assert f"rank {ranks - 1}: no answer" in cause


@pytest.mark.slow
def test_the_first_error_is_the_one_that_is_shown(tmp_path: Path, ranks: int, times: int) -> None:
    for i in range(times):
        step = random.Random(i).randint(2, STEPS // 2)
        job = Job(tmp_path / f"run{i}", ranks, fault=f"exception {ranks - 1} {step}")
        job.ends()
        assert job.process.returncode == 1
        cause = root_cause(job.shown())
        assert f"rank      : {ranks - 1} (" in cause
        assert "faulty.py" in cause
        assert "ValueError: a fault on purpose" in cause
        assert job.steps() == step


@pytest.mark.slow
def test_a_weight_that_one_rank_has_otherwise_is_never_saved(tmp_path: Path, ranks: int, times: int) -> None:
    for i in range(times):
        step = random.Random(i).randint(2, STEPS // 2)
        job = Job(tmp_path / f"run{i}", ranks, "checkpoint.interval=4", fault=f"flip {ranks - 1} {step}")
        job.ends()
        assert job.process.returncode == 1
        assert "TrainingError" in root_cause(job.shown())
        last = 4 * (step // 4)
        assert re.search(rf"final_norm.weight \(.*rank {ranks - 1} on ", job.output.read_text())
        assert f"They did not at step {last}. Nothing was saved" in job.output.read_text()
        saved = sorted(int(path.name.removeprefix("step_")) for path in (job.folder / "checkpoints").glob("step_*"))
        assert (saved or [0])[-1] == last


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_once_costs_nothing(
    tmp_path: Path, ranks: int, times: int, clean: dict[int, float]
) -> None:
    """The step is run again, which tells that the fault was a machine's."""
    for i in range(times):
        step = random.Random(i).randint(2, STEPS // 2)
        job = Job(tmp_path / f"run{i}", ranks, fault=f"nan {ranks - 1} {step}")
        job.ends()
        assert job.process.returncode == 0, job.shown()
        lines = records(job.folder, "train")
        assert [line["transient_faults"] for line in lines] == [int(line["step"] > step) for line in lines]
        assert lines[-1]["skipped_steps"] == 0
        assert job.losses() == pytest.approx(clean, rel=1e-10)
        assert f"step {step + 1} was not finite" in job.output.read_text()
