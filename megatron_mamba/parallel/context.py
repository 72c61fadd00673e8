"""The device mesh of a run, made once and handed to whoever needs ranks or groups."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megatron_mamba.config import ConfigError, ParallelConfig

MESH_DIMENSIONS = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""Slowest first: tp neighbours are neighbouring ranks, so that tp stays inside a node."""


@dataclass(frozen=True)
class ParallelContext:
    """Ranks, groups and device of this process. One process is a mesh of size one in every dimension."""

    mesh: DeviceMesh
    device: torch.device

    @classmethod
    def create(cls, config: ParallelConfig, device: str = "auto", deterministic: bool = False) -> ParallelContext:
        """Join the process group torchrun describes (or make a group of one) and lay the mesh over it.

        `deterministic` sets what the CUDA libraries read from the environment before their first use.
        Raises :class:`ConfigError` when the sizes do not multiply to the number of ranks, or `device` is not there.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("trainer.device", device, "no CUDA device is visible", "Use trainer.device=cpu, or auto")
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        local = torch.device("cpu")
        if device == "cuda":
            local = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(local)
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
            timeout = datetime.timedelta(minutes=30)
            if "RANK" in os.environ:
                dist.init_process_group(backend, timeout=timeout)
            else:
                dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return cls(init_device_mesh(device, _sizes(config, dist.get_world_size()), mesh_dim_names=MESH_DIMENSIONS), local)

    def size(self, dimension: str) -> int:
        """Number of ranks along `dimension`."""
        # Asked for at every layer of every pass: slicing the mesh (self.mesh[dimension]) takes a millisecond.
        return self.mesh.size(MESH_DIMENSIONS.index(dimension))

    def rank(self, dimension: str) -> int:
        """This process's coordinate along `dimension`."""
        return self.mesh.get_local_rank(dimension)

    def group(self, dimension: str) -> dist.ProcessGroup:
        """Process group of the ranks that differ from this one along `dimension` only."""
        return self.mesh.get_group(dimension)

    @property
    def world_size(self) -> int:
        return dist.get_world_size()

    @property
    def global_rank(self) -> int:
        return dist.get_rank()

    @property
    def dp_size(self) -> int:
        """Number of ranks that read different samples."""
        return self.size("dp_replicate") * self.size("dp_shard")

    @property
    def dp_rank(self) -> int:
        return self.rank("dp_replicate") * self.size("dp_shard") + self.rank("dp_shard")

    def sum_over_dp(self, value: torch.Tensor) -> torch.Tensor:
        """`value` summed in place over the data-parallel ranks (any shape, one collective per mesh dimension > 1)."""
        for dimension in ("dp_shard", "dp_replicate"):
            if self.size(dimension) > 1:
                dist.all_reduce(value, group=self.group(dimension))
        return value

    def any_rank(self, flag: bool) -> bool:
        """True on every rank if `flag` is true on any."""
        value = torch.tensor(int(flag))
        if self.world_size > 1:
            value = value.to(self.device)
            dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


def _sizes(config: ParallelConfig, world_size: int) -> tuple[int, ...]:
    fixed = config.pp * config.dp_replicate * config.cp * config.tp
    dp_shard = config.dp_shard if config.dp_shard != -1 else max(world_size // fixed, 1)
    if fixed * dp_shard != world_size:
        if world_size % fixed == 0:
            remedy = f"Set parallel.dp_shard={world_size // fixed} (or -1)"
        else:
            remedy = f"Start a multiple of {fixed} ranks, or choose sizes whose product divides {world_size}"
        raise ConfigError(
            "parallel.dp_shard",
            config.dp_shard,
            f"pp {config.pp} x dp_replicate {config.dp_replicate} x dp_shard {dp_shard} x cp {config.cp} x tp {config.tp} "
            f"= {fixed * dp_shard} ranks, but {world_size} are running",
            remedy,
        )
    return (config.pp, config.dp_replicate, dp_shard, config.cp, config.tp)
