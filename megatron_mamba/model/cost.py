"""What a step sends over the network and how long it takes at stated speeds: enough to rank layouts, not a promise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import NamedTuple

from megatron_mamba.config import Config, DataConfig, TrainerConfig
from megatron_mamba.layout import ParallelConfig, RecomputeConfig
from megatron_mamba.model.flops import layer_flops, output_flops, projection_flops, recomputed_flops
from megatron_mamba.model.lm import DTYPES, master_dtype
from megatron_mamba.model.memory import Sent, combined, measure
from megatron_mamba.model.schedule import ROUNDS, StageTime, pipeline_time
from megatron_mamba.model.stages import Stage, rank_of
from megatron_mamba.model.step_memory import Unit, model_pieces, units_of
from megatron_mamba.parallel.dry_run import pipeline_actions

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
    cp: int = 1
    pp: int = 1

    @property
    def shards(self) -> int:
        """Ranks over which FSDP shards a weight."""
        return self.dp_shard * self.cp

    @property
    def gpus(self) -> int:
        return self.pp * self.dp_replicate * self.shards * self.tp


def parts_of(config: Config, stage: Stage) -> list[str]:
    """What a stage consists of, in order: "embedding", kinds of layers, "output"."""
    layers = [config.model.layers[i] for i in stage.layers]
    return ["embedding"] * stage.is_first + layers + ["output"] * stage.is_last


def ranks_of(config: Config, stages: Sequence[Stage]) -> list[list[Stage]]:
    """The stages of each pipeline rank."""
    found: list[list[Stage]] = [[] for _ in range(config.parallel.pp)]
    for stage in stages:
        found[rank_of(stage.index, config.parallel)].append(stage)
    return found


def traffic(config: Config) -> dict[str, Sent]:
    """Bytes that a rank sends to its tp and cp ranks for a micro-batch, by part (one layer of its kind)."""
    # Sequences add up, and a longer one adds as much for each token: two short ones are enough.
    few = _few_tokens(config)
    return _grown(few, config.data.seq_length / few.data.seq_length - 1, config.trainer.micro_batch_size)


@cache
def _grown(few: Config, steps: float, batch: int) -> dict[str, Sent]:
    more = replace(few, data=replace(few.data, seq_length=2 * few.data.seq_length))

    def grown(a: int, b: int) -> int:
        return round(batch * (a + (b - a) * steps))

    kinds = ("embedding", *sorted({*few.model.layers}), "output")
    return {kind: combined(measure(few, kind).sent, measure(more, kind).sent, grown) for kind in kinds}


def step_bytes(config: Config, mesh: Mesh, dimension: str, parts: Iterable[str]) -> int:
    """Bytes that a rank with these `parts` of the model sends to its "tp" or "cp" ranks in a step."""
    sent = traffic(config)
    return mesh.micro_batches * sum(ops.total() for part in parts for ops in sent[part].get(dimension, {}).values())


def border_bytes(config: Config) -> int:
    """Bytes of one micro-batch's residual stream on a rank, as stages hand it on."""
    tokens = config.trainer.micro_batch_size * config.data.seq_length // config.parallel.cp
    rows = tokens // (config.parallel.tp if config.parallel.sequence_parallel else 1)
    return rows * config.model.hidden_size * DTYPES[config.trainer.precision].itemsize


def pp_bytes(config: Config, mesh: Mesh, stages: Sequence[Stage], pp_rank: int) -> int:
    """Bytes that a rank sends to other pipeline ranks in a step: residual streams forward, their gradients back."""
    ranks = [rank_of(stage.index, config.parallel) for stage in stages]
    away = sum((a == pp_rank) + (b == pp_rank) for a, b in pairwise(ranks) if a != b)
    return mesh.micro_batches * border_bytes(config) * away


def dp_traffic(config: Config, mesh: Mesh, stages: Sequence[Stage], pp_rank: int = 0) -> Counter[str]:
    """Bytes that a rank sends in a step to the ranks that share, or have, the same weights, by collective."""
    precision = config.trainer.precision
    wide, narrow = master_dtype(precision).itemsize, DTYPES[precision].itemsize
    shard, replicas = (mesh.shards - 1) / mesh.shards, (mesh.dp_replicate - 1) / mesh.dp_replicate
    sums = mesh.micro_batches if config.parallel.reduce_gradients == "micro_batch" else 1
    sent: Counter[str] = Counter({"all-gather, forward": 0, "all-gather, backward": 0, "reduce-scatter": 0, "all-reduce": 0})
    for stage in ranks_of(config, stages)[pp_rank]:
        pieces = model_pieces(_few_tokens(config), mesh.shards, stage)
        for unit in units_of(pieces):
            size = shard * unit.whole * narrow
            forward, backward = gathers(config, mesh, stage, unit)
            sent["all-gather, forward"] += round(size * forward)
            sent["all-gather, backward"] += round(size * backward)
            sent["reduce-scatter"] += round(sums * shard * unit.whole * wide)
            sent["all-reduce"] += round(2 * replicas * unit.shard * wide)
        apart = sum(count for _, _, piece, _ in pieces for count in piece.apart) * wide
        sent["all-reduce, parameters kept whole"] += round(2 * (shard + replicas) * apart)
    return sent


