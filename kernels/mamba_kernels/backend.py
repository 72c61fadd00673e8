"""Which implementation of an op runs, and the one way in which fused ones are registered with torch, configured and launched.

A fused op is a `torch.library` operator `mamba_kernels::<name>`: torch.compile keeps it whole, meta and fake tensors go through
it, and its backward pass is made of operators too. On plain tensors the same functions are called without torch's dispatcher,
which costs host time at every call. This module does not import Triton; only the `fused` modules do.
"""

import importlib.util
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

FUSED_DTYPES = frozenset([torch.float32, torch.bfloat16, torch.float16])
"""What the fused kernels compute with; float64 is the reference's."""

FUSED = True
"""Whether ops may run fused at all. To look for the cause of trouble, set it to False: the reference runs on every device."""

META_DEVICE = "cpu"
"""Which device meta tensors stand for: the planner sets "cuda", and then counts what the fused kernels allocate."""

INTERPRETED = False
"""Whether CPU tensors go to the fused kernels too. They must then have been imported with TRITON_INTERPRET=1: tests do that."""

AVAILABLE = importlib.util.find_spec("triton") is not None
"""Whether there are fused kernels: Triton is made for Linux."""

KERNELS: dict[str, Callable[..., Any]] = {}
"""What computes each registered operator, by name."""

COMPILED_WITH = {"enable_fp_fusion": True}
"""Said at each compilation, as Triton's defaults change: from 3.10 on a product and a sum are rounded twice unless asked for."""

Meta = dict[str, int]
"""Compile-time arguments of a kernel: block sizes, num_warps, num_stages."""


def use_fused(x: Tensor) -> bool:
    """Whether an op on `x` runs fused: on a CUDA device, in float32 or narrower."""
    if not FUSED or x.dtype not in FUSED_DTYPES:
        return False
    return x.is_cuda or (x.is_cpu and INTERPRETED) or (x.is_meta and META_DEVICE == "cuda")


@contextmanager
def meta_stands_for(device: str) -> Iterator[None]:
    """Let ops on meta tensors run as they do on a `device` of type "cpu" or "cuda"."""
    global META_DEVICE
    before, META_DEVICE = META_DEVICE, device
    try:
        yield
    finally:
        META_DEVICE = before


