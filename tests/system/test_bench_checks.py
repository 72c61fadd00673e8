"""tools/bench_checks.py: times of both kinds of runs, and what it refuses."""

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

import bench_checks


def left_behind() -> bool:
    """Whether a rank of the tool still trains."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if bench_checks.ENDLESS[1].encode() in (process / "cmdline").read_bytes():
                return True
    return False


@pytest.mark.slow
def test_both_kinds_are_timed(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_checks.main(["--steps", "4", "--interval", "2", "--repeats", "1", *bench_checks.TINY, "trainer.device=cpu"]) == 0
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if "all checks" in line or "none │" in line]
    assert [float(row[3]) > 0.0 for row in rows] == [True, True]
    until = time.monotonic() + 30.0
    while left_behind() and time.monotonic() < until:
        time.sleep(0.1)
    assert not left_behind()


@pytest.mark.slow
def test_each_check_is_timed() -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", bench_checks.__file__]
    done = subprocess.run(
        [*launch, "--steps", "20", *bench_checks.TINY, "trainer.device=cpu"],
        env=os.environ | {"COLUMNS": "160"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {cells[1].strip(): cells for line in done.stdout.splitlines() if len(cells := line.split("│")) == 8}
    counted = {what: int(cells[2]) for what, cells in rows.items() if what not in ("together", "watchdog, a second")}
    # One more agreement before the first step, and one more comparison before the save at the end.
    assert counted == {
        "agreement on a step": 21, "is it a spike": 40, "comparison of replicas": 3, "look at the machines": 2
    }  # fmt: skip
    parts = [float(cells[6]) for what, cells in rows.items() if what in counted]
    assert float(rows["together"][6]) == pytest.approx(sum(parts), abs=1e-3)


@pytest.mark.parametrize("arguments", [["--steps", "99"], ["--interval", "0"], ["--processes", "0"]])
def test_arguments_that_cannot_work(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_checks.main(arguments) == 2
    assert f"error: {arguments[0]} = " in capsys.readouterr().err


def test_settings_that_cannot_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_checks.main(["model=none", "--steps", "4", "--interval", "2", "--processes", "1"]) == 2
    assert "error: SETTING = 'model=none" in capsys.readouterr().err
