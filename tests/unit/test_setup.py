"""launch/setup.sh on machines that are not here: one with a GPU, whose torch is from PyPI, and one whose driver is too old."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PYTHON = """#!/usr/bin/env bash
here=$(dirname "${BASH_SOURCE[0]}")/../..
if [[ "$1 $2" == "-m pip" ]]; then echo "$@" >>"$here/pip.log"; exit 0; fi
PYTHONPATH=$here/packages exec @PYTHON@ "$@"
"""
NVIDIA_SMI = """#!/usr/bin/env bash
[[ $1 == -L ]] && echo "GPU 0" || echo 550.54.15
"""
TORCH = """
__version__ = "2.15.0+cu132"

class version:
    cuda = "13.2"

class cuda:
    is_available = staticmethod(lambda: @GPU@)
"""


@pytest.fixture
def machine(tmp_path):
    """A checkout whose .venv has a Python that only writes down what pip is asked for, and a torch as PyPI's wheels have it."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)

    def script(path, text):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    script(tmp_path / ".venv/bin/python", PYTHON.replace("@PYTHON@", sys.executable))
    script(tmp_path / "bin/nvidia-smi", NVIDIA_SMI)
    metadata = tmp_path / "packages/torch-2.15.0.dist-info/METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.15.0\n")

    def run(sees_gpu, **environment):
        script(tmp_path / "packages/torch/__init__.py", TORCH.replace("@GPU@", str(sees_gpu)))
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        command = [str(tmp_path / "launch/setup.sh"), "export,dev"]
        return subprocess.run(command, env=os.environ | {"PATH": path} | environment, capture_output=True, text=True, check=False)

    run.folder = tmp_path
    return run


def pip_was_asked_for(machine):
    log = machine.folder / "pip.log"
    return log.read_text().splitlines() if log.exists() else []


def test_the_pin_is_a_version_that_pip_can_meet(machine):
    """torch.__version__ is 2.15.0+cu132, which no wheel on PyPI is called."""
    result = machine(sees_gpu=True)
    assert result.returncode == 0, result.stderr
    assert (machine.folder / ".venv/constraints.txt").read_text() == "torch==2.15.0\n"
    (asked,) = pip_was_asked_for(machine)
    assert asked.endswith("-c .venv/constraints.txt -e .[export,dev]")
    again = machine(sees_gpu=True)
    assert "is up to date" in again.stdout
    assert len(pip_was_asked_for(machine)) == 1


def test_a_driver_that_is_too_old_is_named(machine):
    result = machine(sees_gpu=False)
    assert result.returncode == 1
    for part in ("torch 2.15.0+cu132, built for CUDA 13.2, sees no GPU", "550.54.15", "TORCH='torch>=2.11 --index", "export,dev"):
        assert part in result.stderr, result.stderr
    assert pip_was_asked_for(machine) == []  # No project is installed around a torch that is of no use.
    assert not list((machine.folder / ".venv").glob(".installed*"))


def test_another_torch_is_installed_when_asked_for(machine):
    result = machine(sees_gpu=True, TORCH="torch==2.11.0 --index-url https://example.org/cu126")
    assert result.returncode == 0, result.stderr
    first, second = pip_was_asked_for(machine)
    assert first.endswith(" torch==2.11.0 --index-url https://example.org/cu126")
    assert second.endswith("-e .[export,dev]")
