"""launch/slurm under a SLURM that only writes down what it is told: what goes back to the queue, and when."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCONTROL = """#!/usr/bin/env bash
echo "$@" >>told
[[ $1 != show ]] || echo n1
"""
SRUN = """#!/usr/bin/env bash
trap '[[ -z "@FINISHED@" ]] || touch "$FINISHED_FILE"; exit @CODE@' USR1
echo "$@" >>srun
touch running
while :; do sleep 0.05; done
"""
ARRAY = {"SLURM_JOB_ID": "70", "SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3"}


@pytest.mark.parametrize(
    ("script", "job", "number", "code", "finished", "requeued"),
    [
        ("pretrain", {"SLURM_JOB_ID": "41"}, signal.SIGUSR1, 0, "", "41"),
        ("pretrain", {"SLURM_JOB_ID": "41"}, signal.SIGUSR1, 1, "", None),
        ("pretrain", {"SLURM_JOB_ID": "41"}, signal.SIGTERM, 0, "", None),
        ("pretrain", {"SLURM_JOB_ID": "41", "SLURM_RESTART_COUNT": "2"}, signal.SIGUSR1, 0, "finished", None),
        # The last task of an array has the array's own number: `scontrol requeue 70` would be all of them.
        ("compare", ARRAY, signal.SIGUSR1, 0, "", "70_3"),
        ("compare", ARRAY, signal.SIGUSR1, 3, "", None),
        ("compare", ARRAY, signal.SIGUSR1, 0, "finished", None),
    ],
)
def test_what_goes_back_to_the_queue(
    script: str, job: dict[str, str], number: signal.Signals, code: int, finished: str, requeued: str | None, tmp_path: Path
) -> None:
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN.replace("@CODE@", str(code)).replace("@FINISHED@", finished))):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    given = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1"}
    outside = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    command = ["bash", f"launch/slurm/{script}.sbatch", "data.path=x"]
    process = subprocess.Popen(command, cwd=tmp_path, env=outside | given | job, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    end = time.monotonic() + 60.0
    while not (tmp_path / "running").exists():
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == code, printed
    told = [line for line in (tmp_path / "told").read_text().splitlines() if line.startswith("requeue")]
    assert told == ([] if requeued is None else [f"requeue {requeued}"])
    assert (b"exit code" in printed) == (code != 0)
    assert not list(tmp_path.glob(".finished*"))
    if script == "compare":
        assert "model=transformer_8b" in (tmp_path / "srun").read_text()
