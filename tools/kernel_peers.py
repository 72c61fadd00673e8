"""The packages that tools/bench_kernels.py times beside ours: installed, or imported from checkouts."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from kernel_timing import first_line

PACKAGES = ("causal_conv1d", "mamba_ssm")  # The second asks for the first when it is imported.

EXTENSIONS = {"causal_conv1d_cuda": "causal_conv1d", "selective_scan_cuda": "mamba_ssm"}
"""CUDA extensions, and the package whose checkout has them."""

CUDA_FLAGS = [
    "-O3", "-U__CUDA_NO_HALF_OPERATORS__", "-U__CUDA_NO_HALF_CONVERSIONS__", "-U__CUDA_NO_BFLOAT16_OPERATORS__",
    "-U__CUDA_NO_BFLOAT16_CONVERSIONS__", "-U__CUDA_NO_BFLOAT162_OPERATORS__", "-U__CUDA_NO_BFLOAT162_CONVERSIONS__",
    "--expt-relaxed-constexpr", "--expt-extended-lambda", "--use_fast_math",
]  # fmt: skip
"""Those of the packages' own setup.py."""

KEPT = {"causal_conv1d_cuda": "at::BFloat16, at::BFloat16", "selective_scan_cuda": "at::BFloat16, float"}
"""The dtypes, of data and weights, for which an extension is built: all of them take minutes."""


@dataclass
class Peers:
    """Packages of others, never dependencies: imported from checkouts below `path`, or where installed.

    From a checkout, mamba_ssm is imported without running its `__init__`, which wants every CUDA extension and transformers:
    its Triton modules then import as they are. CUDA extensions are built with nvcc, for the GPU at hand only and for bfloat16.
    """

    path: Path | None = None
    built: dict[str, str] = field(default_factory=dict)
    """Files of CUDA extensions that another process has built."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Why what was asked for is not there."""

    def __post_init__(self) -> None:
        for name, file in self.built.items():
            if name not in sys.modules:
                _load(name, Path(file))

    def get(self, names: Sequence[str]) -> list[Any] | None:
        """The functions "package.module:function", or None and a reason in `reasons` if one is not there."""
        found = [self._find(name) for name in names if name not in self.reasons]
        return found if len(found) == len(names) and None not in found else None

    def why(self, names: Sequence[str]) -> str:
        """The reason for what `get` did not find."""
        return next(f"{name}: {self.reasons[name]}" for name in names if name in self.reasons)

    def _find(self, name: str) -> Any | None:
        module, function = name.split(":")
        try:
            for package in PACKAGES:
                self._offer(package)
            return getattr(importlib.import_module(module), function)
        except Exception as error:  # Others' code: it may fail in any way, which must not end the run.
            self.reasons[name] = self._explained(error)
            return None

    def _explained(self, error: Exception) -> str:
        """What an exception says, and of a module that it misses the reason, if that is known."""
        return "; ".join([first_line(error), *(why for name, why in self.reasons.items() if f"named '{name}'" in str(error))])

    def checkout(self, package: str) -> Path | None:
        """The checkout below `path` that holds a package."""
        below = [] if self.path is None else [self.path, *sorted(self.path.iterdir())]
        return next((folder for folder in below if (folder / package / "__init__.py").is_file()), None)

    def _offer(self, package: str) -> None:
        """Import a package from its checkout; nothing without one. What it lacks, whoever uses it will say."""
        folder = self.checkout(package)
        if folder is None or package in sys.modules or package in self.reasons:
            return
        try:
            _load(package, folder / package / "__init__.py", run=package != "mamba_ssm")
        except Exception as error:
            self.reasons[package] = self._explained(error)

    def build(self) -> None:
        """Build, next to each other, the CUDA extensions of the checkouts that are not installed; why not, in `reasons`."""
        with ThreadPoolExecutor(len(EXTENSIONS)) as pool:
            list(pool.map(self._build, EXTENSIONS))

    def _build(self, name: str) -> None:
        folder = self.checkout(EXTENSIONS[name])
        if folder is None or name in sys.modules or importlib.util.find_spec(name) is not None:
            return
        try:
            sys.modules[name] = module = build_extension(name, folder)
            self.built[name] = str(module.__file__)
        except Exception as error:  # No compiler, or code that it does not take.
            self.reasons[name] = first_line(error)


def _load(name: str, file: Path, run: bool = True) -> None:
    """Put a module from a file into `sys.modules`; without `run`, an empty one in its place."""
    places = [str(file.parent)] if file.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=places)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        if run:
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def extension_sources(name: str, checkout: Path, target: Path) -> tuple[list[Path], Path]:
    """The files an extension is built of, and the folder of its headers: its own, but of CUDA files copies in `target` that
    leave out the kernels of other dtypes than those in KEPT."""
    folder = next(file.parent for file in sorted((checkout / "csrc").rglob("*.cu")))

    def kept(declared: re.Match[str]) -> str:
        refusal = f'template <> void {declared[1]} {{ throw std::runtime_error("not built"); }}'
        return declared[0] if declared[2] == KEPT[name] else refusal

    sources = sorted(folder.glob("*.cpp"))
    for file in sorted(folder.glob("*.cu")):
        text = re.sub(r"template void (\w+<([^>]*)>\([^)]*\));", kept, file.read_text())
        copy = target / file.name
        if not copy.exists() or copy.read_text() != text:  # A file written again would be compiled again.
            copy.write_text(text)
        sources.append(copy)
    return sources, folder


def build_extension(name: str, checkout: Path) -> ModuleType:
    """Build and load a package's CUDA extension from its checkout; raises what the build raises."""
    from torch.utils import cpp_extension

    if cpp_extension.CUDA_HOME is None:
        raise RuntimeError(f"{name} is not built: no nvcc (CUDA_HOME is not set)")
    target = Path(cpp_extension._get_build_directory(name, verbose=False))
    sources, headers = extension_sources(name, checkout, target)
    major, minor = torch.cuda.get_device_capability()
    architecture = f"-gencode=arch=compute_{major}{minor},code=sm_{major}{minor}"
    module: ModuleType = cpp_extension.load(
        name, [str(source) for source in sources], extra_cflags=["-O3"], extra_cuda_cflags=[*CUDA_FLAGS, architecture],
        extra_include_paths=[str(headers)], build_directory=str(target),
    )  # fmt: skip
    return module


def keep_configurations(package: str, index: int, count: int) -> None:
    """Leave each autotuned Triton kernel of a package every `count`-th of its configurations, from `index` on: processes
    that do so for all indices fill Triton's cache together, and none of them times anything if it has one left."""
    seen: set[int] = set()
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        for kernel in list(vars(sys.modules[name]).values()):
            while kernel is not None and not isinstance(kernel, ModuleType | type) and id(kernel) not in seen:
                seen.add(id(kernel))
                configurations = getattr(kernel, "configs", None)
                if isinstance(configurations, list) and len(configurations) > 1 and hasattr(kernel, "fn"):
                    kernel.configs = configurations[index % len(configurations) :: count]
                kernel = getattr(kernel, "fn", None)
