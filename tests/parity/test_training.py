"""N ranks train as one rank does: loss, every gradient, gradient norm and the weights after two steps, in float64.

Each test is a mesh and runs all patterns, each with and without sequence parallelism and with every kind of recomputation.
"""

from collections.abc import Callable

import pytest

from harness import Case, Result, compare_training, train_alone
from megatron_mamba.config import RecomputeConfig
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
RECOMPUTE = {name: RecomputeConfig(name, name, name, name) for name in ("none", "selective", "full")}

Alone = dict[tuple[str, int], Result]
"""What one rank found, by pattern and batch."""


def batch_on(mesh: str) -> int:
    """Two micro-batches of one sequence or more on each data-parallel rank."""
    return 2 * max(MESHES[mesh].get("dp_shard", 1) * MESHES[mesh].get("dp_replicate", 1), 2)


@pytest.fixture(scope="module")
def one_rank() -> Alone:
    """What one rank, which recomputes nothing, finds for every pattern and batch."""
    cases = {(pattern, batch): Case(model, batch=batch) for pattern, model in MODELS.items() for batch in (4, 8)}
    return dict(zip(cases, train_alone(cases.values()), strict=True))


@pytest.mark.parametrize("mesh", MESHES)
def test_ranks_train_as_one(mesh: str, one_rank: Alone, record_property: Callable[[str, object], None]) -> None:
    cases, expected = {}, {}
    for pattern, model in MODELS.items():
        for recompute, config in RECOMPUTE.items():
            for sequence_parallel in (False, True) if "tp" in MESHES[mesh] else (False,):
                name = f"{pattern}, recompute {recompute}, {'with' if sequence_parallel else 'without'} sequence parallelism"
                batch = batch_on(mesh)
                cases[name] = Case(model, recompute=config, sequence_parallel=sequence_parallel, batch=batch)
                expected[name] = one_rank[pattern, batch]
    found = compare_training(cases, MESHES[mesh], expected)
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
