"""tools/bench_checks.py: times of both kinds of runs, and what it refuses."""

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


@pytest.mark.parametrize("arguments", [["--steps", "99"], ["--interval", "0"], ["--processes", "0"]])
def test_arguments_that_cannot_work(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_checks.main(arguments) == 2
    assert f"error: {arguments[0]} = " in capsys.readouterr().err


def test_settings_that_cannot_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_checks.main(["model=none", "--steps", "4", "--interval", "2", "--processes", "1"]) == 2
    assert "error: SETTING = 'model=none" in capsys.readouterr().err
