"""Which layouts of a model over GPUs fit, and which of them are predicted to train fastest."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from megatron_mamba.config import Config, ConfigError, RecomputeConfig, require, require_positive
from megatron_mamba.layout import Recompute, Schedule, Sums
from megatron_mamba.model.cost import GPUS, GPUS_PER_NODE, Gpu, Mesh, least_memory, step_seconds
from megatron_mamba.model.stages import Stage, stages_of
from megatron_mamba.model.step_memory import StepMemory, step_memory

RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")
LONG = 32768
"""Tokens of a sequence from which on a search spreads it over ranks even if it fits on one."""
LEAST_PIECE = 4096
"""Tokens of a piece of a sequence below which a search does not spread it."""
PIPELINES: tuple[Schedule, ...] = ("1f1b", "interleaved", "zbv")
SUMS: tuple[Sums, ...] = ("step", "micro_batch")
LARGEST_IN_PIPELINE = 4
"""Sequences of a micro-batch up to which a search looks at pipelines: they want many micro-batches."""


def mesh_of(config: Config, gpus: int | None) -> Mesh:
    """The mesh of `config` on `gpus` ranks (None: as few as it needs). Raises :class:`ConfigError` for what training would
    refuse."""
    config.model.validate()
    config.parallel.validate()
    trainer, parallel = config.trainer, config.parallel
    remedy = "Use 1 or more"
    require_positive(config.data, "data", "seq_length", remedy=remedy)
    require(gpus is None or gpus > 0, "--gpus", gpus, "must be positive", remedy)
    require_positive(trainer, "trainer", "micro_batch_size", "global_batch_size", remedy=remedy)
    trainer.check_chunk()
    config.check_layout()
    if gpus is None:
        gpus = parallel.pp * parallel.dp_replicate * max(parallel.dp_shard, 1) * parallel.cp * parallel.tp
    pp, dp_replicate, dp_shard, cp, tp = parallel.sizes(gpus)
    micro_batches = trainer.micro_batches("trainer.global_batch_size", trainer.global_batch_size, dp_replicate * dp_shard)
    size = trainer.global_batch_size
    parallel.check_micro_batches("trainer.global_batch_size", size, size, micro_batches)
    return Mesh(dp_replicate, dp_shard, tp, micro_batches, cp, pp)


def fullest(config: Config, mesh: Mesh, stages: Sequence[Stage]) -> tuple[int, list[StepMemory]]:
    """The pipeline rank that holds the most at one time, and the memory of each."""
    ranks = [step_memory(config, mesh.shards, mesh.micro_batches, stages, rank) for rank in range(mesh.pp)]
    return max(range(mesh.pp), key=lambda rank: ranks[rank].peak), ranks


def check_speeds(config: Config) -> None:
    """Raise :class:`ConfigError` for a configuration whose time is not predicted."""
    require(config.trainer.precision == "bf16", "trainer.precision", config.trainer.precision,
            "a time is predicted for bf16 only", "Leave out --gpu and --search, or use trainer.precision=bf16")  # fmt: skip


def search(config: Config, gpus: int, gpu: str = "h200", efficiency: float = 0.4, top: int = 20) -> list[dict[str, Any]]:
    """The `top` layouts on `gpus` GPUs that fit and are predicted the fastest, best first: settings, bytes and seconds.

    Looks at pipelines where there is more than one node, and at sequences spread over ranks from :data:`LONG` tokens on; at
    each anyway, and at both at once, if nothing else fits.
    """
    check_speeds(config)
    require(gpus > 0, "--search", gpus, "must be positive", "Use 1 or more")
    alone = replace(config.parallel, tp=1, sequence_parallel=False, dp_shard=1, dp_replicate=1, cp=1, pp=1, schedule="1f1b",
                    stages_per_rank=None)  # fmt: skip
    mesh_of(replace(config, parallel=alone, trainer=replace(config.trainer, micro_batch_size=1)), 1)
    config = replace(config, parallel=replace(config.parallel, stages_per_rank=None))
    spread, pipelined = config.data.seq_length >= LONG, gpus > GPUS_PER_NODE
    found = _found(config, gpus, GPUS[gpu], efficiency, top, _layouts(config, gpus, spread, pipelined))
    return found or _found(config, gpus, GPUS[gpu], efficiency, top, _layouts(config, gpus, True, True, both=True))


Candidate = tuple[Config, Mesh, list[Stage]]


def _found(
    config: Config, gpus: int, gpu: Gpu, efficiency: float, top: int, layouts: Iterable[Config]
) -> list[dict[str, Any]]:
    timed: list[tuple[float, int, Candidate]] = []
    possible = 0
    for layout in layouts:
        try:
            mesh, stages = mesh_of(layout, gpus), stages_of(layout)
        except ConfigError:
            continue
        possible += 1
        if least_memory(layout, mesh, stages) <= gpu.usable:
            seconds = sum(step_seconds(layout, mesh, stages, gpu, efficiency).values())
            timed.append((seconds, possible, (layout, mesh, stages)))
    require(possible > 0, "--search", gpus, "no layout of so many GPUs can run this model and batch",
            "Use a number of GPUs whose divisors divide trainer.global_batch_size")  # fmt: skip
    found: list[dict[str, Any]] = []
    too_large: list[tuple[Config, Mesh]] = []
    fitting: list[Config] = []
    # Memory takes longer to find than time, so it is looked at in the order of time until enough layouts fit.
    for seconds, _, (layout, mesh, stages) in sorted(timed, key=lambda entry: entry[:2]):
        if any(_is_larger(layout, mesh, *other) for other in too_large):
            continue
        # Sums of gradients after each micro-batch take time, and are for layouts that do not fit without.
        if replace(layout, parallel=replace(layout.parallel, reduce_gradients="step")) in fitting:
            continue
        rank, memory = fullest(layout, mesh, stages)
        if memory[rank].peak > gpu.usable:
            too_large.append((layout, mesh))
        else:
            fitting.append(layout)
            found.append({
                "tp": mesh.tp,
                "sequence_parallel": layout.parallel.sequence_parallel,
                "cp": mesh.cp,
                "pp": mesh.pp,
                "schedule": layout.parallel.schedule,
                "dp_shard": mesh.dp_shard,
                "dp_replicate": mesh.dp_replicate,
                "reshard_after_forward": layout.parallel.reshard_after_forward,
                "reduce_gradients": layout.parallel.reduce_gradients,
                "micro_batch_size": layout.trainer.micro_batch_size,
                "recompute": layout.recompute.mlp,
                "peak": memory[rank].peak,
                "seconds": seconds,
            })  # fmt: skip
        if len(found) == top:
            break
    return found


def _is_larger(layout: Config, mesh: Mesh, other: Config, others: Mesh) -> bool:
    """Whether `layout` holds at least what `other` does: less is shared out, more is computed at a time, or more is kept."""
    a, b = layout.parallel, other.parallel
    same = ("tp", "sequence_parallel", "cp", "pp", "schedule")
    return (
        all(getattr(a, name) == getattr(b, name) for name in same)
        and layout.recompute == other.recompute
        and a.dp_shard <= b.dp_shard
        and layout.trainer.micro_batch_size >= other.trainer.micro_batch_size
        and a.reshard_after_forward <= b.reshard_after_forward
        and a.reduce_gradients in ("step", b.reduce_gradients)
        and (mesh.pp == 1 or mesh.micro_batches >= others.micro_batches)
        and min(mesh.micro_batches, 2) >= min(others.micro_batches, 2)
    )


def _layouts(config: Config, gpus: int, spread: bool, pipelined: bool, both: bool = False) -> Iterator[Config]:
    """Every layout worth asking about: tp inside a node, micro-batches of powers of two; of pipelines and of sequences in pieces
    those that split tokens over tp, shard over all data-parallel ranks or none, and have small micro-batches (of pieces, of one
    sequence); of pipelines those that keep gathered weights."""
    sizes = [n for n in range(1, gpus + 1) if gpus % n == 0]
    batches = [2**i for i in range(config.trainer.global_batch_size.bit_length())]
    pieces = [n for n in sizes if n == 1 or (spread and config.data.seq_length // n >= LEAST_PIECE)]
    for tp, cp, pp, recompute in itertools.product(sizes, pieces, sizes if pipelined else [1], RECOMPUTE):
        if tp > GPUS_PER_NODE or gpus % (tp * cp * pp) or pp > len(config.model.layers) or (cp > 1 and pp > 1 and not both):
            continue
        dp = gpus // (tp * cp * pp)
        again = RecomputeConfig(recompute, recompute, recompute, recompute)
        for replicas, micro_batch in itertools.product([n for n in sizes if dp % n == 0], batches):
            if (cp > 1 or pp > 1) and replicas not in (1, dp):
                continue
            if micro_batch > (LARGEST_IN_PIPELINE if pp > 1 else batches[-1]) or (cp > 1 and micro_batch > 1):
                continue
            trainer = replace(config.trainer, micro_batch_size=micro_batch)
            # On one rank there is nothing to gather again, or to split.
            splits = (True, False)[tp == 1 :] if cp * pp == 1 else (tp > 1,)
            shards = dp // replicas * cp
            reshards = (False,) if pp > 1 else (True, False)[: 1 + (shards > 1)]
            several = pp == 1 and shards > 1 and micro_batch * dp < config.trainer.global_batch_size
            schedules = PIPELINES if pp > 1 else PIPELINES[:1]
            for split, reshard, schedule, sums in itertools.product(splits, reshards, schedules, SUMS[: 1 + several]):
                parallel = replace(config.parallel, tp=tp, cp=cp, pp=pp, dp_replicate=replicas, dp_shard=dp // replicas,
                                   sequence_parallel=split, reshard_after_forward=reshard, schedule=schedule,
                                   reduce_gradients=sums)  # fmt: skip
                yield replace(config, parallel=parallel, trainer=trainer, recompute=again)
