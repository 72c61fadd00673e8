"""Data-parallel sharding with FSDP2, and the few parameters that stay out of it.

Matrices are sharded per layer and gathered in the compute dtype. Parameters that stay fp32 in compute (A_log, D,
dt_bias, norm weights) are small: they are replicated over data-parallel ranks and their gradients travel together, in one
sum per mesh dimension at the end of the last backward pass of a step, as do those of parameters that are replicated over
tp though each tp rank sees a part of the tokens (norm weights under sequence parallelism) or of the heads (fewer groups
than ranks).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from megatron_mamba.parallel.collectives import reduce_
from megatron_mamba.parallel.context import ParallelContext
from megatron_mamba.parallel.torch_private import keep_gradients, unit_parameters


def shard(
    units: Iterable[nn.Module],
    root: nn.Module,
    apart: set[nn.Parameter],
    unread: Iterable[nn.Module],
    context: ParallelContext,
    compute_dtype: torch.dtype,
) -> None:
    """Shard each of `units` (in order of use) and then `root` over the data-parallel mesh, in place.

    Gathered in `compute_dtype`, the next unit's while this one computes; gradients are summed (not averaged) in the
    parameters' own dtype. The parameters in `apart` stay whole on every rank, see :func:`sum_replicated_gradients`. The
    weights of the units in `unread` are not gathered for the backward pass, see :func:`read_in_backward`.
    """
    mesh = context.shard_mesh
    if context.size("dp_replicate") > 1:
        mesh = DeviceMesh._concatenate([context.mesh["dp_replicate"], mesh])
    units = list(units)
    some = next(root.parameters())
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=some.dtype, cast_forward_inputs=False)
    for module in (*units, root):
        again = context.reshard_after_forward and module is not root
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=apart, reshard_after_forward=again)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sums
    for module, following in pairwise(units):
        assert isinstance(module, FSDPModule)
        assert isinstance(following, FSDPModule)
        module.set_modules_to_forward_prefetch([following])
    for module in unread:
        assert isinstance(module, FSDPModule)
        module.set_unshard_in_backward(False)


def read_in_backward(module: nn.Module) -> None:
    """Gather the weights of an unread unit for backward passes after all, from now on."""
    if isinstance(module, FSDPModule):
        module.set_unshard_in_backward(True)


def last_backward(root: nn.Module, last: bool, context: ParallelContext) -> None:
    """Tell FSDP whether the next micro-batch is the step's last: gradients are summed over ranks then (or, if asked for,
    each time; over replicas only then), and gathered weights that were to be kept are given up."""
    assert isinstance(root, FSDPModule)
    root.set_requires_gradient_sync(last or context.reduce_every_micro_batch)
    root.set_requires_all_reduce(last)
    root.set_reshard_after_backward(last or context.reshard_after_forward)


def keep_deferred(root: nn.Module) -> None:
    """After weights' gradients that were put off are computed: add them to what this step has so far, in the dtype in which
    gradients are summed, as FSDP itself does at the end of a unit's backward pass only."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            keep_gradients(unit_parameters(module))


def reshard(root: nn.Module) -> None:
    """Give up gathered weights that a forward pass without a backward pass left behind."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a parameter or gradient, as a plain tensor sharing memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sum_replicated_gradients(
    apart: Iterable[nn.Parameter], partial_over_tp: Iterable[nn.Parameter], context: ParallelContext
) -> None:
    """After a step's last backward pass: sum the gradients of the parameters kept `apart` over the data- and context-parallel
    ranks and those of `partial_over_tp` over tp, in one flat collective per mesh dimension."""
    if context.token_ranks > 1:
        _sum_flat(apart, context.sum_over_tokens)
    if context.size("tp") > 1:
        _sum_flat(partial_over_tp, lambda flat: reduce_(flat, context.group("tp")))


def _sum_flat(parameters: Iterable[nn.Parameter], sum_: Callable[[Tensor], Tensor]) -> None:
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    if not gradients:
        return
    flat = sum_(torch.cat([g.flatten() for g in gradients]))
    for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(total.view_as(gradient))


def shard_range(length: int, rank: int, size: int) -> range:
    """The part of `length` leading rows that FSDP2 leaves on `rank` of `size` (torch.chunk's rule: ceil-sized pieces)."""
    piece = -(-length // size)
    return range(min(rank * piece, length), min((rank + 1) * piece, length))
