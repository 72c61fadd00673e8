"""Weights that ranks hold in common, compared bit for bit."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.distributed as dist

from harness import Case, on_ranks, pipeline_of
from megatron_mamba.parallel import health
from megatron_mamba.parallel.context import ParallelContext
from megatron_mamba.parallel.fsdp import local
from megatron_mamba.parallel.replicas import differing_replicas
from tiny import tiny

pytestmark = pytest.mark.ranks

NORM, MATRIX = "layers.0.norm.weight", "layers.0.mixer.in_proj_x"


def flip(named: dict[str, torch.Tensor], name: str, context: ParallelContext, rank: int) -> None:
    """Change the lowest bit of one number of this rank's part, or undo that."""
    if context.global_rank == rank:
        bits = local(named[name]).detach().view(torch.int64).view(-1)
        bits[bits.numel() // 2] ^= 1


@pytest.mark.parametrize(
    ("sizes", "changed"),
    [
        ({"dp_shard": 2}, [(NORM, 1, [0, 1])]),
        ({"tp": 2}, [(NORM, 0, [0, 1])]),
        ({"dp_replicate": 4}, [(NORM, 3, [3]), (MATRIX, 2, [2])]),
        ({"dp_replicate": 2, "tp": 2}, [(MATRIX, 3, [1, 3])]),
    ],
)
def test_one_bit_shows(sizes: dict[str, int], changed: list[tuple[str, int, list[int]]]) -> None:
    def body(context: ParallelContext) -> None:
        pipeline = pipeline_of(Case(tiny("M*", vocab_size=60)), context)
        named = dict(pipeline.named_parameters())
        assert differing_replicas(named.items(), context) == []
        for name, rank, shown in changed:
            flip(named, name, context, rank)
            ranks = ", ".join(f"rank {i} on {socket.gethostname()}" for i in shown)
            assert differing_replicas(named.items(), context) == [f"{name} ({ranks})"]
            flip(named, name, context, rank)
        assert differing_replicas(named.items(), context) == []
        dist.barrier()

    on_ranks(sizes, body)


def test_every_rank_knows_of_all_machines() -> None:
    def body(context: ParallelContext) -> None:
        readings = health.examine(context)
        assert len(readings) == 3
        assert all(reading.correct and reading.link_gbps is not None and reading.link_gbps > 0.0 for reading in readings)

    on_ranks({"dp_shard": 3}, body)


def test_a_matrix_that_is_sharded_may_differ() -> None:
    def body(context: ParallelContext) -> None:
        named = dict(pipeline_of(Case(tiny("M*", vocab_size=60)), context).named_parameters())
        flip(named, MATRIX, context, 1)
        assert differing_replicas(named.items(), context) == []

    on_ranks({"dp_shard": 2}, body)
