"""Every fused kernel compiles for the GPUs it is meant for, fits their shared memory and spills no registers but those listed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# Other versions of Triton, and of the compiler in it, spill other registers.
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU; on one, the kernels themselves run")
HERE = Path(__file__).parent
FUSED = [file for file in (HERE.parents[1] / "kernels/mamba_kernels").glob("*/fused.py") if "@triton.jit" in file.read_text()]
OPS = sorted(file.parent.name for file in FUSED)
LARGE = ["ssd", "selective_scan"]
# A process takes longer to start than a small op to compile.
TOGETHER = {**{op: [op] for op in LARGE}, "others": [op for op in OPS if op not in LARGE]}


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("ops", TOGETHER)
def test_compiles(ops, architecture):
    # Another process: kernels imported to be interpreted cannot be compiled.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    modules = [f"test_kernel_{op}" for op in TOGETHER[ops]]
    command = [sys.executable, str(HERE / "compile_kernels.py"), architecture, *modules]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_op_is_compiled():
    assert sorted(op for some in TOGETHER.values() for op in some) == OPS
    assert len(OPS) >= 9
