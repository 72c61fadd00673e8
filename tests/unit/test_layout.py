"""The layout over ranks: which sizes fit which model, and that the remedy of every refusal works when it is followed."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from harness import on_ranks
from megatron_mamba.config import Config, ConfigError, DataConfig, ModelConfig, TrainerConfig, from_dict
from megatron_mamba.layout import ParallelConfig, Schedule, SplitUnits
from megatron_mamba.model import build
from megatron_mamba.model.parameters import parameter_table
from megatron_mamba.model.stages import rank_of
from megatron_mamba.parallel import tensor
from megatron_mamba.parallel.context import ParallelContext
from megatron_mamba.parallel.pipeline import SCHEDULES
from tiny import random_tokens, tiny

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("hybrid_8b", "mamba_8b", "mamba2_8b", "transformer_8b")
TOKENS = 4096
SHARED = {"g", "k"}
"""Letters of the dimensions whose units several ranks may share: B/C groups and key/value heads."""


def named(name: str) -> ModelConfig:
    return from_dict(ModelConfig, yaml.safe_load((ROOT / "configs" / "model" / f"{name}.yaml").read_text()))


MODELS = {name: named(name) for name in NAMES} | {
    "no power of two": tiny("M*-", hidden_size=12, vocab_size=90, mamba2={"d_inner": 72, "head_dim": 4, "n_groups": 6}),
    "odd": tiny("m", vocab_size=61),
}


def refusal(layout: ParallelConfig, model: ModelConfig, tokens: int = TOKENS) -> ConfigError | None:
    """Why `layout` cannot share out `model`, if it cannot."""
    try:
        layout.check_split(model.split_units(), 1, tokens, model.halo)
    except ConfigError as error:
        return error
    return None


def tables_sizes(model: ModelConfig) -> list[int]:
    """The sizes of tp below 600 at which every split parameter of the table can be cut in whole units, or shares them."""
    table = parameter_table(model).values()
    units = {(row.units, row.dims[row.split_dim] in SHARED) for row in table if row.split_dim is not None}
    return [tp for tp in range(1, 600) if all(n % tp == 0 or (shared and tp % n == 0) for n, shared in units)]


# ----------------------------------------------------------------------------------------------- tp against the model


@pytest.mark.parametrize("name", MODELS)
def test_refuses_what_the_parameter_table_cannot_split(name: str) -> None:
    """For every tp: refused exactly where a parameter cannot be shared out, with the nearest sizes that do."""
    model = MODELS[name]
    fits = tables_sizes(model)
    numbers = {unit.field: {unit.value, unit.units} for unit in model.split_units()}
    refused = 0
    for tp in range(1, 300):
        error = refusal(ParallelConfig(tp=tp), model)
        assert (error is None) == (tp in fits), (tp, error)
        if error is None:
            continue
        refused += 1
        assert (error.field, error.value) == ("parallel.tp", tp)
        field = next(field for field in numbers if f"({field} = " in error.problem)
        assert numbers[field] <= {int(n) for n in re.findall(r"\d+", error.problem)}, error
        suggested = [int(n) for n in re.findall(r"\d+", error.remedy.split(", or change ")[0])]
        above = [other for other in fits if tp < other < 2 * tp]
        assert suggested == [max(other for other in fits if other < tp), *above[:1]], error
        assert all(refusal(ParallelConfig(tp=other), model) is None for other in suggested)
        assert error.remedy.partition(" (a new model may pad it to ")[0].endswith(f", or change {field}")
    assert refused > 200


@pytest.mark.parametrize(
    ("name", "tp", "what", "remedy"),
    [
        ("hybrid_8b", 3, "the vocabulary (model.vocab_size = 256000)", "2 or 4"),
        ("hybrid_8b", 5, "128 Mamba-2 heads (model.mamba2.d_inner = 8192)", "4 or 8"),
        ("hybrid_8b", 64, "attention heads (model.attention.n_heads = 32)", "32"),
        ("hybrid_8b", 256, "128 Mamba-2 heads (model.mamba2.d_inner = 8192)", "32"),
        ("mamba_8b", 5, "Mamba's inner channels (model.mamba.d_inner = 8192)", "4 or 8"),
        ("mamba2_8b", 6, "the vocabulary (model.vocab_size = 256000)", "4 or 8"),
        ("mamba2_8b", 256, "128 Mamba-2 heads (model.mamba2.d_inner = 8192)", "128"),
        ("transformer_8b", 7, "the vocabulary (model.vocab_size = 256000)", "4 or 8"),
        ("transformer_8b", 64, "attention heads (model.attention.n_heads = 32)", "32"),
    ],
)
def test_says_what_cannot_be_shared_out(name: str, tp: int, what: str, remedy: str) -> None:
    error = refusal(ParallelConfig(tp=tp), MODELS[name])
    assert error is not None
    assert error.problem.startswith(f"{what} cannot be shared out evenly: it takes a divisor of ")
    assert error.remedy.startswith(f"Set parallel.tp={remedy}, or change model.")


@pytest.mark.parametrize(("name", "tp"), [(name, 16) for name in NAMES] + [("mamba2_8b", 128), ("mamba_8b", 256)])
def test_more_ranks_than_groups(name: str, tp: int) -> None:
    """8 B/C groups and 8 key/value heads on 16 ranks: two ranks share each."""
    assert refusal(ParallelConfig(tp=tp), MODELS[name]) is None


def test_groups_are_shared_by_a_multiple_of_ranks() -> None:
    error = refusal(ParallelConfig(tp=4), tiny("M", vocab_size=60, mamba2={"d_inner": 96, "n_groups": 3}))
    assert error is not None
    assert error.problem == (
        "Mamba-2's B/C groups (model.mamba2.n_groups = 3) cannot be shared out evenly: it takes a divisor or a multiple of 3"
    )
    assert error.remedy == "Set parallel.tp=3 or 6, or change model.mamba2.n_groups"


def test_only_mixers_of_the_pattern_count() -> None:
    """5 ranks share out an MLP; that attention's heads cannot be is no matter without attention."""
    assert refusal(ParallelConfig(tp=5), tiny("-", vocab_size=60)) is None
    assert refusal(ParallelConfig(tp=5), tiny("-*", vocab_size=60)) is not None


