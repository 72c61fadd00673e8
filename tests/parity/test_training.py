"""N ranks train as one rank does: loss, every gradient, gradient norm and the weights after two steps, in float64.

Each test is a mesh and runs all patterns. Over data- and tensor-parallel ranks each pattern runs with and without sequence
parallelism and with every kind of recomputation; over context-parallel ranks and pipelines without recomputation and with one
kind of it, in turn.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

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


@pytest.mark.parametrize("mesh", MESHES)
def test_ranks_train_as_one(mesh: str, one_rank: Alone, record_property: Callable[[str, object], None]) -> None:
    cases, expected = {}, {}
    for pattern in LONGER:
        for recompute, config in RECOMPUTE.items():
            for sequence_parallel in (False, True) if "tp" in MESHES[mesh] else (False,):
                name = f"{pattern}, recompute {recompute}, {'with' if sequence_parallel else 'without'} sequence parallelism"
                batch = batch_on(mesh)
                cases[name] = Case(MODELS[pattern], recompute=config, sequence_parallel=sequence_parallel, batch=batch)
                expected[name] = one_rank[pattern, batch]
    check(cases, MESHES[mesh], expected, record_property)


@pytest.mark.parametrize("mesh", LAID)
def test_ranks_train_as_one_over_context_and_pipeline(
    mesh: str, one_rank: Alone, record_property: Callable[[str, object], None]
) -> None:
    """Micro-batches are as many as make a pipeline's schedule go through all its parts."""
    laid, cases, expected = LAID[mesh], {}, {}
    batch, micro_batches = (8, 4) if "pp" in laid.sizes else (4, 2)
    for i, (short, longer) in enumerate(LONGER.items()):
        pattern = longer if "pp" in laid.sizes else short
        for again, recompute in enumerate(("none", ("selective", "full")[i % 2])):
            name = f"{pattern}, recompute {recompute}"
            cases[name] = Case(
                MODELS[pattern],
                recompute=RECOMPUTE[recompute],
                sequence_parallel=bool((i + again) % 2),
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


@pytest.mark.parametrize("setting", [{"reshard_after_forward": False}, {"reduce_every_micro_batch": True}])
@pytest.mark.parametrize("mesh", ["dp2", "dp_replicate2 dp_shard2", "tp2 dp2"])
def test_what_fsdp_keeps_makes_no_difference(mesh: str, setting: dict[str, bool], one_rank: Alone) -> None:
    case = Case(MODELS["M*-"], batch=batch_on(mesh), **setting)
    found = compare_training({"case": case}, MESHES[mesh], {"case": one_rank["M*-", batch_on(mesh)]})["case"]
    assert max(found.values()) <= 1e-10, found


@pytest.mark.parametrize("mesh", ["tp2 dp2", "dp_replicate2 dp_shard2"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-2)])
def test_lower_precisions_train_on_ranks_too(precision: str, tolerance: float, mesh: str, one_rank: Alone) -> None:
    """FSDP chooses its collectives by dtype: those of fp32 gradients are not those of fp64."""
    case = Case(MODELS["M*-"], precision=precision, sequence_parallel=True, batch=batch_on(mesh))
    found = compare_training({"case": case}, MESHES[mesh], {"case": one_rank["M*-", batch_on(mesh)]})["case"]
    assert max(found["loss"], found["norm"]) <= tolerance, found
