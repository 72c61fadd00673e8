"""What breaks on purpose under torchrun: how it ends, what is shown of it, and that nothing that was saved is lost.

A rank killed and a rank stopped, and with ``--slow`` all, on four ranks, ten times each, at random moments. On GPUs where
there are several. What each cost is shown at the end: seconds until all processes had ended (or the fault was noticed), steps lost,
and how far losses are from a clean run's.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from test_launch import records, until
from test_torchrun import MODEL, RUN, run

from megatron_mamba.checkpoint import verify

ROOT = Path(__file__).resolve().parents[2]
STEPS = 30
GPUS = torch.cuda.device_count()
DEVICE = "cuda" if GPUS > 1 else "cpu"
pytestmark = pytest.mark.xdist_group("faults")  # They share what an undisturbed run gives.
FAULTY = str(Path(__file__).with_name("faulty.py"))


class Job:
    """Training of STEPS steps through launch/torchrun.sh, or with a fault of the program under torchrun, on DEVICE.

    `within` is a command that runs another somewhere, `variables` are more of the script's settings.
    """

    def __init__(
        self, folder: Path, ranks: int, *settings: str, restarts: int = 0, fault: str = "", within: Sequence[str] = (),
        **variables: str,
    ) -> None:  # fmt: skip
        self.folder, self.output = folder, folder.with_suffix(f".{variables.get('NODE_RANK', 0)}.txt")
        self.restarts = restarts
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", FAULTY]
        script = [str(ROOT / "launch/torchrun.sh")]
        arguments = [*MODEL, *RUN, f"trainer.train_samples={4 * STEPS}", f"trainer.device={DEVICE}", "parallel.tp=2",
                     f"run.dir={folder}", "trainer.micro_batch_size=1", *settings]  # fmt: skip
        environment = os.environ | variables | {
            "NPROC_PER_NODE": str(ranks), "MAX_RESTARTS": str(restarts), "OMP_NUM_THREADS": "1", "PYTHON": sys.executable,
            "FAULT": fault,
        }  # fmt: skip
        with self.output.open("w") as output:
            command = [*within, *(torchrun if fault else script), *arguments]
            self.process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)

    def workers(self) -> dict[int, int]:
        """The process of each rank."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if f"run.dir={self.folder}".encode() not in (process / "cmdline").read_bytes().split(b"\0"):
                    continue
                rank = re.search(rb"(?:^|\0)RANK=(\d+)\0", (process / "environ").read_bytes())
            except OSError:  # It has ended.
                continue
            if rank is not None:
                found[int(rank[1])] = int(process.name)
        return found

    def steps(self) -> int:
        return max(self.losses(), default=0)

    def wait_for_step(self, step: int) -> None:
        until(lambda: self.steps() >= step or self.process.poll() is not None, f"step {step}", self.shown)
        assert self.process.poll() is None, self.shown()

    def ends(self) -> None:
        until(lambda: self.process.poll() is not None, "end", self.shown)

    def ends_after(self, fault: Callable[[dict[int, int]], object]) -> float:
        """Seconds from a fault, which is given the process of each rank, until all of this start have ended."""
        workers = self.workers()
        begin = time.monotonic()
        fault(workers)
        until(lambda: not any(map(_lives, workers.values())), "end of the workers", self.shown)
        if not self.restarts:
            self.ends()
        return time.monotonic() - begin

    def since_fault(self) -> float:
        """Seconds since the program's own fault."""
        at = re.search(r"fault at ([\d.]+)", self.output.read_text())
        assert at is not None, self.shown()
        return time.time() - float(at[1])

    def shown(self) -> str:
        return self.output.read_text()[-6000:]

    def losses(self) -> dict[int, float]:
        return {line["step"]: line["loss"] for line in records(self.folder, "train")}

    def saved(self) -> list[int]:
        """Steps of the checkpoints, in order."""
        return sorted(int(path.name.removeprefix("step_")) for path in (self.folder / "checkpoints").glob("step_*"))


