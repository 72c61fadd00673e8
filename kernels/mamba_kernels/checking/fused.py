"""Which compiler makes the fused kernels: what a check of them holds for."""

import re
from functools import cache

import torch
import triton


@cache
def toolchain() -> str:
    """For example "NVIDIA H200, torch 2.11.0+cu130, Triton 3.6.0, ptxas 12.8.93", of the current device.

    The assembler is the one that Triton takes for this device: its own, of which it has two, or that of TRITON_PTXAS_PATH.
    """
    target = triton.runtime.driver.active.get_current_target()
    found = re.search(r"\bV(\d+(?:\.\d+)+)", triton.compiler.make_backend(target).hash())
    assembler = f"ptxas {found[1]}" if found else "an unknown assembler"
    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}, {assembler}"
