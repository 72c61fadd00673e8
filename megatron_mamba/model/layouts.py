"""Which layouts of a model over GPUs fit, and which of them are predicted to train fastest."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from megatron_mamba.config import Config, ConfigError, RecomputeConfig, require, require_positive
from megatron_mamba.layout import Recompute
from megatron_mamba.model.cost import GPUS, GPUS_PER_NODE, Mesh, least_memory, step_seconds
from megatron_mamba.model.step_memory import step_memory

RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")


def mesh_of(config: Config, gpus: int | None) -> Mesh:
    """The mesh of `config` on `gpus` ranks (None: as few as it needs). Raises :class:`ConfigError` for what training would
    refuse."""
    config.model.validate()
    config.parallel.validate()
    trainer, parallel = config.trainer, config.parallel
    remedy = "Use 1 or more"
    require_positive(config.data, "data", "seq_length", remedy=remedy)
    require(gpus is None or gpus > 0, "--gpus", gpus, "must be positive", remedy)
    require_positive(trainer, "trainer", "micro_batch_size", "global_batch_size", "loss_chunk_tokens", remedy=remedy)
    parallel.check_split(config.model.split_units(), trainer.micro_batch_size * config.data.seq_length)
    if gpus is None:
        gpus = parallel.pp * parallel.dp_replicate * max(parallel.dp_shard, 1) * parallel.cp * parallel.tp
    _, dp_replicate, dp_shard, _, tp = parallel.sizes(gpus)
    micro_batches = trainer.micro_batches("trainer.global_batch_size", trainer.global_batch_size, dp_replicate * dp_shard)
    return Mesh(dp_replicate, dp_shard, tp, micro_batches)


def check_speeds(config: Config) -> None:
    """Raise :class:`ConfigError` for a configuration whose time is not predicted."""
    require(config.trainer.precision == "bf16", "trainer.precision", config.trainer.precision,
            "a time is predicted for bf16 only", "Leave out --gpu and --search, or use trainer.precision=bf16")  # fmt: skip


def search(config: Config, gpus: int, gpu: str = "h200", efficiency: float = 0.4, top: int = 20) -> list[dict[str, Any]]:
    """The `top` layouts on `gpus` GPUs that fit and are predicted the fastest, best first: settings, bytes and seconds."""
    check_speeds(config)
    require(gpus > 0, "--search", gpus, "must be positive", "Use 1 or more")
    alone = replace(config.parallel, tp=1, sequence_parallel=False, dp_shard=1, dp_replicate=1)
    mesh_of(replace(config, parallel=alone, trainer=replace(config.trainer, micro_batch_size=1)), 1)
    timed: list[tuple[float, int, Config, Mesh]] = []
    possible = 0
    for layout in _layouts(config, gpus):
        try:
            mesh = mesh_of(layout, gpus)
        except ConfigError:
            continue
        possible += 1
        if least_memory(layout, mesh) <= GPUS[gpu].usable:
            timed.append((sum(step_seconds(layout, mesh, GPUS[gpu], efficiency).values()), possible, layout, mesh))
    require(possible > 0, "--search", gpus, "no layout of so many GPUs can run this model and batch",
            "Use a number of GPUs whose divisors divide trainer.global_batch_size")  # fmt: skip
    found: list[dict[str, Any]] = []
    too_large: list[tuple[Config, Mesh]] = []
    # Memory takes longer to find than time, so it is looked at in the order of time until enough layouts fit.
    for seconds, _, layout, mesh in sorted(timed, key=lambda entry: entry[:2]):
        if any(_is_larger(layout, mesh, *other) for other in too_large):
            continue
        memory = step_memory(layout, mesh.dp_shard, mesh.micro_batches)
        if memory.peak > GPUS[gpu].usable:
            too_large.append((layout, mesh))
        else:
            found.append({
                "tp": mesh.tp,
                "sequence_parallel": layout.parallel.sequence_parallel,
                "dp_shard": mesh.dp_shard,
                "dp_replicate": mesh.dp_replicate,
                "reshard_after_forward": layout.parallel.reshard_after_forward,
                "micro_batch_size": layout.trainer.micro_batch_size,
                "recompute": layout.recompute.mlp,
                "peak": memory.peak,
                "seconds": seconds,
            })  # fmt: skip
        if len(found) == top:
            break
    return found


def _is_larger(layout: Config, mesh: Mesh, other: Config, others: Mesh) -> bool:
    """Whether `layout` holds at least what `other` does: less is shared out, more is computed at a time, or more is kept."""
    a, b = layout.parallel, other.parallel
    return (
        (a.tp, a.sequence_parallel, layout.recompute) == (b.tp, b.sequence_parallel, other.recompute)
        and a.dp_shard <= b.dp_shard
        and layout.trainer.micro_batch_size >= other.trainer.micro_batch_size
        and a.reshard_after_forward <= b.reshard_after_forward
        and min(mesh.micro_batches, 2) >= min(others.micro_batches, 2)
    )


def _layouts(config: Config, gpus: int) -> Iterator[Config]:
    """Every layout worth asking about: tp inside a node, micro-batches of powers of two."""
    sizes = [n for n in range(1, gpus + 1) if gpus % n == 0]
    micro_batches = [2**i for i in range(config.trainer.global_batch_size.bit_length())]
    for tp, dp_replicate, micro_batch, recompute in itertools.product(sizes, sizes, micro_batches, RECOMPUTE):
        if tp > GPUS_PER_NODE or gpus % (tp * dp_replicate):
            continue
        dp_shard = gpus // tp // dp_replicate
        trainer = replace(config.trainer, micro_batch_size=micro_batch)
        again = RecomputeConfig(recompute, recompute, recompute, recompute)
        # On one rank there is nothing to gather again, or to split.
        for split, reshard in itertools.product((True, False)[tp == 1 :], (True, False)[: 1 + (dp_shard > 1)]):
            parallel = replace(config.parallel, tp=tp, dp_replicate=dp_replicate, dp_shard=dp_shard, sequence_parallel=split,
                               reshard_after_forward=reshard)  # fmt: skip
            yield replace(config, parallel=parallel, trainer=trainer, recompute=again)
