"""The device mesh of a run, made once and handed to whoever needs ranks or groups."""

from __future__ import annotations

import datetime
import logging
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megatron_mamba.config import ConfigError, ParallelConfig
from megatron_mamba.files import reason
from megatron_mamba.layout import Schedule
from megatron_mamba.parallel.watchdog import Watchdog, own_store

log = logging.getLogger(__name__)

MESH_DIMENSIONS = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""Slowest first: tp neighbours are neighbouring ranks, so that tp stays inside a node."""


@dataclass(frozen=True)
class ParallelContext:
    """Ranks, groups and device of this process. One process is a mesh of size one in every dimension."""

    mesh: DeviceMesh
    device: torch.device
    shard_mesh: DeviceMesh
    """The ranks over which FSDP shards: those of dp_shard and cp."""
    tp_mesh: DeviceMesh
    """The ranks over which parameters are split."""
    sequence_parallel: bool = False
    """The residual stream is split over tp by tokens."""
    reshard_after_forward: bool = True
    reduce_every_micro_batch: bool = False
    """What FSDP keeps between its uses: see config.ParallelConfig."""
    schedule: Schedule = "1f1b"
    """Order of the pipeline's work, and which rank has which stage."""
    job: Mapping[str, str] = field(default_factory=dict)
    """What started this process, for records of the run: see :func:`job_description`."""
    deferred: list[Callable[[], None]] | None = None
    """Where backward passes leave the computation of weights' gradients for later; None: nowhere, they compute them."""

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
        mesh = init_device_mesh(device, config.sizes(dist.get_world_size()), mesh_dim_names=MESH_DIMENSIONS)
        return replace(cls.over(mesh, local, config), job=job_description(os.environ))

    @classmethod
    def over(cls, mesh: DeviceMesh, device: torch.device, config: ParallelConfig) -> ParallelContext:
        """The context of an existing mesh with the dimensions of :data:`MESH_DIMENSIONS`; every rank must make it."""
        shard_mesh = mesh["dp_shard"]
        if mesh.size(MESH_DIMENSIONS.index("cp")) > 1:
            shard_mesh = mesh["dp_shard", "cp"]._flatten("dp_shard_cp")
        return cls(
            mesh,
            device,
            shard_mesh,
            mesh["tp"],
            sequence_parallel=config.sequence_parallel,
            reshard_after_forward=config.reshard_after_forward,
            reduce_every_micro_batch=config.reduce_gradients == "micro_batch",
            schedule=config.schedule,
            deferred=[] if config.defers_weights else None,
        )

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

    @property
    def shard_size(self) -> int:
        """Number of ranks over which FSDP shards a parameter."""
        return self.size("dp_shard") * self.size("cp")

    @property
    def shard_rank(self) -> int:
        return self.rank("dp_shard") * self.size("cp") + self.rank("cp")

    @property
    def token_ranks(self) -> int:
        """Number of ranks that see different tokens: of other samples, or of other pieces of a sample."""
        return self.size("dp_replicate") * self.shard_size

    def sum_over_tokens(self, value: torch.Tensor) -> torch.Tensor:
        """`value` summed in place over the ranks that see different tokens, data- and context-parallel ones (any shape, one
        collective over those that shard parameters and one over replicas)."""
        if self.shard_size > 1:
            dist.all_reduce(value, group=self.shard_mesh.get_group())
        if self.size("dp_replicate") > 1:
            dist.all_reduce(value, group=self.group("dp_replicate"))
        return value

    def any_rank(self, flag: bool) -> bool:
        """True on every rank if `flag` is true on any (a collective)."""
        return bool(self.largest(flag)[0])

    def largest(self, *values: int) -> list[int]:
        """Each value's largest over all ranks (one collective)."""
        if self.world_size == 1:
            return list(values)
        found = torch.tensor(values, dtype=torch.int64, device=self.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        largest: list[int] = found.tolist()
        return largest

    def gather(self, value: Any) -> list[Any]:
        """What every rank gives, by rank, on every rank (a collective)."""
        everywhere: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(everywhere, value)
        return everywhere

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_size > 1:
            dist.barrier()

    def watchdog(self, seconds: float | None, heartbeat_seconds: float, stopping: Callable[[], bool]) -> Watchdog:
        """What watches over this rank and the next while it trains (a collective)."""
        store, traces = own_store(os.environ, self.device), os.environ.get("TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
        return Watchdog(
            self.global_rank, self.world_size, store, seconds, heartbeat_seconds, stopping=stopping, traces=traces
        )

    def tell_finished(self) -> None:
        """Make the file that FINISHED_FILE in the environment names: it tells what started this run not to start it again."""
        path = os.environ.get("FINISHED_FILE")
        if path and self.global_rank == 0:
            try:
                Path(path).touch()
            except OSError as error:
                log.warning("FINISHED_FILE=%s cannot be made: %s", path, reason(error))

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


def cache_folder() -> Path:
    """Where this user's programs keep what they can find out again: $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_mamba"


LAUNCHERS = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec"}
"""Variables that say how many processes were started together, and by what. Not SLURM_NTASKS: a job's own script, which is one
process, has it too."""


def unjoined() -> str:
    """What is wrong if several processes were started without torchrun, as they know nothing of each other; "" if nothing is."""
    for variable, launcher in LAUNCHERS.items() if "RANK" not in os.environ else ():
        count = os.environ.get(variable, "")
        if count.isdecimal() and int(count) > 1:
            return f"{launcher} started {count} processes ({variable}), each of which would be a run of its own"
    return ""


JOB_VARIABLES = {
    "slurm_job": "SLURM_JOB_ID",
    "slurm_array_job": "SLURM_ARRAY_JOB_ID",
    "slurm_array_task": "SLURM_ARRAY_TASK_ID",
    "slurm_nodes": "SLURM_JOB_NODELIST",
    "slurm_restarts": "SLURM_RESTART_COUNT",
    "torchrun_run": "TORCHELASTIC_RUN_ID",
    "torchrun_restarts": "TORCHELASTIC_RESTART_COUNT",
}
"""What of its launcher a run records, and the variables that say it."""


def job_description(environment: Mapping[str, str]) -> dict[str, str]:
    """The host of this process, and what SLURM and torchrun say of the job that it belongs to."""
    known = {name: environment[variable] for name, variable in JOB_VARIABLES.items() if environment.get(variable)}
    return {"host": socket.gethostname(), **known}
