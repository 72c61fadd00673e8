"""launch/torchrun.sh and launch/slurm: what a signal does, on one node and on two of a SLURM cluster that lives in a folder.

The cluster needs slurmctld, slurmd and slurm-client (Debian, Ubuntu: apt-get install slurmctld slurmd slurm-client) and root.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_torchrun import MODEL, RUN, run

from megatron_mamba.train.metrics import read_records

ROOT = Path(__file__).resolve().parents[2]
STEPS = 60
SETTINGS = [*MODEL, *RUN, "checkpoint.interval=1000", f"trainer.train_samples={4 * STEPS}", "trainer.device=cpu", "parallel=tp2",
            "recompute=selective"]  # fmt: skip
SLURM_CONF = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
KillWait=5
ReturnToService=2
SchedulerParameters=sched_interval=1
NodeName=n[1-2] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=2 RealMemory=1000
PartitionName=main Nodes=ALL Default=YES
"""


PATIENCE = 600
"""Seconds to wait for anything: how long it takes a busy machine is not what is tested."""


def until(condition: Callable[[], object], what: str, failed: Callable[[], str]) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"no {what} after {PATIENCE} s; {failed()}"
        time.sleep(0.05)


def records(folder: Path, kind: str) -> list[dict]:
    return [record for record in read_records(folder / "metrics.jsonl") if record["kind"] == kind]


