"""Pipeline stages: the split is the best there is, borders are obeyed, and measured costs are those of the run's layers."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from itertools import combinations, pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from harness import on_ranks
from megatron_mamba.config import Config, ConfigError, from_dict
from megatron_mamba.model import timing
from megatron_mamba.model.flops import training_flops
from megatron_mamba.model.stages import (
    NEAR,
    Stage,
    flop_costs,
    imbalance,
    rank_costs,
    rank_of,
    split,
    stage_costs,
    stages_of,
)
from megatron_mamba.parallel.context import ParallelContext
from megatron_mamba.train.__main__ import compose_tree


@cache
def composed(*overrides: str) -> Config:
    return from_dict(Config, compose_tree([*overrides]))


def config_of(pattern: str, *overrides: str, **parallel: Any) -> Config:
    config = composed("model=hybrid_tiny", *overrides)
    return replace(config, model=replace(config.model, pattern=pattern), parallel=replace(config.parallel, **parallel))


def every_split(layers: int, count: int) -> list[list[Stage]]:
    found = []
    for inner in combinations(range(1, layers), count - 1):
        borders = [0, *inner, layers]
        found.append([Stage(i, count, range(a, b)) for i, (a, b) in enumerate(pairwise(borders))])
    return found


@pytest.mark.parametrize("seed", range(30))
def test_split_is_the_best_of_all(seed):
    draw = random.Random(seed)
    layers = draw.randint(1, 10)
    count = draw.randint(1, layers)
    # Small whole numbers, for ties; or a costly end; or anything.
    costs = [float(draw.randint(1, 4)) if seed % 3 else draw.expovariate(1) for _ in range(layers + 2)]
    costs[-1] *= draw.choice([1, 8])
    model = config_of("M" * layers).model
    found = split(model, count, costs)

    def judged(stages: list[Stage]) -> tuple[float, float]:
        sizes = stage_costs(stages, costs)
        return round(max(sizes), 9), round(sum(size * size for size in sizes), 9)

    assert judged(found) == min(judged(stages) for stages in every_split(layers, count))
    assert [layer for stage in found for layer in stage.layers] == list(range(layers))
    assert all(stage.layers for stage in found)
    assert [(stage.index, stage.count, stage.is_first, stage.is_last) for stage in found] == [
        (i, count, i == 0, i == count - 1) for i in range(count)
    ]
    parts = [sum(costs[1 + layer] for layer in stage.layers) for stage in found]
    parts[0] += costs[0]
    parts[-1] += costs[-1]
    assert stage_costs(found, costs) == pytest.approx(parts)


def test_costs_are_those_of_training():
    config = config_of("M*-m", "recompute=full", "data.seq_length=512")
    costs = flop_costs(config)
    assert sum(costs) == pytest.approx(training_flops(config))
    assert (len(costs), costs[0], costs[-1]) == (6, 0.0, 6.0 * config.model.hidden_size * config.model.vocab_size)
    assert costs[2] > flop_costs(config_of("M*-m", "recompute=none", "data.seq_length=512"))[2]


@pytest.mark.parametrize(("pp", "most", "even"), [(2, 0.01, 0.13), (4, 0.05, 0.40), (8, 0.23, 0.98)])
def test_the_hybrid_at_4096(pp, most, even):
    config = from_dict(Config, compose_tree(["model=hybrid_8b", "data.seq_length=4096", f"parallel.pp={pp}"]))
    costs, layers = flop_costs(config), len(config.model.layers)
    assert imbalance(stage_costs(stages_of(config), costs)) <= most
    by_count = [Stage(i, pp, range(i * layers // pp, (i + 1) * layers // pp)) for i in range(pp)]
    assert imbalance(stage_costs(by_count, costs)) > even


@pytest.mark.parametrize(
    ("schedule", "each", "expected"),
    [("1f1b", None, [0, 1, 2]), ("interleaved", None, [0, 1, 2, 0, 1, 2]), ("zero_bubble", 3, [0, 1, 2] * 3),
     ("zbv", None, [0, 1, 2, 2, 1, 0])],
)  # fmt: skip
def test_ranks_of_stages(schedule, each, expected):
    config = config_of("M-*" * 4, pp=3, schedule=schedule, stages_per_rank=each)
    stages = stages_of(config)
    assert [rank_of(stage.index, config.parallel) for stage in stages] == expected
    costs = [float(i) for i in range(14)]
    sizes = stage_costs(stages, costs)
    assert rank_costs(stages, costs, config.parallel) == pytest.approx(
        [sum(size for size, rank in zip(sizes, expected, strict=True) if rank == r) for r in range(3)]
    )


@pytest.mark.parametrize("schedule", ["interleaved", "zbv"])
def test_sums_of_ranks_are_evened_out_too(schedule):
    config = from_dict(Config, compose_tree(["model=hybrid_8b"]))
    config = replace(config, parallel=replace(config.parallel, pp=4, schedule=schedule))
    costs = flop_costs(config)
    plain, found = split(config.model, 8, costs), stages_of(config)
    assert max(stage_costs(found, costs)) <= NEAR * max(stage_costs(plain, costs))
    assert max(rank_costs(found, costs, config.parallel)) < max(rank_costs(plain, costs, config.parallel))


def test_borders_decide():
    config = config_of("M|-*-|M", pp=3)
    assert [stage.layers for stage in stages_of(config)] == [range(1), range(1, 4), range(4, 5)]
    # What costs say does not matter then, and one stage is the whole model.
    assert stages_of(config, [9.0] + [0.0] * 6) == stages_of(config)
    assert stages_of(config_of("M|-*-|M")) == [Stage(0, 1, range(5))]
    assert len(stages_of(config_of("M|-|*|-", pp=2, schedule="interleaved"))) == 4


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (("M|-*-|M", {"pp": 2}), ("model.pattern = 'M|-*-|M'", "make 3 stages", "Write 1 borders")),
        (("M|-*-|M", {"pp": 3, "schedule": "interleaved"}), ("model.pattern = 'M|-*-|M'", "2 a rank 6", "Write 5 borders")),
        (("M||M", {"pp": 3}), ("model.pattern = 'M||M'", "has no layer", "Put a layer")),
        (("M-M", {"pp": 4}), ("model.pattern = 'M-M'", "has 3 layers, fewer than the pipeline's 4 stages", "to 3 or less")),
        (("M-M", {"pp": 2, "schedule": "zbv"}), ("model.pattern = 'M-M'", "4 stages", "to 3 or less")),
    ],
    ids=str,
)
def test_refusals(config, said):
    with pytest.raises(ConfigError) as error:
        stages_of(config_of(config[0], **config[1]))
    for words in said:
        assert words in str(error.value)


def test_a_wrong_number_of_costs_is_refused():
    with pytest.raises(ValueError, match="3 costs for embedding, 3 layers and output: give 5"):
        split(config_of("M-M").model, 2, [1.0, 1.0, 1.0])


SMALL = [
    "model.vocab_size=64", "model.hidden_size=32", "model.mamba.d_inner=64", "model.mamba.state_size=4", "model.mamba.dt_rank=4",
    "model.mamba2.d_inner=64", "model.mamba2.head_dim=16", "model.mamba2.state_size=4", "data.seq_length=16",
    "trainer.precision=fp32",
]  # fmt: skip


@pytest.mark.ranks
def test_measured_costs_are_the_same_on_every_rank():
    def body(context: ParallelContext) -> None:
        timing.WARM_UP, timing.RUNS = 1, 3
        costs = timing.measured_costs(config_of("M*-m-", *SMALL, "recompute=selective", tp=2, cp=2), context)
        assert len(costs) == 7
        assert min(costs) > 0
        assert costs[3] == costs[5]
        everyones = [torch.zeros(7, dtype=torch.float64) for _ in range(4)]
        torch.distributed.all_gather(everyones, torch.tensor(costs, dtype=torch.float64))
        assert all(torch.equal(everyones[0], other) for other in everyones)

    on_ranks({"tp": 2, "cp": 2}, body)


@pytest.mark.ranks
def test_measured_costs_grow_with_the_work():
    """With floating-point operations in place of seconds, which a busy machine would blur."""

    def body(context: ParallelContext) -> None:
        config = config_of("-", *SMALL, "model.mlp.ffn_size=64", "data.seq_length=64", "model.vocab_size=8192")
        more = config_of("-", *SMALL, "model.mlp.ffn_size=2048", "data.seq_length=64", "model.vocab_size=4096")
        with FlopCounterMode(display=False) as counter:
            timing.time = SimpleNamespace(perf_counter=counter.get_total_flops)
            embedding, layer, output = timing.measured_costs(config, context)
            assert timing.measured_costs(more, context) == [embedding, 32 * layer, output / 2]
        assert embedding == 0 < layer < output

    on_ranks({}, body)