def test_a_run_is_refused_before_it_starts() -> None:
    trainer = TrainerConfig(train_samples=10)
    run = Config(MODELS["hybrid_8b"], data=DataConfig(kind="synthetic"), trainer=trainer)
    run.validate()
    for layout in (ParallelConfig(tp=3), ParallelConfig(tp=3, sequence_parallel=True)):
        remedy = r"Set parallel.tp=2 or 4, or change model.vocab_size \(a new model may pad it to 256002\)"
        with pytest.raises(ConfigError, match=rf"^parallel.tp = 3: .* {remedy}$"):
            replace(run, parallel=layout).validate()
        for tp in (2, 4):
            replace(run, parallel=replace(layout, tp=tp)).validate()


# ------------------------------------------------------------------------------------------------ sequence parallelism


def test_sequence_parallelism_needs_something_to_split() -> None:
    layout = ParallelConfig(sequence_parallel=True)
    with pytest.raises(ConfigError, match=r"nothing to split over parallel.tp = 1") as caught:
        layout.validate()
    assert (caught.value.field, caught.value.value) == ("parallel.sequence_parallel", True)
    assert caught.value.remedy == "Set parallel.sequence_parallel=false, or parallel.tp=2 or more"
    replace(layout, sequence_parallel=False).validate()
    replace(layout, tp=2).validate()


def test_sequence_parallelism_splits_tokens_evenly() -> None:
    model, trainer = MODELS["hybrid_8b"], TrainerConfig(train_samples=10, global_batch_size=6, micro_batch_size=2)
    run = Config(
        model, ParallelConfig(tp=8, sequence_parallel=True), data=DataConfig("synthetic", seq_length=4090), trainer=trainer
    )
    with pytest.raises(ConfigError) as caught:
        run.validate()
    error = caught.value
    assert (error.field, error.value) == ("parallel.sequence_parallel", True)
    tokens = "trainer.micro_batch_size x data.seq_length / parallel.cp = 8180 tokens"
    assert error.problem == f"{tokens} is not a multiple of parallel.tp = 8"
    assert error.remedy == "Make data.seq_length a multiple of 8"
    replace(run, data=replace(run.data, seq_length=4096)).validate()
    replace(run, parallel=ParallelConfig(tp=8)).validate()
    replace(run, parallel=replace(run.parallel, tp=4)).validate()


@pytest.mark.ranks
def test_model_refuses_what_it_cannot_split() -> None:
    """Tokens that sequence parallelism cannot split, and heads fewer than ranks: no rank goes on with something else."""

    def body(context: ParallelContext) -> None:
        split = replace(context, sequence_parallel=True)
        model = build(tiny("M-", vocab_size=60), split, precision="fp64")
        tokens = random_tokens(3, 6, vocab_size=60)
        with pytest.raises(ValueError, match="15 tokens cannot be split over 2 ranks by sequence parallelism"):
            model(tokens[:, :5], labels_BS=tokens[:, 1:])
        with pytest.raises(ValueError, match="3 tokens cannot be split"):
            model(tokens[:, :1])
        assert torch.isfinite(model(tokens, labels_BS=tokens))
        model = build(tiny("M-", vocab_size=60), context, precision="fp64")
        assert torch.isfinite(model(tokens[:, :5], labels_BS=tokens[:, 1:]))
        one_head = {"n_heads": 1, "n_kv_heads": 1}
        with pytest.raises(ConfigError, match=r"parallel.tp = 2: attention heads \(model.attention.n_heads = 1\)"):
            build(tiny("*", vocab_size=60, attention=one_head), context, device="meta")

    on_ranks({"tp": 2}, body)


