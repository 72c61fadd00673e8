"""Forked ranks: a world of processes on one machine in a fraction of a second.

Mark tests (or modules) that use it with ``pytest.mark.ranks``: they run first, while the parent has not run autograd.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable

import torch
import torch._dynamo  # DTensor imports it at its first operation: once here is cheaper than once on every forked rank
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh

from megatron_mamba.parallel.context import MESH_DIMENSIONS, ParallelContext


def _rank(rank: int, world: int, folder: str, sizes: dict[str, int], body: Callable[[ParallelContext], None]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", tuple(sizes.get(d, 1) for d in MESH_DIMENSIONS), mesh_dim_names=MESH_DIMENSIONS)
    body(ParallelContext(mesh, torch.device("cpu")))
    dist.destroy_process_group()


def on_ranks(sizes: dict[str, int], body: Callable[[ParallelContext], None]) -> None:
    """Run `body` on every rank of a mesh of `sizes` (dimension -> size, 1 where absent); a failure on any fails the test."""
    world = math.prod(sizes.values())
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, (world, folder, sizes, body), nprocs=world, start_method="fork")
