"""N ranks train as one rank does: loss, every gradient, gradient norm and the weights after two steps, in float64.

Each test is a mesh and runs all patterns. Settings take turns over patterns and meshes: tensor-parallel ranks run each pattern
without recomputation and with one kind of it, one of them with sequence parallelism; others do one of these. With ``--slow``
tensor- and data-parallel ranks run all combinations, the others both.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product

import pytest

from harness import Case, Result, compare_training, train_alone
from megatron_mamba.config import RecomputeConfig
from megatron_mamba.layout import Schedule
from tiny import tiny

pytestmark = pytest.mark.ranks

# Two groups and two key/value heads: four tp ranks share them.
SIZES = {"vocab_size": 60, "mamba2": {"d_inner": 64}}
MODELS = {
    "mm": tiny("mm", **SIZES),
    "MM": tiny("MM", norm="layernorm", **SIZES),
    "*-": tiny("*-", norm="layernorm1p", mlp={"activation": "swiglu"}, **SIZES),
    "M*-": tiny("M*-", **SIZES),
    "m-*": tiny("m-*", mlp={"activation": "squared_relu"}, tie_embeddings=True, **SIZES),
}
MESHES = {
    "tp2": {"tp": 2},
    "tp4": {"tp": 4},
    "dp2": {"dp_shard": 2},
    "dp4": {"dp_shard": 4},
    "dp_replicate2 dp_shard2": {"dp_replicate": 2, "dp_shard": 2},
    "tp2 dp2": {"tp": 2, "dp_shard": 2},
}


@dataclass(frozen=True)
class Laid:
    """A mesh with context parallelism or a pipeline."""

    sizes: dict[str, int]
    schedule: Schedule = "1f1b"


LAID = {
    "cp2": Laid({"cp": 2}),
    "cp4": Laid({"cp": 4}),
    "cp2 tp2": Laid({"cp": 2, "tp": 2}),
    "cp2 dp2": Laid({"cp": 2, "dp_shard": 2}),
    "pp2": Laid({"pp": 2}),
    "pp4": Laid({"pp": 4}),
    "pp2 interleaved": Laid({"pp": 2}, "interleaved"),
    "pp2 zero_bubble": Laid({"pp": 2}, "zero_bubble"),
    "pp2 zbv": Laid({"pp": 2}, "zbv"),
    "pp2 tp2 zbv": Laid({"pp": 2, "tp": 2}, "zbv"),
    "pp2 replicas2": Laid({"pp": 2, "dp_replicate": 2}),
    "pp2 cp2 dp2 zero_bubble": Laid({"pp": 2, "cp": 2, "dp_shard": 2}, "zero_bubble"),
}
LONGER = {"mm": "mmmm", "MM": "MMMM", "*-": "*-*-", "M*-": "M*-M", "m-*": "m-*m"}
"""Of each pattern, one with a layer for each of four stages, and embeddings of its own."""
MODELS |= {
    longer: replace(MODELS[pattern], pattern=longer, tie_embeddings=False) for pattern, longer in LONGER.items()
}
RECOMPUTE = {name: RecomputeConfig(name, name, name, name) for name in ("none", "selective", "full")}

Alone = dict[tuple[str, int], Result]
"""What one rank found, by pattern and batch."""


def batch_on(mesh: str) -> int:
    """Two micro-batches of one sequence or more on each data-parallel rank."""
    return 2 * max(MESHES[mesh].get("dp_shard", 1) * MESHES[mesh].get("dp_replicate", 1), 2)


@pytest.fixture(scope="module")
def one_rank() -> Alone:
    """What one rank, which recomputes nothing, finds for every pattern and batch."""
    cases = {(pattern, batch): Case(MODELS[pattern], batch=batch) for pattern in LONGER for batch in (4, 8)}
    cases |= {(pattern, 8): Case(MODELS[pattern], batch=8) for pattern in LONGER.values()}
    return dict(zip(cases, train_alone(cases.values()), strict=True))


def settings(turn: int, tp: bool, slow: bool) -> Iterator[tuple[str, bool]]:
    """The kinds of recomputation, each with whether there is sequence parallelism, of a pattern on a mesh."""
    if slow:
        yield from product(RECOMPUTE, (False, True) if tp else (False,))
    elif tp:
        split = bool(turn // 3 % 2)
        yield from (("none", not split), (("selective", "full")[turn % 2], split))
    else:
        yield [*RECOMPUTE][turn % 3], False


@pytest.mark.parametrize("mesh", MESHES)
def test_ranks_train_as_one(mesh: str, slow: bool, one_rank: Alone, record_property: Callable[[str, object], None]) -> None:
    cases, expected, batch = {}, {}, batch_on(mesh)
    for turn, pattern in enumerate(LONGER, start=list(MESHES).index(mesh)):
        for recompute, sequence_parallel in settings(turn, "tp" in MESHES[mesh], slow):
            name = f"{pattern}, recompute {recompute}, {'with' if sequence_parallel else 'without'} sequence parallelism"
            config = RECOMPUTE[recompute]
            cases[name] = Case(MODELS[pattern], recompute=config, sequence_parallel=sequence_parallel, batch=batch)
            expected[name] = one_rank[pattern, batch]
    check(cases, MESHES[mesh], expected, record_property)


@pytest.mark.parametrize("mesh", LAID)
def test_ranks_train_as_one_over_context_and_pipeline(
    mesh: str, slow: bool, one_rank: Alone, record_property: Callable[[str, object], None]
) -> None:
    """Micro-batches are as many as make a pipeline's schedule go through all its parts."""
    laid, cases, expected = LAID[mesh], {}, {}
    batch, micro_batches = (8, 4) if "pp" in laid.sizes else (4, 2)
    for turn, (short, longer) in enumerate(LONGER.items(), start=list(LAID).index(mesh)):
        pattern = longer if "pp" in laid.sizes else short
        for again in (0, 1) if slow else (turn // 2 % 2,):
            recompute = ("selective", "full")[turn % 2] if again else "none"
            name = f"{pattern}, recompute {recompute}"
            cases[name] = Case(
                MODELS[pattern],
                recompute=RECOMPUTE[recompute],
                sequence_parallel=bool((turn + again) % 2),
                batch=batch,
                micro_batches=micro_batches,
                schedule=laid.schedule,
            )
            expected[name] = one_rank[pattern, batch]
    check(cases, laid.sizes, expected, record_property)


def check(
    cases: dict[str, Case], sizes: dict[str, int], expected: dict[str, Result], record_property: Callable[[str, object], None]
) -> None:
    """Every case trains on a mesh of `sizes` as on one rank."""
    found = compare_training(cases, sizes, expected)
    record_property("parity", list(found.values()))
    assert found.keys() == cases.keys()
    wrong = {name: figures for name, figures in found.items() if not max(figures.values()) <= 1e-10}
    assert not wrong, wrong


@pytest.mark.parametrize("mesh", ["dp2", "dp_replicate2 dp_shard2", "tp2 dp2"])
def test_what_fsdp_keeps_makes_no_difference(mesh: str, one_rank: Alone, record_property: Callable[[str, object], None]) -> None:
    case = Case(MODELS["M*-"], batch=batch_on(mesh))
    cases = {
        "weights kept": replace(case, reshard_after_forward=False),
        "a sum each micro-batch": replace(case, reduce_every_micro_batch=True),
    }
    check(cases, MESHES[mesh], dict.fromkeys(cases, one_rank["M*-", case.batch]), record_property)


@pytest.mark.parametrize("mesh", ["tp2 dp2", "dp_replicate2 dp_shard2"])
def test_lower_precisions_train_on_ranks_too(mesh: str, one_rank: Alone) -> None:
    """FSDP chooses its collectives by dtype: those of fp32 gradients are not those of fp64."""
    case, tolerances = Case(MODELS["M*-"], sequence_parallel=True, batch=batch_on(mesh)), {"fp32": 1e-5, "bf16": 2e-2}
    cases = {precision: replace(case, precision=precision) for precision in tolerances}
    found = compare_training(cases, MESHES[mesh], dict.fromkeys(cases, one_rank["M*-", case.batch]))
    wrong = {name: figures for name, figures in found.items() if not max(figures["loss"], figures["norm"]) <= tolerances[name]}
    assert not wrong, wrong