def losses(folder: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in records(folder, "train")}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of the run on one rank, which nothing interrupts."""
    return run(tmp_path_factory.mktemp("alone") / "run", 1, "cpu", f"trainer.train_samples={4 * STEPS}")


def environment(**others: str) -> dict[str, str]:
    """What the scripts run with: this interpreter, two processes a node."""
    return os.environ | {"PYTHON": sys.executable, "NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1"} | others


def test_torchrun_saves_and_ends_well_when_told(tmp_path: Path, alone: dict[int, float]) -> None:
    """Two ranks, told to end, and then one that goes on: the losses are those of one rank that nothing interrupted."""
    command = [ROOT / "launch/torchrun.sh", *SETTINGS, f"run.dir={tmp_path}"]
    with (tmp_path / "output").open("w") as output:
        started = subprocess.Popen(command, env=environment(), stdout=output, stderr=subprocess.STDOUT)
        until(lambda: len(losses(tmp_path)) >= 3, "third step", (tmp_path / "output").read_text)
        started.send_signal(signal.SIGTERM)
        assert started.wait(PATIENCE) == 0, (tmp_path / "output").read_text()
    stopped = max(losses(tmp_path))
    assert 3 <= stopped < STEPS
    (start, _) = records(tmp_path, "event")
    of_job = {name: value for name, value in start["job"].items() if not name.startswith("slurm_")}
    assert of_job == {"host": socket.gethostname(), "torchrun_run": "29500", "torchrun_restarts": "0"}
    assert sorted(path.name for path in (tmp_path / "logs").glob("*/attempt_0/*/stdout.log")) == ["stdout.log"] * 2
    assert run(tmp_path, 1, "cpu", f"trainer.train_samples={4 * STEPS}") == pytest.approx(alone, rel=1e-10)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"NNODES": "2"}, "NNODES=2 needs HEAD=HOST"),
        ({"NPROC_PER_NODE": "many"}, "NPROC_PER_NODE=many is not a positive number"),
        ({"MAX_RESTARTS": "-1"}, "MAX_RESTARTS=-1 is not a number"),
        ({"PYTHON": "/no/python"}, "/no/python has no torch or no megatron_mamba"),
    ],
)
def test_torchrun_refuses(settings: dict[str, str], said: str, tmp_path: Path) -> None:
    command = [ROOT / "launch/torchrun.sh", "model=hybrid_tiny", f"run.dir={tmp_path}/run"]
    done = subprocess.run(command, env=environment(**settings), capture_output=True, text=True)
    assert done.returncode == 2
    assert said in done.stderr
    assert list(tmp_path.iterdir()) == []


def free_ports(count: int) -> list[int]:
    """Consecutive ports that nothing listens on."""
    for first in range(20_000 + os.getpid() % 10_000, 32_000, count):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for i, one in enumerate(sockets):
                one.bind(("127.0.0.1", first + i))
            return list(range(first, first + count))
        except OSError:
            continue
        finally:
            for one in sockets:
                one.close()
    raise OSError("no free ports")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """A cluster of two nodes on this machine; runs a command of SLURM's and returns what it prints."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("slurmctld", "slurmd", "sbatch"))):
        pytest.skip("needs slurmctld, slurmd and slurm-client, and root")
    folder = tmp_path_factory.mktemp("slurm")
    port, first, last = free_ports(3)
    (folder / "state").mkdir()
    (folder / "slurm.conf").write_text(SLURM_CONF.format(port=port, first=first, last=last, folder=folder))
    outside = {name: value for name, value in environment().items() if not name.startswith("SLURM_")}
    inside = outside | {"SLURM_CONF": str(folder / "slurm.conf")}
    daemons = []
    for name, *command in (("ctld", "slurmctld", "-D"), ("n1", "slurmd", "-D", "-N", "n1"), ("n2", "slurmd", "-D", "-N", "n2")):
        with (folder / f"{name}.log").open("w") as log:
            daemons.append(subprocess.Popen(command, env=inside, stdout=log, stderr=log))

    def call(*command: str) -> str:
        done = subprocess.run(command, env=inside, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout.strip()

    def idle() -> bool:
        done = subprocess.run(["sinfo", "--noheader", "--format=%T %D"], env=inside, capture_output=True, text=True)
        return done.stdout.strip() == "idle 2"

    try:
        until(idle, "idle nodes", lambda: "".join(log.read_text() for log in folder.glob("*.log")))
        yield call
    finally:
        subprocess.run(["scancel", "--user=root"], env=inside, check=False)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(PATIENCE)


def test_slurm_job_is_preempted_requeued_and_finishes(
    slurm: Callable[..., str], tmp_path: Path, alone: dict[int, float]
) -> None:  # fmt: skip
    """Two nodes, tp2 x dp2: the losses are those of one rank that nothing interrupted."""
    options = ["--parsable", "--nodes=2", f"--chdir={ROOT}", f"--output={tmp_path}/log"]
    job = slurm("sbatch", *options, str(ROOT / "launch/slurm/pretrain.sbatch"), *SETTINGS, f"run.dir={tmp_path}/run")

    def state() -> str:
        return slurm("scontrol", "--oneliner", "show", "job", job).split("JobState=")[1].split()[0]

    def log() -> str:
        return f"{state()}: {(tmp_path / 'log').read_text() if (tmp_path / 'log').exists() else 'no log'}"

    until(lambda: len(losses(tmp_path / "run")) >= 3, "third step", log)
    slurm("scancel", "--batch", "--signal=USR1", job)
    until(lambda: state() == "PENDING", "return to the queue", log)
    stopped = max(losses(tmp_path / "run"))
    assert 3 <= stopped < STEPS
    # It would wait for two minutes; before three seconds the nodes take it for the one that has just ended.
    time.sleep(3)
    slurm("scontrol", "update", f"jobid={job}", "StartTime=now")
    until(lambda: state() == "COMPLETED", "end of the job", log)
    assert losses(tmp_path / "run") == pytest.approx(alone, rel=1e-10)
    start, told, resumed = records(tmp_path / "run", "event")
    assert (start["event"], resumed["event"], resumed["step"]) == ("start", "resume", stopped)
    assert told["message"].startswith(f"stopping at step {stopped} on ")
    of_job = {name: value for name, value in resumed["job"].items() if name.startswith("slurm_")}
    assert of_job == {"slurm_job": job, "slurm_nodes": "n[1-2]", "slurm_restarts": "1"}
    assert f"job {job} goes back to the queue" in (tmp_path / "log").read_text()


def test_one_task_of_an_array_goes_back_alone(slurm: Callable[..., str], tmp_path: Path) -> None:
    """compare.sbatch, two of its tasks on a node each: the last one, which has the array's own number, is told to; the losses of
    both, which train the same here, are equal."""
    small = [*SETTINGS, f"trainer.train_samples={8 * STEPS}", "trainer.train_tokens=null", "optim.schedule.warmup_samples=0",
             "parallel=default"]  # fmt: skip
    options = ["--parsable", "--array=0-1", f"--chdir={ROOT}", f"--output={tmp_path}/log-%a", "--export=ALL,NPROC_PER_NODE=1"]
    script = str(ROOT / "launch/slurm/compare.sbatch")
    job = slurm("sbatch", *options, script, *small, f"run.dir={tmp_path}/${{oc.env:SLURM_ARRAY_TASK_ID}}")

    def known(task: int, field: str) -> str:
        shown = slurm("scontrol", "--oneliner", "show", "job", f"{job}_{task}")
        return dict(pair.split("=", 1) for pair in shown.split() if "=" in pair)[field]

    def log() -> str:
        return "\n".join(f"{file.name}: {file.read_text()}" for file in sorted(tmp_path.glob("log-*")))

    def started() -> bool:
        assert "ended with exit code" not in log(), log()
        return all(len(losses(tmp_path / str(task))) >= 3 for task in range(2))

    until(started, "third step", log)
    assert {known(task, "NodeList") for task in range(2)} == {"n1", "n2"}
    assert known(1, "JobId") == job
    slurm("scancel", "--batch", "--signal=USR1", f"{job}_1")
    until(lambda: known(1, "JobState") == "PENDING", "return to the queue", log)
    time.sleep(3)
    slurm("scontrol", "update", f"jobid={job}_1", "StartTime=now")
    until(lambda: [known(task, "JobState") for task in range(2)] == ["COMPLETED"] * 2, "end of the tasks", log)
    assert [known(task, "Restarts") for task in range(2)] == ["0", "1"]
    assert [record["event"] for record in records(tmp_path / "0", "event")] == ["start"]
    start, told, resumed = records(tmp_path / "1", "event")
    assert (start["event"], resumed["event"]) == ("start", "resume")
    assert told["message"].startswith(f"stopping at step {resumed['step']} on ")
    assert (resumed["job"]["slurm_array_job"], resumed["job"]["slurm_array_task"]) == (job, "1")
    assert "goes back" not in (tmp_path / "log-0").read_text()
    assert f"job {job}_1 goes back to the queue" in (tmp_path / "log-1").read_text()
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "0"), rel=1e-10)
    assert len(losses(tmp_path / "0")) == 2 * STEPS