# --------------------------------------------------------------------------------------------------- sizes of the mesh


@pytest.mark.parametrize(
    ("layout", "world", "sizes"),
    [
        (ParallelConfig(), 1, (1, 1, 1, 1, 1)),
        (ParallelConfig(), 6, (1, 1, 6, 1, 1)),
        (ParallelConfig(tp=4), 8, (1, 1, 2, 1, 4)),
        (ParallelConfig(tp=2, dp_replicate=3), 24, (1, 3, 4, 1, 2)),
        (ParallelConfig(tp=8, dp_shard=1), 8, (1, 1, 1, 1, 8)),
    ],
)
def test_sizes(layout: ParallelConfig, world: int, sizes: tuple[int, ...]) -> None:
    assert layout.sizes(world) == sizes


@pytest.mark.parametrize(
    ("layout", "world", "problem", "remedy"),
    [
        (ParallelConfig(tp=2, dp_shard=3), 8, "tp 2 = 6 ranks, but 8 are running", "Set parallel.dp_shard=4 (or -1)"),
        (ParallelConfig(tp=2, dp_replicate=2, dp_shard=4), 8, "= 16 ranks, but 8 are running", "Set parallel.dp_shard=2 (or -1)"),
        (ParallelConfig(tp=4), 6, "tp 4 = 4 ranks, but 6 are running",
         "Start a multiple of 4 ranks, or choose sizes whose product divides 6"),
        (ParallelConfig(tp=8), 4, "tp 8 = 8 ranks, but 4 are running",
         "Start a multiple of 8 ranks, or choose sizes whose product divides 4"),
        (ParallelConfig(tp=3, dp_shard=2), 8, "tp 3 = 6 ranks, but 8 are running",
         "Start 6 ranks, or choose sizes whose product divides 8"),
    ],
)  # fmt: skip
def test_sizes_that_are_not_the_world(layout: ParallelConfig, world: int, problem: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        layout.sizes(world)
    error = caught.value
    assert (error.field, error.value) == ("parallel.dp_shard", layout.dp_shard)
    assert error.problem.endswith(problem)
    assert error.remedy == remedy
    if number := re.match(r"Set parallel.dp_shard=(\d+)", error.remedy):
        for dp_shard in (int(number[1]), -1):
            replace(layout, dp_shard=dp_shard).sizes(world)
    elif number := re.match(r"Start a multiple of (\d+)", error.remedy):
        for multiple in (1, 2, 3):
            layout.sizes(multiple * int(number[1]))
    else:
        layout.sizes(int(error.remedy.split()[1]))


@pytest.mark.parametrize("field", ["pp", "dp_replicate", "cp", "tp", "dp_shard"])
@pytest.mark.parametrize("value", [0, -2])
def test_sizes_are_positive(field: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"^parallel.{field} = {value}: must be ") as caught:
        ParallelConfig(**{field: value}).validate()
    ParallelConfig(**{field: -1 if field == "dp_shard" else 1}).validate()
    assert caught.value.remedy in (f"Set parallel.{field} to 1 or more", "Use -1 to take every rank that is left")


# ----------------------------------------------------------------------------------------------------------- pipelines


@pytest.mark.parametrize(
    ("layout", "field", "remedied"),
    [
        ({"schedule": "interleaved"}, "schedule", [{"schedule": "1f1b"}, {"pp": 2}]),
        ({"schedule": "zbv"}, "schedule", [{"schedule": "1f1b"}, {"pp": 3}]),
        ({"stages_per_rank": 2}, "stages_per_rank", [{"stages_per_rank": 1}]),
        ({"pp": 2, "stages_per_rank": 2}, "stages_per_rank", [{"stages_per_rank": 1}, {"schedule": "interleaved"}]),
        ({"pp": 2, "schedule": "interleaved", "stages_per_rank": 1}, "stages_per_rank", [{"stages_per_rank": 2}]),
        ({"pp": 2, "schedule": "zero_bubble", "stages_per_rank": 0}, "stages_per_rank", [{"stages_per_rank": 1}]),
        ({"pp": 2, "schedule": "zbv", "stages_per_rank": 3}, "stages_per_rank", [{"stages_per_rank": 2}]),
        ({"pp": 2, "reduce_gradients": "micro_batch"}, "reduce_gradients", [{"reduce_gradients": "step"}]),
    ],
)
def test_pipelines_that_cannot_be(layout: dict[str, Any], field: str, remedied: list[dict[str, Any]]) -> None:
    """Refused with the field's name; what the remedy says is not."""
    with pytest.raises(ConfigError) as caught:
        ParallelConfig(**layout).validate()
    error = caught.value
    assert (error.field, error.value) == (f"parallel.{field}", layout[field])
    for change in remedied:
        ParallelConfig(**layout | change).validate()
    assert f"parallel.{field}={remedied[0][field]}" in error.remedy


def test_stages_of_a_layout() -> None:
    for layout, stages in [
        ({}, 1),
        ({"pp": 4}, 4),
        ({"pp": 4, "schedule": "interleaved"}, 8),
        ({"pp": 4, "schedule": "interleaved", "stages_per_rank": 3}, 12),
        ({"pp": 4, "schedule": "zero_bubble", "stages_per_rank": 1}, 4),
        ({"pp": 4, "schedule": "zbv"}, 8),
    ]:
        assert ParallelConfig(**layout).stages == stages  # type: ignore[arg-type]


def test_tied_embeddings_and_a_pipeline() -> None:
    run = Config(tiny("MM", tie_embeddings=True), data=DataConfig("synthetic"), trainer=TrainerConfig(train_samples=10))
    run.validate()
    with pytest.raises(ConfigError, match=r"^model.tie_embeddings = True: over parallel.pp = 2 embedding and output lie"):
        replace(run, parallel=ParallelConfig(pp=2)).validate()
    replace(run, model=tiny("MM"), parallel=ParallelConfig(pp=2)).validate()


def torch_takes(schedule: Schedule, pp: int, count: int) -> bool:
    """Whether torch makes a schedule of `count` micro-batches."""
    layout = ParallelConfig(pp=pp, schedule=schedule)
    stages: list[Any] = [
        SimpleNamespace(
            num_stages=layout.stages, group_size=pp, group_rank=0, stage_index=index, is_first=index == 0,
            is_last=index == layout.stages - 1, submod=torch.nn.Identity(),
        )
        for index in range(layout.stages) if rank_of(index, layout) == 0
    ]  # fmt: skip
    try:
        SCHEDULES[schedule](stages[0] if schedule == "1f1b" else stages, count, loss_fn=lambda loss, _: loss, scale_grads=False)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zero_bubble", "zbv"])
@pytest.mark.parametrize("pp", [2, 3, 4])
def test_numbers_of_micro_batches_are_those_that_torch_takes(schedule: Schedule, pp: int) -> None:
    """For every number: refused exactly where torch would, with another one that works."""
    layout, refused = ParallelConfig(pp=pp, schedule=schedule), 0
    for count in range(1, 4 * pp):
        if torch_takes(schedule, pp, count):
            layout.check_micro_batches("trainer.global_batch_size", 6 * count, 6 * count, count)
            continue
        refused += 1
        with pytest.raises(ConfigError, match=f"a batch of {6 * count} makes {count} micro-batches a step") as caught:
            layout.check_micro_batches("trainer.global_batch_size", 6 * count, 6 * count, count)
        assert (caught.value.field, caught.value.value) == ("trainer.global_batch_size", 6 * count)
        found = re.fullmatch(r"Make it a batch of (\d+), which makes (\d+)", caught.value.remedy)
        assert found is not None
        assert int(found[1]) == 6 * int(found[2])
        assert torch_takes(schedule, pp, int(found[2]))
    assert bool(refused) == (schedule != "zbv")
    ParallelConfig().check_micro_batches("trainer.global_batch_size", 1, 1, 1)


# ------------------------------------------------------------------------------------------------- a parameter's share


def test_declare_refuses_units_that_cannot_be_shared() -> None:
    context: ParallelContext = SimpleNamespace(size=lambda dimension: {"tp": 4}[dimension])  # type: ignore[assignment]
    for units in (3, 6, 10):
        with pytest.raises(ValueError, match=rf"^{units} units of a parameter of shape \(60, 2\) cannot be shared by 4 tp ranks$"):
            tensor.declare((60, 2), 0, units, context, torch.float32)
        assert not SplitUnits("model.x", units, units, "x", shared=True).fits(4)
    assert all(SplitUnits("model.x", units, units, "x", shared=True).fits(4) for units in (1, 2, 4, 8))