def gathers(config: Config, mesh: Mesh, stage: Stage, unit: Unit) -> tuple[float, float]:
    """How often the weights of a unit are gathered in a step, before forward and before backward passes.

    In a pipeline they stay after a backward pass (for the next one, or for a forward pass between them).
    """
    again = config.parallel.reshard_after_forward and not unit.root
    if mesh.pp == 1:
        forward = mesh.micro_batches if again else 1
        return forward, mesh.micro_batches * (again and not unit.unread)
    layout = config.parallel
    count = min(mesh.micro_batches, ROUNDS * mesh.pp)
    order = pipeline_actions(layout.schedule, layout.pp, layout.stages, count)[rank_of(stage.index, layout)]
    there, found = False, Counter[str]()
    for kind in (action.kind for action in order if action.stage == stage.index):
        if kind in ("F", "UNSHARD"):
            found["forward"] += not there
            there = kind == "UNSHARD" or not again
        elif kind in ("B", "I") and not unit.unread:
            found["backward"] += not there
            there = True
        elif kind == "RESHARD":
            there = False
    # Of more micro-batches, each next one needs what the later half of these did: all the same, in a steady order.
    more = mesh.micro_batches / count if again else 1.0
    return found["forward"] * (more if unit.unread else 1.0), found["backward"] * more


def least_memory(config: Config, mesh: Mesh, stages: Sequence[Stage]) -> int:
    """Bytes that the fullest rank holds at the very least: weights, moments, and the residual stream before each layer."""
    precision = config.trainer.precision

    def of(here: list[Stage]) -> int:
        layers = sum(len(stage.layers) for stage in here)
        return 3 * master_dtype(precision).itemsize * _sharded_elements(config, mesh, here) + layers * border_bytes(config)

    return max(of(here) for here in ranks_of(config, stages))


def _sharded_elements(config: Config, mesh: Mesh, here: Iterable[Stage]) -> int:
    """Elements of a rank's part of the weights of its stages that FSDP shards."""
    few = replace(_few_tokens(config), recompute=RecomputeConfig(), parallel=ParallelConfig(tp=mesh.tp))
    return sum(_elements(few, mesh.shards, stage) for stage in here)


@cache
def _elements(few: Config, shards: int, stage: Stage) -> int:
    return sum(unit.shard for unit in units_of(model_pieces(few, shards, stage)))


def _few_tokens(config: Config) -> Config:
    """One short sequence a micro-batch, and nothing in it that does not matter to a layer."""
    own, trainer = config.parallel, config.trainer
    layout = ParallelConfig(cp=own.cp, tp=own.tp, sequence_parallel=own.sequence_parallel, schedule=own.schedule)
    return Config(
        config.model,
        layout,
        config.recompute,
        DataConfig(seq_length=16 * own.tp * own.cp),
        trainer=TrainerConfig(precision=trainer.precision, loss_chunk_tokens=trainer.loss_chunk_tokens),
    )