def _lives(process: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    return False


class Cost:
    """What a fault costs over its runs: seconds to its end, steps lost, differences of losses from those of a clean run."""

    def __init__(self, clean: dict[int, float]) -> None:
        self.clean = clean
        self.figures: dict[str, list[float]] = {"seconds": [], "lost": [], "differences": []}

    def add(self, job: Job, seconds: float, reached: int) -> None:
        """Note a run that has gone on to its end after a fault in the step after `reached`."""
        job.ends()
        assert job.process.returncode == 0, job.shown()
        losses = job.losses()
        assert losses == pytest.approx(self.clean, rel=1e-10)
        starts = [line["step"] for line in records(job.folder, "event") if "event" in line]
        self.figures["seconds"].append(seconds)
        self.figures["lost"].append(reached - starts[-1] if len(starts) > 1 else 0)
        self.figures["differences"].append(max(abs(losses[step] / loss - 1) for step, loss in self.clean.items()))


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of a run that nothing disturbs, on one rank."""
    return run(tmp_path_factory.mktemp("clean") / "run", 1, DEVICE, f"trainer.train_samples={4 * STEPS}")


@pytest.fixture
def cost(clean: dict[int, float], request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Cost:
    cost = Cost(clean)
    record_property("fault", {request.node.name.removeprefix("test_").replace("_", " "): cost.figures})
    return cost


def root_cause(shown: str) -> str:
    return shown.rpartition("Root Cause")[2]


@pytest.fixture
def ranks(slow: bool) -> int:
    return 4 if slow and (DEVICE == "cpu" or GPUS >= 4) else 2


@pytest.fixture
def times(slow: bool) -> int:
    return 10 if slow else 1


def test_a_killed_rank_is_started_again_from_the_last_checkpoint(tmp_path: Path, ranks: int, times: int, cost: Cost) -> None:
    for i in range(times):
        job = Job(tmp_path / f"run{i}", ranks, restarts=1)
        job.wait_for_step(random.Random(i).randint(4, STEPS // 2))
        seconds = job.ends_after(lambda workers: os.kill(workers[ranks - 1], signal.SIGKILL))
        cost.add(job, seconds, job.steps())
        resumed = [line for line in records(job.folder, "event") if line.get("event") == "resume"]
        assert [line["job"]["torchrun_restarts"] for line in resumed] == ["1"]


def test_a_stopped_rank_is_named_and_ended(tmp_path: Path, ranks: int, times: int, cost: Cost) -> None:
    for i in range(times):
        settings = (tmp_path / f"run{i}", ranks, "trainer.heartbeat_seconds=4")
        job = Job(*settings, restarts=i % 2)
        job.wait_for_step(random.Random(i).randint(4, STEPS // 2))
        seconds, reached = job.ends_after(lambda workers: os.kill(workers[ranks - 1], signal.SIGSTOP)), job.steps()
        if not i % 2:
            assert job.process.returncode == 1
            assert "Stacks of its threads" in job.output.read_text()
            cause = root_cause(job.shown())
            assert f"rank {ranks - 1} has not been heard of for" in cause
            assert f"rank {ranks - 1}: no answer" in cause
            job = Job(*settings)
        cost.add(job, seconds, reached)


@pytest.mark.slow
def test_the_first_error_is_the_one_that_is_shown(tmp_path: Path, ranks: int, times: int, cost: Cost) -> None:
    for i in range(times):
        step = random.Random(i).randint(2, STEPS // 2)
        job = Job(tmp_path / f"run{i}", ranks, fault=f"exception {ranks - 1} {step}")
        job.ends()
        seconds = job.since_fault()
        assert not job.workers()
        assert job.process.returncode == 1
        cause = root_cause(job.shown())
        assert f"rank      : {ranks - 1} (" in cause
        assert "faulty.py" in cause
        assert "ValueError: a fault on purpose" in cause
        assert job.steps() == step
        cost.add(Job(job.folder, ranks), seconds, step)


@pytest.mark.slow
def test_a_weight_that_one_rank_has_otherwise_is_never_saved(tmp_path: Path, ranks: int, times: int, cost: Cost) -> None:
    for i in range(times):
        step = random.Random(i).randint(2, STEPS // 2)
        job = Job(tmp_path / f"run{i}", ranks, "checkpoint.interval=4", fault=f"flip {ranks - 1} {step}")
        job.ends()
        seconds = job.since_fault()
        assert not job.workers()
        assert job.process.returncode == 1
        assert "TrainingError" in root_cause(job.shown())
        last = 4 * (step // 4)
        assert re.search(rf"final_norm.weight \(.*rank {ranks - 1} on ", job.output.read_text())
        assert f"They did not at step {last}. Nothing was saved" in job.output.read_text()
        assert (job.saved() or [0])[-1] == last
        cost.add(Job(job.folder, ranks, "checkpoint.interval=4"), seconds, job.steps())


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_once_costs_nothing(tmp_path: Path, ranks: int, times: int, cost: Cost) -> None:
    """The step is run again, which tells that the fault was a machine's."""
    for i in range(times):
        step = random.Random(i).randint(2, STEPS // 2)
        job = Job(tmp_path / f"run{i}", ranks, fault=f"nan {ranks - 1} {step}")
        said = f"step {step + 1} was not finite"
        until(lambda job=job, said=said: said in job.output.read_text(), said, job.shown)  # type: ignore[misc]
        cost.add(job, job.since_fault(), step)
        lines = records(job.folder, "train")
        assert [line["transient_faults"] for line in lines] == [int(line["step"] > step) for line in lines]
        assert lines[-1]["skipped_steps"] == 0


@pytest.mark.slow
def test_a_launcher_told_to_end_has_all_saved(tmp_path: Path, ranks: int, times: int, cost: Cost) -> None:
    for i in range(times):
        job = Job(tmp_path / f"run{i}", ranks)
        job.wait_for_step(random.Random(i).randint(1, STEPS // 2))
        seconds = job.ends_after(lambda _, job=job: job.process.send_signal(signal.SIGTERM))  # type: ignore[misc]
        assert job.process.returncode == 0, job.shown()
        reached = job.steps()
        assert job.saved()[-1] == reached < STEPS
        cost.add(Job(job.folder, ranks), seconds, reached)
    assert cost.figures["lost"] == [0] * times


@pytest.fixture
def disks() -> Iterator[Callable[[Path], Path]]:
    """Makes a folder a disk of its own, of 16 MiB."""
    mounted: list[Path] = []

    def disk(folder: Path) -> Path:
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", folder], capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"cannot mount a disk: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield disk
    for folder in mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path, left: int) -> None:
    """Let a file take all of a disk but `left` bytes."""
    with (disk / "others").open("wb", buffering=0) as file:
        while (free := os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - left) > 0:
            with suppress(OSError):  # A save took what was free.
                file.write(bytes(free))


@pytest.mark.slow
def test_a_full_disk_is_named_and_nothing_saved_is_lost(
    tmp_path: Path, ranks: int, times: int, cost: Cost, disks: Callable[[Path], Path]
) -> None:
    """The run's own, with the logs, and with less space than a checkpoint needs: none at all in the first run."""
    for i in range(times):
        disk, chance = disks(tmp_path / f"disk{i}"), random.Random(i)
        job = Job(disk / "run", ranks)
        job.wait_for_step(chance.randint(4, STEPS // 2))
        until(job.saved, "checkpoint", job.shown)
        whole = job.saved()[-1]
        size = sum(file.stat().st_size for file in (job.folder / f"checkpoints/step_{whole:08d}").iterdir())
        left = chance.randrange(size) if i else 0
        seconds = job.ends_after(lambda _, disk=disk, left=left: fill(disk, left))  # type: ignore[misc]
        assert job.process.returncode == 1
        assert "No space left on device" in job.output.read_text()
        assert job.saved()[-1] >= whole
        for step in job.saved():
            verify(job.folder / f"checkpoints/step_{step:08d}")
        reached = job.steps()
        (disk / "others").unlink()
        cost.add(Job(job.folder, ranks), seconds, reached)


@pytest.mark.slow
def test_a_truncated_checkpoint_is_refused_and_named(tmp_path: Path, ranks: int, times: int, cost: Cost) -> None:
    """With checkpoint.on_damage=previous the run goes on from the one before."""
    for i in range(times):
        chance = random.Random(i)
        job = Job(tmp_path / f"run{i}", ranks)
        job.wait_for_step(chance.randint(4, STEPS // 2))
        job.process.send_signal(signal.SIGTERM)
        job.ends()
        *_, before, newest = job.saved()
        assert newest == job.steps()
        file = chance.choice(sorted((job.folder / f"checkpoints/step_{newest:08d}").iterdir()))
        os.truncate(file, chance.randrange(file.stat().st_size))
        begin = time.monotonic()
        refused = Job(job.folder, ranks)
        refused.ends()
        seconds = time.monotonic() - begin
        assert refused.process.returncode == 1
        assert not refused.workers()
        assert re.search(rf"step_{newest:08d} is damaged: .*file {re.escape(file.name)}", root_cause(refused.shown()))
        assert job.saved()[-2:] == [before, newest]
        cost.add(Job(job.folder, ranks, "checkpoint.on_damage=previous"), seconds, newest)
        assert cost.figures["lost"][-1] == newest - before


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[list[str]]]:
    """Two nodes of this machine, each with a name and a network of its own and a cable between; what runs a command in each."""
    if not all(map(shutil.which, ("ip", "unshare", "nsenter", "mount"))):
        pytest.skip("needs ip, unshare, nsenter and mount")
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n" + "".join(f"10.77.0.{i + 1} node{i}\n" for i in range(2)))
    unshare = ["unshare", "--net", "--uts", "--mount", "sh", "-c", "echo && exec sleep infinity"]
    holders = [subprocess.Popen(unshare, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(2)]
    try:
        for holder in holders:
            assert holder.stdout is not None
            if (said := holder.stdout.readline()) != b"\n":
                pytest.skip(f"no namespaces: {said.decode().strip()}")
        ends = [f"cable netns {holder.pid}" for holder in holders]
        done = subprocess.run(f"ip link add {ends[0]} type veth peer name {ends[1]}".split(), capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"no cable between namespaces: {done.stderr.strip()}")
        enter = [["nsenter", "--net", "--uts", "--mount", f"--target={holder.pid}"] for holder in holders]
        for i, node in enumerate(enter):
            address = f"ip address add 10.77.0.{i + 1}/24 dev cable && ip link set lo up && ip link set cable up"
            subprocess.run([*node, "sh", "-c", f"mount --bind {hosts} /etc/hosts && hostname node{i} && {address}"], check=True)
        yield enter
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()


def start_on(nodes: list[list[str]], folder: Path, restarts: int = 0) -> list[Job]:
    settings = ("trainer.heartbeat_seconds=4", "trainer.device=cpu")
    variables = {"NNODES": "2", "HEAD": "node0", "STUCK_SECONDS": "5"}
    return [
        Job(folder, 2, *settings, restarts=restarts, within=node, **variables, NODE_RANK=f"{i}") for i, node in enumerate(nodes)
    ]


@pytest.mark.slow
def test_a_cut_network_ends_both_sides(tmp_path: Path, times: int, cost: Cost, nodes: list[list[str]]) -> None:
    """Two nodes of two ranks: at one of them, in turn, the cable is pulled."""
    for i in range(times):
        jobs = start_on(nodes, tmp_path / f"run{i}")
        jobs[0].wait_for_step(random.Random(i).randint(4, STEPS // 2))
        cut = [*nodes[i % 2], "ip", "link", "set", "cable"]
        begin = time.monotonic()
        jobs[0].ends_after(lambda _, cut=cut: subprocess.run([*cut, "down"], check=True))  # type: ignore[misc]
        jobs[1].ends()
        seconds, reached = time.monotonic() - begin, jobs[0].steps()
        for job in jobs:
            assert job.process.returncode != 0
            assert re.search("has not (been heard of|answered) for", job.output.read_text()), job.shown()
        subprocess.run([*cut, "up"], check=True)
        jobs = start_on(nodes, tmp_path / f"run{i}")
        jobs[1].ends()
        cost.add(jobs[0], seconds, reached)


@pytest.mark.slow
def test_a_node_that_is_cut_off_does_not_wait_to_start_again(tmp_path: Path, nodes: list[list[str]]) -> None:
    """A rank of it failed just before: its torchrun has ended the others and asks the head, of which it hears nothing."""
    head, other = start_on(nodes, tmp_path / "run", restarts=1)
    head.wait_for_step(4)
    os.kill(head.workers()[3], signal.SIGKILL)
    subprocess.run([*nodes[1], "ip", "link", "set", "cable", "down"], check=True)
    other.ends()
    assert other.process.returncode != 0
    assert "node0 cannot be reached" in other.shown()
    assert head.process.poll() is None  # For the other node may be back within ten minutes.
    head.process.send_signal(signal.SIGINT)
    head.ends()
