"""Data-parallel sharding with FSDP2, and the few parameters that stay out of it.

Matrices are sharded per layer and gathered in the compute dtype. Parameters that stay fp32 in compute (A_log, D,
dt_bias, norm weights) are small: they are replicated over data-parallel ranks and their gradients travel together in
one sum at the end of the last backward pass of a step.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from megatron_mamba.parallel.context import ParallelContext


def shard(
    units: Iterable[nn.Module], root: nn.Module, apart: set[nn.Parameter], context: ParallelContext, compute_dtype: torch.dtype
) -> None:
    """Shard each of `units` (in order of use) and then `root` over the data-parallel mesh, in place.

    Gathered in `compute_dtype`; gradients are summed (not averaged) in the parameters' own dtype. The parameters in
    `apart` stay whole on every rank, see :func:`sum_replicated_gradients`.
    """
    mesh = context.mesh["dp_replicate", "dp_shard"]
    some = next(root.parameters())
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=some.dtype, cast_forward_inputs=False)
    for module in (*units, root):
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=apart, reshard_after_forward=module is not root)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sums


def last_backward(root: nn.Module, last: bool) -> None:
    """Tell FSDP whether the next backward pass is the step's last: only then are gradients reduced over ranks."""
    assert isinstance(root, FSDPModule)
    root.set_requires_gradient_sync(last)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a parameter or gradient, as a plain tensor sharing memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sum_replicated_gradients(apart: Iterable[nn.Parameter], context: ParallelContext) -> None:
    """Sum the gradients of the parameters kept apart over the data-parallel ranks: one flat collective for all."""
    if context.dp_size == 1:
        return
    gradients = [local(p.grad) for p in apart if p.grad is not None]
    flat = context.sum_over_dp(torch.cat([g.flatten() for g in gradients]))
    for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(total.view_as(gradient))


def shard_range(length: int, rank: int, size: int) -> range:
    """The part of `length` leading rows that FSDP2 leaves on `rank` of `size` (torch.chunk's rule: ceil-sized pieces)."""
    piece = -(-length // size)
    return range(min(rank * piece, length), min((rank + 1) * piece, length))
