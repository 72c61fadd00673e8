"""How the pattern is cut into pipeline stages: where its `|` stand, or so that the stages cost the same.

A layer of each kind costs something else, and the output projection as much as several layers: stages of equally many layers
are far apart. Costs are counted FLOPs here; :mod:`megatron_mamba.model.timing` measures seconds instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise, product

from megatron_mamba.config import Config, ModelConfig, require
from megatron_mamba.layout import ParallelConfig
from megatron_mamba.model.flops import layer_flops, output_flops, recomputed_flops

NEAR = 1.02
"""Where a rank has several stages, its sum counts too: the largest stage may grow so much to even the sums out."""


@dataclass(frozen=True)
class Stage:
    """Part `index` of `count` of the model: consecutive layers; the first has the embedding, the last final norm and output."""

    index: int
    count: int
    layers: range

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.count - 1


def rank_of(stage: int, parallel: ParallelConfig) -> int:
    """The pipeline rank that has stage number `stage`: round after round, or with "zbv" there and back."""
    place = stage % parallel.pp
    return parallel.pp - 1 - place if parallel.schedule == "zbv" and stage // parallel.pp % 2 else place


def flop_costs(config: Config) -> list[float]:
    """FLOPs per token of embedding, every layer, and output: forward, backward and what the backward pass computes again."""
    length, kinds = config.data.seq_length, config.model.layers
    of_kind = {kind: 3 * layer_flops(config.model, kind, length) + recomputed_flops(config, kind) for kind in {*kinds}}
    return [0.0, *(of_kind[kind] for kind in kinds), 3 * output_flops(config.model)]


def stages_of(config: Config, costs: Sequence[float] | None = None) -> list[Stage]:
    """The stages of `config`: by the `|` of its pattern if it has any, else balanced by `costs` (see :func:`split`; default
    :func:`flop_costs`). One stage is the whole model, whatever the pattern's borders.

    If a rank has several stages, borders are then moved, one or two at a time and as long as no stage costs more than 2 %
    above the largest one of the best split, to lower the largest sum of a rank. Raises :class:`ConfigError` for borders that
    do not make as many stages as the layout has, and for fewer layers than stages.
    """
    model, parallel = config.model, config.parallel
    count = parallel.stages
    if count > 1 and "|" in model.pattern:
        parts = model.pattern.split("|")
        how = f"parallel.pp = {parallel.pp} with {count // parallel.pp} a rank"
        require(len(parts) == count, "model.pattern", model.pattern, f"its borders make {len(parts)} stages, {how} {count}",
                f"Write {count - 1} borders, or none to have the stages balanced")  # fmt: skip
        require(all(parts), "model.pattern", model.pattern, "a stage between two borders has no layer",
                "Put a layer between any two borders")  # fmt: skip
        return _stages([0, *accumulate(len(part) for part in parts)])
    costs = flop_costs(config) if costs is None else costs
    layout = ParallelConfig(pp=parallel.pp, schedule=parallel.schedule, stages_per_rank=parallel.stages_per_rank)
    return list(_balanced(model, layout, tuple(costs)))


@cache
def _balanced(model: ModelConfig, parallel: ParallelConfig, costs: tuple[float, ...]) -> tuple[Stage, ...]:
    stages = split(model, parallel.stages, costs)
    return tuple(stages if parallel.stages == parallel.pp else _even_ranks(stages, costs, parallel))


def split(model: ModelConfig, count: int, costs: Sequence[float]) -> list[Stage]:
    """`model` in `count` stages of one layer or more, of which the costliest costs the least that is possible; among such splits
    one with the smallest sum of squared costs. `costs`: of the embedding, every layer, and the output, in any unit.

    Exact, by dynamic programming over the layers. Raises :class:`ConfigError` for more stages than layers.
    """
    n = len(model.layers)
    require(count <= n, "model.pattern", model.pattern, f"has {n} layers, fewer than the pipeline's {count} stages",
            f"Lower parallel.pp x parallel.stages_per_rank to {n} or less")  # fmt: skip
    if len(costs) != n + 2:
        raise ValueError(f"{len(costs)} costs for embedding, {n} layers and output: give {n + 2}")
    total = _prefix(costs)

    def best(limit: float | None) -> tuple[float, list[int]]:
        """The least largest cost, or with a limit of each the least sum of squares; and the borders of one such split."""
        least = [[0.0 if i == 0 else math.inf for i in range(n + 1)]]
        begins: list[list[int]] = []
        for stage in range(count):
            row, begin = [math.inf] * (n + 1), [0] * (n + 1)
            for end in range(stage + 1, n - (count - stage - 1) + 1):
                for i in range(stage, end):
                    cost = _cost(total, i, end)
                    value = max(least[-1][i], cost) if limit is None else least[-1][i] + cost * cost
                    if value < row[end] and (limit is None or cost <= limit):
                        row[end], begin[end] = value, i
            least.append(row)
            begins.append(begin)
        borders = [n]
        for begin in reversed(begins):
            borders.append(begin[borders[-1]])
        return least[-1][n], borders[::-1]

    largest, _ = best(None)
    # Sums of the same costs in another order differ in the last digits.
    return _stages(best(largest * (1 + 1e-12))[1])


def stage_costs(stages: Sequence[Stage], costs: Sequence[float]) -> list[float]:
    """What each stage costs, of `costs` of embedding, every layer, and output."""
    total = _prefix(costs)
    return [_cost(total, stage.layers.start, stage.layers.stop) for stage in stages]


def rank_costs(stages: Sequence[Stage], costs: Sequence[float], parallel: ParallelConfig) -> list[float]:
    """What the stages of each pipeline rank cost together."""
    sums = [0.0] * parallel.pp
    for stage, cost in zip(stages, stage_costs(stages, costs), strict=True):
        sums[rank_of(stage.index, parallel)] += cost
    return sums


def imbalance(costs: Sequence[float]) -> float:
    """By how much the costliest is above the mean: 0 for equal ones."""
    return max(costs) / (sum(costs) / len(costs)) - 1


def _even_ranks(stages: list[Stage], costs: Sequence[float], parallel: ParallelConfig) -> list[Stage]:
    count, total = len(stages), _prefix(costs)
    ranks = [rank_of(i, parallel) for i in range(count)]
    limit = NEAR * max(stage_costs(stages, costs))

    def badness(borders: list[int]) -> tuple[float, float]:
        if any(begin >= end for begin, end in pairwise(borders)):
            return math.inf, math.inf
        sizes, sums = [_cost(total, begin, end) for begin, end in pairwise(borders)], [0.0] * parallel.pp
        for rank, size in zip(ranks, sizes, strict=True):
            sums[rank] += size
        return (max(sums), sum(s * s for s in sums)) if max(sizes) <= limit else (math.inf, math.inf)

    borders = [0, *(stage.layers.stop for stage in stages)]
    least, improved = badness(borders), True
    moves = list(product(range(1, count), range(1, count), (-1, 1), (-1, 0, 1)))
    while improved:
        improved = False
        for i, j, by, also in moves:
            moved = borders.copy()
            moved[i] += by
            moved[j] += also
            if (found := badness(moved)) < least:
                borders, least, improved = moved, found, True
    return _stages(borders)


def _prefix(costs: Sequence[float]) -> list[float]:
    """Cost of the embedding and the first i layers; for all layers that of the output too."""
    total = list(accumulate(costs[1:-1], initial=0.0))
    return [0.0, *(costs[0] + t for t in total[1:-1]), costs[0] + total[-1] + costs[-1]]


def _cost(total: Sequence[float], begin: int, end: int) -> float:
    return total[end] - total[begin]


def _stages(borders: Sequence[int]) -> list[Stage]:
    return [Stage(i, len(borders) - 1, range(a, b)) for i, (a, b) in enumerate(pairwise(borders))]
