"""What a step sends over the network and how long it takes at stated speeds: enough to rank layouts, not a promise."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import NamedTuple

from megatron_mamba.config import Config
from megatron_mamba.layout import Recompute
from megatron_mamba.model.flops import flops_per_token, layer_flops
from megatron_mamba.model.lm import DTYPES, master_dtype
from megatron_mamba.model.parameters import MIXER_ROWS
from megatron_mamba.model.step_memory import model_pieces, units_of

GPUS_PER_NODE = 8
REACHED = 0.8
"""Share of a link's speed that collectives reach."""
OPTIMIZER_BYTES = 28
"""AdamW reads weight, gradient and two moments of a parameter and writes all but the gradient."""


@dataclass(frozen=True)
class Gpu:
    """A device: memory that CUDA reports in GiB, dense bf16 TFLOP/s, and GB/s of memory, NVLink and network, one way."""

    memory_gib: float
    tflops: float
    memory_gb: float
    nvlink_gb: float
    network_gb: float

    @property
    def usable(self) -> int:
        """Bytes for tensors: without 1.5 GiB for CUDA and NCCL and 5 % that the allocator loses to fragments."""
        return int((self.memory_gib - 1.5) * 0.95 * 2**30)


GPUS = {
    "a100-40": Gpu(39.4, 312, 1555, 300, 25),
    "a100-80": Gpu(79.2, 312, 2039, 300, 25),
    "h100": Gpu(79.1, 989, 3350, 450, 50),
    "h200": Gpu(139.8, 989, 4800, 450, 50),
    "b200": Gpu(178.4, 2250, 8000, 900, 50),
}
"""From NVIDIA's data sheets; network: one 200 (A100) or 400 Gbit/s adapter a GPU."""


class Mesh(NamedTuple):
    """Sizes of the mesh's dimensions, and micro-batches of a step."""

    dp_replicate: int
    dp_shard: int
    tp: int
    micro_batches: int


def recomputed_flops(config: Config, kind: str) -> float:
    """Forward FLOPs per token that the backward pass of one layer of `kind` does again."""
    how: Recompute = getattr(config.recompute, kind)
    whole = layer_flops(config.model, kind, config.data.seq_length)
    rows = MIXER_ROWS[kind](config.model)
    outer = sum(2 * row.numel for row in rows if "D" in row.dims and len(row.dims) == 2)
    # The last product is never repeated: nothing needs its result.
    last = sum(2 * row.numel for row in rows if row.dims.startswith("D") and len(row.dims) == 2)
    return {"none": 0.0, "selective": whole - outer, "full": whole - last}[how]


def training_flops(config: Config) -> float:
    """FLOPs per token of forward, backward and what is computed again."""
    layers = Counter(config.model.layers)
    again = sum(count * recomputed_flops(config, kind) for kind, count in layers.items())
    return 3 * flops_per_token(config.model, config.data.seq_length) + again


def tp_traffic(config: Config) -> dict[str, dict[str, Counter[str]]]:
    """Bytes that a rank sends to its tp ranks for a micro-batch, by part (one layer of its kind), pass and collective."""
    # It goes with the number of tokens, so a few are enough.
    tokens, few = config.trainer.micro_batch_size * config.data.seq_length, _few_tokens(config)
    grown = tokens / few.data.seq_length
    return {
        kind: {when: Counter({op: round(n * grown) for op, n in sent.items()}) for when, sent in piece.sent.items()}
        for _, kind, piece, _ in model_pieces(few, 1)
    }


def tp_bytes(config: Config, mesh: Mesh) -> int:
    """Bytes that a rank sends to its tp ranks in a step."""
    traffic = tp_traffic(config)
    parts = ("embedding", *config.model.layers, "output")
    return mesh.micro_batches * sum(sent.total() for part in parts for sent in traffic[part].values())


