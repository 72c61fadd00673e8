"""Every fused kernel compiles for the GPUs it is meant for, fits into their shared memory and spills no registers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
OPS = sorted(folder.parent.name for folder in (HERE.parents[1] / "kernels/mamba_kernels").glob("*/fused.py"))


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("op", OPS)
def test_compiles(op, architecture):
    # Another process: kernels imported to be interpreted cannot be compiled.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(HERE / "compile_kernels.py"), architecture, f"test_kernel_{op}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
