"""What the tests of every op share: inputs, an op's outputs and gradients, and their error against an oracle.

An op under test and its oracle are functions of tensors by name that return a tensor or a tuple. The oracles are written
from the definitions, token by token, in float64 and with torch's own autograd.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mamba_kernels import common

EXACT = 1e-10  # Largest relative error in float64.
ONE_BF16_ROUNDING = 2.0**-8 + 1e-5  # Of the result, as everything before is float32.
LENGTHS = [1, 63, 100, 257]

Op = Callable[..., Tensor | tuple[Tensor, ...]]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    """The same normal numbers whatever the dtype and device, but for rounding."""
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape) + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def document_starts(batch: int, length: int, device: str) -> Tensor:
    """Boundaries at t = 0, one after the other, at usual chunk borders and at the last token; differing over the batch.

    The second sequence continues the document before it for a while, and the last is one document.
    """
    starts = torch.zeros(batch, length, dtype=torch.bool)
    starts[0, [t for t in (0, 15, 16, 17, 64, 65, length - 1) if t < length]] = True
    if batch > 1:
        starts[1, [t for t in (length // 3, length // 3 + 1, length // 3 + 2, 128) if 0 < t < length]] = True
    starts[batch - 1 if batch > 2 else batch :] = False
    return starts.to(device)


def use_blocks(monkeypatch, elements: int) -> None:
    """Let the reference ops work in blocks of so many elements, on any device."""
    monkeypatch.setattr(common, "BLOCK_ELEMENTS", elements)
    monkeypatch.setattr(common, "DEVICE_BLOCK_ELEMENTS", elements)


def strided(t: Tensor) -> Tensor:
    """The same values with the dimensions reversed in memory, and NaN between any two."""
    base = torch.full((*reversed(t.shape), 2), torch.nan, dtype=t.dtype, device=t.device)
    view = base[..., 0].permute(*reversed(range(t.dim())))
    view.copy_(t)
    assert t.numel() < 2 or not view.is_contiguous()
    return view


def outputs_and_gradients(op: Op, inputs: dict[str, Tensor], *, strides: bool = False) -> dict[str, Tensor]:
    """The outputs of an op by number, and the gradient of every input under a fixed random gradient of every output.

    Asserts that neither inputs nor output gradients were modified, and that gradients have the dtype of their input.
    """
    arrange = strided if strides else torch.clone
    leaves = {name: arrange(t.detach()).requires_grad_() for name, t in inputs.items()}
    outputs = op(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    seeds = [arrange(_output_gradient(i, out)) for i, out in enumerate(outputs)]
    kept = [seed.clone() for seed in seeds]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), seeds, materialize_grads=True)
    assert all(torch.equal(leaf, inputs[name]) for name, leaf in leaves.items()), "an input was modified"
    assert all(torch.equal(seed, was) for seed, was in zip(seeds, kept, strict=True)), "an output gradient was modified"
    results = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        assert gradient.dtype == leaf.dtype
        results[f"gradient of {name}"] = gradient
    return results


def _output_gradient(index: int, output: Tensor) -> Tensor:
    """The same numbers in any dtype: bfloat16 holds them."""
    return randn(*output.shape, seed=7 + index, device=output.device.type, dtype=torch.bfloat16).to(output.dtype)


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest absolute difference over the largest absolute value wanted; infinite where either is not finite."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, wanted {tuple(want.shape)}"
    if got.numel() == 0:
        return 0.0
    got, want = got.double(), want.double()
    difference = (got - want).abs().max().item()
    scale = want.abs().max().item()
    if not (got.isfinite().all() and want.isfinite().all()):
        return float("inf")
    return difference / scale if scale > 0.0 else float(difference > 0.0)


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """Every output and gradient within a relative error, all of them reported if one is not."""
    errors = {name: relative_error(got[name], want[name]) for name in want}
    assert max(errors.values()) <= tolerance, f"relative errors above {tolerance}: {errors}"


def in_float64(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() for name, t in inputs.items()}


class AllocationWatch(TorchDispatchMode):
    """Sizes, in elements, of the tensors that operations made while it was active, by dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor):
                self.largest[t.dtype] = max(self.largest.get(t.dtype, 0), t.numel())
        return out


def saved_elements(op: Op, inputs: dict[str, Tensor]) -> int:
    """How many elements an op keeps for its backward beside its inputs."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    own = {t.untyped_storage().data_ptr() for t in leaves.values()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = op(**leaves)  # Held, so that no storage is freed and its address used again.
    del out
    return sum(kept.values())
