"""Whether the ranks that should hold the same weights do: a fault of memory or of a link shows nowhere else for a long time."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterable
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mamba.parallel.context import ParallelContext
from megatron_mamba.parallel.fsdp import local
from megatron_mamba.parallel.norms import sharding_groups

_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


@torch.no_grad()
def differing_replicas(parameters: Iterable[tuple[str, Tensor]], context: ParallelContext) -> list[str]:
    """For each parameter that is not bit for bit the same on all ranks which should hold the same part of it, its name and the
    ranks whose copies are in the minority, or all of them where none has a majority, with their hosts. The same answer everywhere.

    One gather of a checksum a parameter (the sum of its bits as integers) for each dimension of the mesh, and one all-reduce.
    """
    named = list(parameters)
    found = set[tuple[str, int]]()
    for group in (context.group("dp_replicate"), context.shard_mesh.get_group(), context.group("tp")):
        here = [(name, p) for name, p in named if group.group_name not in sharding_groups(p)]
        if group.size() == 1 or not here:
            continue
        sums = torch.stack([_checksum(local(p)) for _, p in here])
        gathered = sums.new_empty(group.size() * len(here))
        dist.all_gather_into_tensor(gathered, sums, group=group)
        ranks = dist.get_process_group_ranks(group)
        for (name, _), column in zip(here, gathered.view(group.size(), len(here)).unbind(1), strict=True):
            found |= {(name, rank) for rank in _minority(column.tolist(), ranks)}
    if not context.any_rank(bool(found)):
        return []
    everywhere = context.gather((socket.gethostname(), found))
    odd = sorted(set[tuple[str, int]]().union(*(found for _, found in everywhere)))
    return [
        f"{name} ({', '.join(f'rank {rank} on {everywhere[rank][0]}' for _, rank in some)})"
        for name, some in groupby(odd, key=lambda pair: pair[0])
    ]


def _checksum(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(_BITS[tensor.element_size()]).sum(dtype=torch.int64)


def _minority(sums: list[int], ranks: list[int]) -> list[int]:
    (most, count), *others = Counter(sums).most_common()
    return [rank for rank, value in zip(ranks, sums, strict=True) if value != most or (others and 2 * count <= len(sums))]