def dp_traffic(config: Config, mesh: Mesh) -> Counter[str]:
    """Bytes that a rank sends to its data-parallel ranks in a step, by collective."""
    pieces = model_pieces(_few_tokens(config), mesh.dp_shard)
    precision = config.trainer.precision
    wide, narrow = master_dtype(precision).itemsize, DTYPES[precision].itemsize
    shard, replicas = (mesh.dp_shard - 1) / mesh.dp_shard, (mesh.dp_replicate - 1) / mesh.dp_replicate
    sums = mesh.micro_batches if config.parallel.reduce_gradients == "micro_batch" else 1
    apart = sum(count for _, _, piece, _ in pieces for count in piece.apart) * wide
    sent: Counter[str] = Counter()
    for unit in units_of(pieces):
        again, size = config.parallel.reshard_after_forward, shard * unit.whole * narrow
        sent["all-gather, forward"] += round(size * (mesh.micro_batches if again else 1))
        sent["all-gather, backward"] += round(size * mesh.micro_batches * (again and not (unit.root or unit.unread)))
        sent["reduce-scatter"] += round(sums * shard * unit.whole * wide)
        sent["all-reduce"] += round(2 * replicas * unit.shard * wide)
    sent["all-reduce, parameters kept whole"] = round(2 * (shard + replicas) * apart)
    return sent


def least_memory(config: Config, mesh: Mesh) -> int:
    """Bytes that a rank holds at the very least: weights, moments, and the residual stream before each layer."""
    tokens = config.trainer.micro_batch_size * config.data.seq_length
    precision = config.trainer.precision
    stream = tokens * config.model.hidden_size * DTYPES[precision].itemsize
    split = mesh.tp if config.parallel.sequence_parallel else 1
    return 3 * master_dtype(precision).itemsize * _sharded_elements(config, mesh) + len(config.model.layers) * stream // split


def _sharded_elements(config: Config, mesh: Mesh) -> int:
    """Elements of a rank's part of the weights that FSDP shards."""
    return sum(unit.shard for unit in units_of(model_pieces(_few_tokens(config), mesh.dp_shard)))


def _few_tokens(config: Config) -> Config:
    trainer = replace(config.trainer, micro_batch_size=1)
    return replace(config, trainer=trainer, data=replace(config.data, seq_length=16 * config.parallel.tp))


def bandwidth(gpu: Gpu, stride: int, size: int) -> float:
    """Bytes/s that a rank sends in a ring of `size` ranks, `stride` apart: inside a node by NVLink, over nodes as fast as the
    adapters of those of a node's GPUs that are in the ring."""
    if stride * size <= GPUS_PER_NODE:
        return REACHED * gpu.nvlink_gb * 1e9
    return REACHED * min(gpu.nvlink_gb, gpu.network_gb * max(GPUS_PER_NODE // stride, 1)) * 1e9


def step_seconds(config: Config, mesh: Mesh, gpu: Gpu, efficiency: float) -> dict[str, float]:
    """Seconds of a step by what takes them, with compute at `efficiency` of the GPU's peak.

    tp's collectives are waited for; FSDP's run beside the compute of the same pass, and what is longer than it shows.
    """
    batches, tokens = mesh.micro_batches, config.trainer.micro_batch_size * config.data.seq_length
    second = mesh.tp * efficiency * gpu.tflops * 1e12 / tokens
    forward = flops_per_token(config.model, config.data.seq_length) / second
    backward = training_flops(config) / second - forward
    dp = dp_traffic(config, mesh)
    shards, replicas = bandwidth(gpu, mesh.tp, mesh.dp_shard), bandwidth(gpu, mesh.tp * mesh.dp_shard, mesh.dp_replicate)
    again = config.parallel.reshard_after_forward
    before_forward = dp["all-gather, forward"] / shards / (batches if again else 1)
    before_backward = dp["all-gather, backward"] / shards / batches
    often = batches if config.parallel.reduce_gradients == "micro_batch" else 1
    summing = (dp["reduce-scatter"] / shards + dp["all-reduce"] / replicas) / often
    # Per step: forward passes that gather; backward passes that gather only, and that sum gradients too.
    exposed = (batches if again else 1) * max(before_forward - forward, 0.0)
    exposed += (batches - often) * max(before_backward - backward, 0.0)
    exposed += often * max(before_backward + summing - backward, 0.0)
    exposed += dp["all-reduce, parameters kept whole"] / min(shards, replicas)
    return {
        "compute": batches * (forward + backward),
        "tp communication": tp_bytes(config, mesh) / bandwidth(gpu, 1, mesh.tp),
        "dp communication beyond compute": exposed,
        "optimizer": _sharded_elements(config, mesh) * OPTIMIZER_BYTES / (REACHED * gpu.memory_gb * 1e9),
    }