def register(
    name: str,
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register `mamba_kernels::name` with its kernel, its shapes (`fake`) and its gradient; returns it, ready to call.

    `run` takes tensors first. `setup_context` and `backward` are those of torch.library.register_autograd.
    """
    qualified, run = f"mamba_kernels::{name}", _on_its_device(run)
    torch.library.define(qualified, schema, tags=[torch.Tag.pt2_compliant_tag])
    torch.library.impl(qualified, ("cuda", "cpu"), run)
    torch.library.register_fake(qualified, fake)
    if backward is not None:
        torch.library.register_autograd(qualified, once_differentiable(backward), setup_context=setup_context)
    KERNELS[name] = run
    operator: Callable[..., Any] = getattr(torch.ops.mamba_kernels, name).default
    function = None if backward is None else _function(name, run, setup_context, backward)

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or not _plain(arguments):
            return operator(*arguments)
        if not torch.is_grad_enabled() or not any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
            return run(*arguments)
        # Without a gradient of its own the operator says so when it is asked for one.
        return operator(*arguments) if function is None else function.apply(*arguments)

    return call


def _plain(arguments: tuple[Any, ...]) -> bool:
    """Whether nothing has to see an operator: no mode, no transform, no subclass of Tensor, no tensor without numbers."""
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return False
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    return all(type(t) in _PLAIN for t in tensors) and not tensors[0].is_meta


_PLAIN = (Tensor, torch.nn.Parameter)


def _function(
    name: str, run: Callable[..., Any], setup_context: Callable[..., None] | None, backward: Callable[..., Any]
) -> type[torch.autograd.Function]:
    """An operator with its gradient, as autograd has it without the dispatcher."""

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = run(*inputs)
        if setup_context is not None:
            setup_context(ctx, inputs, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(once_differentiable(backward))}
    return type(name, (torch.autograd.Function,), members)


def _on_its_device(run: Callable[..., Any]) -> Callable[..., Any]:
    """Launch on the device of the first argument, which need not be the current one."""

    def guarded(first: Tensor, *arguments: Any) -> Any:
        if first.is_cuda and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                return run(first, *arguments)
        return run(first, *arguments)

    return guarded


recorder: Callable[[Any, tuple[int, ...], tuple[Any, ...], Meta], None] | None = None
"""Called instead of a launch where set: the test that compiles every kernel without a GPU sets it."""


_compiled: dict[int, tuple[Any, int, dict[tuple[Any, ...], tuple[Any, tuple[Any, ...], list[Any]]]]] = {}
"""By its id, a kernel, whose own hash takes long, how many of its arguments are tensors, and what it was compiled to."""


def pointers(kernel: Any) -> int:
    """How many arguments of a kernel are tensors or None: the first, which are named so."""
    return next((i for i, name in enumerate(kernel.arg_names) if not name.endswith("_ptr")), len(kernel.arg_names))


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **meta: Any) -> None:
    """Launch a Triton kernel on a grid of programs, its compile-time arguments by name and last; nothing for an empty grid, nor on
    meta tensors, for which an op allocates what it would and computes nothing.

    Triton looks at every argument of every launch to find what it compiled, and asks the driver about every address, which for
    kernels of this size takes longer than the rest of a launch. Here one look-up does: a kernel is compiled for the numbers it is
    called with (a float where an int of the same value may come too must be one always), for the dtypes of tensors and for whether
    their addresses are multiples of 16. Triton's own profiler, which has a
    hook at every launch, sees the first of each only; torch's and NVIDIA's see all.
    """
    if 0 in grid:
        return
    if recorder is not None:
        recorder(kernel, grid, arguments, meta)
        return
    known = _compiled.get(id(kernel))
    if known is None:
        known = _compiled[id(kernel)] = kernel, pointers(kernel), {}
    _, count, of_kernel = known
    tensors, numbers = arguments[:count], arguments[count:]
    first = next(t for t in tensors if t is not None)
    if first.is_meta:
        return
    addresses = [None if t is None else t.data_ptr() for t in tensors]
    dtypes = [None if t is None else t.dtype for t in tensors]
    key = (first.get_device(), numbers, *meta.values(), *dtypes, *[a and a % 16 for a in addresses])
    found = of_kernel.get(key)
    if found is None:
        compiled = kernel[grid](*arguments, **meta, **COMPILED_WITH)
        if compiled is not None:  # The interpreter compiles nothing.
            constants = [meta[name] for name in kernel.arg_names[len(arguments) :]]
            # What a compiled kernel's own __getitem__ calls; the three are hooks of Triton's profiler and what they are told.
            of_kernel[key] = compiled, (compiled.function, compiled.packed_metadata, None, None, None), constants
        return
    compiled, of_launch, constants = found
    stream = torch._C._cuda_getCurrentRawStream(first.get_device())
    compiled.run(*(*grid, 1, 1)[:3], stream, *of_launch, *addresses, *numbers, *constants)


class Tunable:
    """The launch configurations of one kernel.

    `candidates(*key)` lists what may be used for a problem of that key, the default first: it fits every supported
    architecture. Where a measured one is shipped (tuned.json, written by tools/bench_kernels.py --tune) it is used instead,
    except in torch's deterministic mode, which always has the default: results there depend on no table. Nothing is ever
    measured while a model runs, so the first step waits for nothing but compilation.
    """

    ALL: ClassVar[dict[str, "Tunable"]] = {}

    def __init__(self, name: str, candidates: Callable[..., list[Meta]]) -> None:
        self.name, self.candidates = name, candidates
        self.used: dict[tuple[Any, ...], Meta] = {}
        self._forced: Meta | None = None
        Tunable.ALL[name] = self

    def __call__(self, *key: Any) -> Meta:
        """The configuration for a key: numbers and dtypes that a problem's speed depends on."""
        if self._forced is not None:
            return self._forced
        if torch.are_deterministic_algorithms_enabled():
            return self.candidates(*key)[0]
        found = self.used.get(key)
        if found is None:
            found = self.used[key] = self.shipped(architecture()).get(key_name(key)) or self.candidates(*key)[0]
        return found

    def shipped(self, architecture: str) -> dict[str, Meta]:
        """The measured configurations for an architecture, by key."""
        configurations: dict[str, Meta] = _tuned().get(architecture, {}).get(self.name, {})
        return configurations

    @contextmanager
    def forced(self, meta: Meta) -> Iterator[None]:
        """Use one configuration for every key."""
        self._forced = meta
        try:
            yield
        finally:
            self._forced = None


def key_name(key: tuple[Any, ...]) -> str:
    """A key as it stands in tuned.json: "bfloat16 64 128"."""
    return " ".join(str(part).removeprefix("torch.") for part in key)


@cache
def architecture() -> str:
    """The current device as "sm_90"; "" where there is none."""
    if not torch.cuda.is_available():
        return ""
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


@cache
def _tuned() -> dict[str, dict[str, dict[str, Meta]]]:
    tables: dict[str, dict[str, dict[str, Meta]]] = json.loads((Path(__file__).parent / "tuned.json").read_text())
    return tables
