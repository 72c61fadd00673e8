"""Sums over the elements of sharded tensors, each global element counted once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatron_mamba.parallel.collectives import reduce_
from megatron_mamba.parallel.fsdp import local

_CPU_PIECE = 1 << 14
"""The CPU's norm kernel adds up in sequence (2% off at 2^27 equal fp32 elements): it is given pieces of this size."""


@torch.no_grad()
def squared_norm(parameters: Iterable[Tensor], across: Sequence[dist.ProcessGroup], device: torch.device) -> Tensor:
    """Sum of squares of the parameters' global gradients, a scalar on `device` in fp32 (fp64 for fp64 parameters).

    A DTensor's shards are summed over the mesh dimensions it is sharded over and nothing else; plain tensors and replicas
    count once. There is one all-reduce per distinct process group, whatever the number of parameters and meshes, and
    the total is then summed over each group of `across` (pipeline stages hold different parameters). A missing gradient
    counts as zero. Raises ValueError for a gradient laid out differently from its parameter.
    """
    dtype = torch.float32
    groups: dict[str, dist.ProcessGroup] = {}
    buckets: dict[tuple[str, ...], list[Tensor]] = {}
    for parameter in parameters:
        # Missing gradients keep their bucket: every rank of a group must make the same collectives.
        sharded = sharding_groups(parameter)
        groups |= sharded
        bucket = buckets.setdefault(tuple(sharded), [])
        dtype = torch.promote_types(dtype, parameter.dtype)
        if parameter.grad is not None:
            _check_layout(parameter)
            gradient = local(parameter.grad)
            bucket += gradient.flatten().split(_CPU_PIECE) if gradient.device.type == "cpu" else [gradient]
    zero = torch.zeros((), dtype=dtype, device=device)
    totals = {
        key: torch.stack(torch._foreach_norm(bucket, 2.0, dtype=dtype)).square_().sum() if bucket else zero
        for key, bucket in buckets.items()
    }
    for name, group in groups.items():
        keys = [key for key in totals if name in key]
        summed = reduce_(torch.stack([totals[key] for key in keys]), group)
        totals |= dict(zip(keys, summed.unbind(), strict=True))
    total = torch.stack([zero, *totals.values()]).sum()
    for group in across:
        reduce_(total, group)
    return total


def sharding_groups(parameter: Tensor) -> dict[str, dist.ProcessGroup]:
    """The groups over which the parameter's elements are spread, by name."""
    if not isinstance(parameter, DTensor):
        return {}
    mesh = parameter.device_mesh
    spread = [mesh.get_group(i) for i, place in enumerate(parameter.placements) if not place.is_replicate()]
    return {group.group_name: group for group in spread if group.size() > 1}


def _check_layout(parameter: Tensor) -> None:
    layout, grad_layout = getattr(parameter, "placements", None), getattr(parameter.grad, "placements", None)
    if layout != grad_layout or any(place.is_partial() for place in grad_layout or ()):
        raise ValueError(
            f"a gradient of shape {tuple(parameter.shape)} is laid out as {grad_layout}, its parameter as {layout}: "
            "sum and shard gradients before taking their norm"
        )
