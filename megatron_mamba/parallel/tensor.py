"""Parameters as DTensors over the tensor-parallel ranks: what a parameter *is*, and the part a rank computes with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from megatron_mamba.parallel.context import ParallelContext
from megatron_mamba.parallel.fsdp import local, shard_range


def is_split(split_dim: int | None, units: int, context: ParallelContext) -> bool:
    """Whether a parameter of `units` indivisible units is cut over tp, rather than replicated."""
    return split_dim is not None and units % context.size("tp") == 0


def declare(
    shape: tuple[int, ...], split_dim: int | None, units: int, context: ParallelContext, dtype: torch.dtype
) -> DTensor:
    """A DTensor of global `shape` on the meta device, split over tp along `split_dim` in whole `units`.

    Raises ValueError where tp ranks can neither share out the units nor, several to a unit, share them.
    """
    sizes = list(shape)
    placement: Shard | Replicate = Replicate()
    if split_dim is not None and units % context.size("tp") and context.size("tp") % units:
        raise ValueError(f"{units} units of a parameter of shape {shape} cannot be shared by {context.size('tp')} tp ranks")
    if split_dim is not None and is_split(split_dim, units, context):
        sizes[split_dim] //= context.size("tp")
        placement = Shard(split_dim)
    return DTensor.from_local(torch.empty(sizes, dtype=dtype, device="meta"), context.tp_mesh, [placement], run_check=False)


def local_part(parameter: Tensor, split_dim: int | None, units: int, context: ParallelContext) -> Tensor:
    """What this tp rank computes with: its shard, or of a replicated parameter with fewer units than ranks its unit."""
    part = local(parameter)
    if split_dim is None or is_split(split_dim, units, context):
        return part
    size = part.shape[split_dim] // units
    return part.narrow(split_dim, context.rank("tp") * units // context.size("tp") * size, size)


def local_units(split_dim: int | None, units: int, context: ParallelContext) -> int:
    """How many of the `units` a tp rank computes with."""
    return units if split_dim is None else max(units // context.size("tp"), 1)


def owned_slices(
    shape: tuple[int, ...], split_dim: int | None, units: int, context: ParallelContext, sharded: bool
) -> tuple[slice, ...]:
    """Where this rank's local tensor lies in the global one: tp cuts first, then FSDP (if `sharded`) cuts dimension 0."""
    index = [slice(0, size) for size in shape]
    if split_dim is not None and is_split(split_dim, units, context):
        size = shape[split_dim] // context.size("tp")
        index[split_dim] = slice(context.rank("tp") * size, (context.rank("tp") + 1) * size)
    if sharded:
        first = index[0]
        part = shard_range(first.stop - first.start, context.shard_rank, context.shard_size)
        index[0] = slice(first.start + part.start, first.start + part.stop)
    return tuple(index)
