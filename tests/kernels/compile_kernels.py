"""Compile every fused kernel for a GPU that need not be there, and say what each takes: run as a script, by test_compile.py.

    python tests/kernels/compile_kernels.py sm_90 test_kernel_ssd ...

Each test module named has `compile_cases()`: names, and functions that launch kernels on meta tensors. Launches are recorded
and compiled instead: with the configurations shipped for that architecture, and with the default ones. Prints a line a
kernel and specialisation: name, shared memory and registers; ends with status 1 if one does not fit or spills.
"""

import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

from mamba_kernels import backend

SHARED_MEMORY = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448}  # Bytes a block may have.
SPILLS = {
    "output_kernel": 64, "states_kernel": 8,  # SSD, on sm_80 alone
    "pair_gradient_kernel": 8, "group_gradient_kernel": 152,  # SSD: measured to be the fastest on an H200
    "_norm_kernel": 8,  # LayerNorm of a sum, in the configuration that was the fastest without one
    "scan_kernel": 48, "gradient_kernel": 24,  # selective scan
    "_conv_kernel": 8,  # on sm_100 with documents: one number, once a program, outside its loop
}  # fmt: skip
"""Bytes of registers that a kernel may spill; any other kernel none."""


class FakeDriver:
    """A driver of a GPU of one architecture, for the compiler alone."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def map_python_to_cpp_type(self, name: str) -> str:
        from triton.backends.nvidia.driver import ty_to_cpp

        return ty_to_cpp(name)


def configurations(run: Callable[[], object], architecture: str) -> Iterator[None]:
    """Run a case so that every launch takes its shipped configuration, and then its default one where that is another."""
    for tunable in backend.Tunable.ALL.values():
        tunable.used.clear()
    backend.architecture = lambda: architecture
    run()
    yield
    backend.architecture = lambda: ""
    if any(tunable.shipped(architecture) for tunable in backend.Tunable.ALL.values()):
        for tunable in backend.Tunable.ALL.values():
            tunable.used.clear()
        run()
        yield


def resources(compiled) -> tuple[int, int]:
    """Registers a thread and bytes of stack (spilled registers) of a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return int(registers), int(stack)


def main(architecture: str, modules: list[str]) -> int:
    triton.runtime.driver.set_active(FakeDriver(int(architecture.removeprefix("sm_"))))
    seen, failures, current_case = set(), 0, ""

    def record(kernel, grid, arguments, meta) -> None:
        nonlocal failures
        leading = backend.pointers(kernel)
        assert not any(isinstance(a, torch.Tensor) for a in arguments[leading:]), "tensors come first, and are named _ptr"
        compiled = kernel.warmup(*arguments, grid=grid, **meta, **backend.COMPILED_WITH)
        key = compiled.hash
        if key in seen:
            return
        seen.add(key)
        registers, stack = resources(compiled)
        shared = compiled.metadata.shared
        bad = shared > SHARED_MEMORY[architecture] or stack > SPILLS.get(kernel.fn.__name__, 0)
        failures += bad
        outcome, shown = "FAIL" if bad else "ok  ", " ".join(f"{name}={value}" for name, value in meta.items())
        taken = f"shared {shared} registers {registers} stack {stack}"
        print(f"{outcome} {kernel.fn.__name__} {taken} | {current_case} | {shown}", flush=True)

    backend.recorder = record
    for module in modules:
        op = f"mamba_kernels.{module.removeprefix('test_kernel_')}"
        importlib.import_module(f"{op}.operators" if importlib.util.find_spec(f"{op}.operators") else f"{op}.fused")
        for current_case, run in importlib.import_module(module).compile_cases():  # noqa: B007 - `record` reads it
            for _ in configurations(run, architecture):
                pass
    print(f"{architecture}: {len(seen)} kernels, {failures} failures")
    return int(failures > 0 or not seen)


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(main(sys.argv[1], sys.argv[2:]))