def bandwidth(gpu: Gpu, stride: int, size: int) -> float:
    """Bytes/s that a rank sends in a ring of `size` ranks, `stride` apart: inside a node by NVLink, over nodes as fast as the
    adapters of those of a node's GPUs that are in the ring."""
    if stride * size <= GPUS_PER_NODE:
        return REACHED * gpu.nvlink_gb * 1e9
    return REACHED * min(gpu.nvlink_gb, gpu.network_gb * max(GPUS_PER_NODE // stride, 1)) * 1e9


def kind_seconds(config: Config, mesh: Mesh, gpu: Gpu, efficiency: float) -> dict[str, dict[str, StageTime]]:
    """Seconds of one micro-batch in each part of the model (one layer of its kind), of what takes them: "compute" at `efficiency`
    of the GPU's peak, and what is sent over "tp" and "cp"."""
    model, length = config.model, config.data.seq_length
    tokens = config.trainer.micro_batch_size * length / mesh.cp
    second = mesh.tp * efficiency * gpu.tflops * 1e12 / tokens
    rates = {"tp": bandwidth(gpu, 1, mesh.tp), "cp": bandwidth(gpu, mesh.tp, mesh.cp)}
    # The loss computes its gradients in the forward pass.
    found = {"embedding": {"compute": StageTime(0, 0)}, "output": {"compute": StageTime(3 * output_flops(model) / second, 0)}}
    for kind in {*model.layers}:
        forward = layer_flops(model, kind, length)
        weights = projection_flops(model, kind) if config.parallel.defers_weights else 0.0
        backward = 2 * forward + recomputed_flops(config, kind) - weights
        found[kind] = {"compute": StageTime(forward / second, backward / second, weights / second)}
    for kind, sent in traffic(config).items():
        for dimension, passes in sent.items():
            times = (passes.get(when, Counter()).total() / rates[dimension] for when in ("forward", "backward", "weights"))
            found[kind][dimension] = StageTime(*times)
    return found


def total(times: Iterable[StageTime]) -> StageTime:
    """Their sum, pass by pass."""
    return StageTime(*(sum(column) for column in zip(StageTime(0, 0, 0), *times, strict=True)))


def step_seconds(config: Config, mesh: Mesh, stages: Sequence[Stage], gpu: Gpu, efficiency: float) -> dict[str, float]:
    """Seconds of a step by what takes them, on the pipeline rank that works the longest.

    tp's and cp's collectives are waited for; FSDP's run beside the compute of the same pass, and what is longer than it shows;
    at the end of a pipeline's step there is nothing beside which gradients could be summed.
    """
    kinds = kind_seconds(config, mesh, gpu, efficiency)
    times = [total(time for part in parts_of(config, stage) for time in kinds[part].values()) for stage in stages]
    between = (gpu.nvlink_gb if mesh.gpus <= GPUS_PER_NODE else gpu.network_gb) * REACHED * 1e9
    step = pipeline_time(config.parallel, mesh.micro_batches, times, border_bytes(config) / between)
    rank = step.busy.index(max(step.busy))
    here = ranks_of(config, stages)
    parts = [part for stage in here[rank] for part in parts_of(config, stage)]
    spent = {
        what: mesh.micro_batches * sum(sum(kinds[part].get(what, (0.0,))) for part in parts) for what in ("compute", "tp", "cp")
    }
    exposed = max(_exposed(config, mesh, stages, times, i, gpu) for i in range(mesh.pp))
    updated = max(_sharded_elements(config, mesh, some) for some in here)
    return {
        "compute": spent["compute"],
        "tp communication": spent["tp"],
        "cp communication": spent["cp"],
        "waiting for other stages": max(step.total - step.busy[rank], 0.0),
        "dp communication beyond compute": exposed,
        "optimizer": updated * OPTIMIZER_BYTES / (REACHED * gpu.memory_gb * 1e9),
    }


def _exposed(config: Config, mesh: Mesh, stages: Sequence[Stage], times: Sequence[StageTime], pp_rank: int, gpu: Gpu) -> float:
    """Seconds of a step in which a rank only gathers weights or sums gradients."""
    batches, dp = mesh.micro_batches, dp_traffic(config, mesh, stages, pp_rank)
    shards = bandwidth(gpu, mesh.tp, mesh.shards)
    replicas = bandwidth(gpu, mesh.tp * mesh.shards, mesh.dp_replicate)
    time = total(times[stage.index] for stage in ranks_of(config, stages)[pp_rank])
    forward, backward = time.forward, time.backward + time.weights
    # How often all weights of the rank are gathered at a time, as far as they are at all.
    often_forward = batches if config.parallel.reshard_after_forward and mesh.pp == 1 else 1
    before_forward = dp["all-gather, forward"] / shards / often_forward
    before_backward = dp["all-gather, backward"] / shards / batches
    whole = dp["all-reduce, parameters kept whole"] / min(shards, replicas)
    exposed = often_forward * max(before_forward - forward, 0.0) + whole
    if mesh.pp > 1:
        summing = dp["reduce-scatter"] / shards + dp["all-reduce"] / replicas
        return exposed + batches * max(before_backward - backward, 0.0) + summing
    often = batches if config.parallel.reduce_gradients == "micro_batch" else 1
    summing = (dp["reduce-scatter"] / shards + dp["all-reduce"] / replicas) / often
    # Backward passes that gather only, and that sum gradients too.
    exposed += (batches - often) * max(before_backward - backward, 0.0)
    return exposed + often * max(before_backward + summing - backward, 0.0)
