"""Pipelines: what passes between stages, what is put off, and that the comparison with one rank would show it if it went wrong."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.pipelining import PipelineStage

import harness
from harness import Case, compare_training, on_ranks, pipeline_of, share_of, train_alone
from megatron_mamba.config import BatchRampConfig, Config, ConfigError, DataConfig, ParallelConfig, TrainerConfig
from megatron_mamba.layout import Schedule
from megatron_mamba.model import LanguageModel
from megatron_mamba.model.stages import Stage
from megatron_mamba.optim import global_grad_norm
from megatron_mamba.parallel import fsdp, torch_private
from megatron_mamba.parallel.collectives import reduce_
from megatron_mamba.parallel.context import ParallelContext
from megatron_mamba.parallel.linear import column_parallel, row_parallel
from megatron_mamba.parallel.pipeline import Pipeline
from megatron_mamba.train.checks import check_batches
from tiny import tiny

pytestmark = pytest.mark.ranks

MODEL = tiny("M*-m", vocab_size=60, mamba2={"d_inner": 64})
SCHEDULES: dict[str, tuple[Schedule, int | None]] = {
    "1f1b": ("1f1b", None),
    "interleaved": ("interleaved", 2),
    "zero_bubble": ("zero_bubble", 2),
    "zero_bubble, one stage a rank": ("zero_bubble", 1),
    "zbv": ("zbv", 2),
}


def case_of(schedule: str = "1f1b", **changes: Any) -> Case:
    kind, each = SCHEDULES[schedule]
    return replace(Case(MODEL, batch=8, micro_batches=4, schedule=kind, stages_per_rank=each), **changes)


# ------------------------------------------------------------------------------------------------------- planted bugs


@contextmanager
def without_document_starts() -> Iterator[None]:
    """A border that does not pass on where documents start."""
    forward = LanguageModel.forward

    def forgetful(self: LanguageModel, x: Tensor, **inputs: Any) -> Tensor:
        return forward(self, x, **inputs if self.stage.is_first else inputs | {"document_start_BS": None})

    with patch.object(LanguageModel, "forward", forgetful):
        yield


@contextmanager
def wrong_order() -> Iterator[None]:
    """The first stage has the layers of the second, and the other way round."""

    def swapped(*arguments: Any) -> list[Stage]:
        stages = STAGES_OF(*arguments)
        return [replace(stage, layers=other.layers) for stage, other in zip(stages, reversed(stages), strict=True)]

    with patch.object(harness, "stages_of", swapped):
        yield


@contextmanager
def every_stage_counts() -> Iterator[None]:
    """Every rank adds the loss that the last stage found."""

    def everywhere(self: Pipeline, loss: Tensor) -> Tensor:
        return TOTAL(self, TOTAL(self, loss))

    with patch.object(Pipeline, "total", everywhere):
        yield


@contextmanager
def one_put_off_is_dropped() -> Iterator[None]:
    """What the second backward pass on a rank puts off is not computed."""
    calls = 0

    def forgetful(self: Pipeline, module: Any) -> Callable[[], None]:
        nonlocal calls
        calls += 1
        run = TAKE(self, module)
        return run if calls != 2 else lambda: None

    with patch.object(Pipeline, "_take_deferred", forgetful):
        yield


@contextmanager
def second_stage_does_not_sum() -> Iterator[None]:
    """The gradients that FSDP does not sum, those of parameters apart, stay a rank's own on the second stage."""

    def sum_gradients(self: LanguageModel) -> None:
        if self.stage.index != 1:
            SUM_GRADIENTS(self)

    with patch.object(LanguageModel, "sum_gradients", sum_gradients):
        yield


STAGES_OF, TOTAL, TAKE, SUM_GRADIENTS = harness.stages_of, Pipeline.total, Pipeline._take_deferred, LanguageModel.sum_gradients

BUGS: dict[str, dict[str, tuple[Any, str, str]]] = {
    "pp2": {
        "a border drops the document starts": (without_document_starts, "1f1b", "loss"),
        "stages in the wrong order": (wrong_order, "1f1b", "loss"),
        "the loss of every stage counts": (every_stage_counts, "1f1b", "loss"),
        "weights' gradients of one micro-batch dropped": (one_put_off_is_dropped, "zbv", "gradient"),
    },
    "pp2 dp2": {"second stage: gradients apart not summed": (second_stage_does_not_sum, "interleaved", "gradient")},
}
MESHES = {"pp2": {"pp": 2}, "pp2 dp2": {"pp": 2, "dp_shard": 2}}


@pytest.mark.parametrize("mesh", BUGS)
def test_planted_bugs_show(mesh: str, record_property: Callable[[str, object], None]) -> None:
    """Each bug by more than 1e-6 where it must; the same training without it by no more than 1e-10."""
    bugs = BUGS[mesh]
    cases = {name: case_of(schedule, steps=1) for name, (_, schedule, _) in bugs.items()}
    sound = {f"sound: {schedule}": case_of(schedule, steps=1) for _, schedule, _ in bugs.values()}
    (one,) = train_alone([case_of(steps=1)])
    within = {name: planted() for name, (planted, _, _) in bugs.items()}
    found = compare_training(cases | sound, MESHES[mesh], dict.fromkeys(cases | sound, one), within)
    record_property("planted", {f"{name} ({mesh})": found[name] for name in bugs})
    wrong = {name: found[name] for name in sound if not max(found[name].values()) <= 1e-10}
    missed = {name: found[name] for name, (_, _, shows) in bugs.items() if not found[name][shows] > 1e-6}
    assert not wrong, f"without a bug: {wrong}"
    assert not missed, f"planted, but not seen: {missed}"


# ------------------------------------------------------------------------------------------------------------ stages


@pytest.mark.parametrize(
    ("pp", "patterns"), [(2, {"M|*-m-": "1f1b", "M*|-|m-M|*": "zbv"}), (4, {"-M|m|*|-": "1f1b"})], ids=["pp2", "pp4"]
)
def test_uneven_stages(pp: int, patterns: dict[str, str]) -> None:
    """Stages that end where the pattern's borders are."""
    cases = {pattern: case_of(schedule, model=replace(MODEL, pattern=pattern)) for pattern, schedule in patterns.items()}
    expected = dict(zip(cases, train_alone(cases.values()), strict=True))
    found = compare_training(cases, {"pp": pp}, expected)
    assert max(max(figures.values()) for figures in found.values()) <= 1e-10, found


def test_weights_kept_through_a_step() -> None:
    cases = {schedule: case_of(schedule, reshard_after_forward=False) for schedule in ("1f1b", "zbv")}
    (expected,) = train_alone([case_of()])
    found = compare_training(cases, MESHES["pp2 dp2"], dict.fromkeys(cases, expected))
    assert max(max(figures.values()) for figures in found.values()) <= 1e-10, found


def several(case: Case, context: ParallelContext) -> list[float]:
    """Losses of validations, then losses and gradient norms of steps after them, of changing numbers of micro-batches."""
    pipeline, generator = pipeline_of(case, context), torch.Generator().manual_seed(3)
    parameters, found = [parameter for _, parameter in pipeline.named_parameters()], []
    for micro_batches in (4, 2, 4):
        batches = share_of(replace(case, micro_batches=micro_batches), context, generator)
        found.append(pipeline.total(sum(pipeline.evaluate(batch, chunk_tokens=20) for batch in batches[:3])).item())
        pipeline.reshard()
        found.append(pipeline.total(pipeline.step(batches, scale=0.01, chunk_tokens=20)).item())
        found.append(global_grad_norm(parameters, pipeline.context).item())
        for parameter in parameters:
            parameter.grad = None
    return found


@pytest.mark.parametrize(
    ("sizes", "schedules"),
    [
        ({"pp": 2}, ["1f1b", "zero_bubble", "zero_bubble, one stage a rank"]),
        ({"pp": 2, "tp": 2}, ["interleaved"]),
        ({"pp": 2, "cp": 2}, ["zbv"]),
    ],
    ids=str,
)
def test_validation_and_another_number_of_micro_batches(sizes: dict[str, int], schedules: list[str]) -> None:
    """Forward passes alone find one rank's losses, and so do steps after them and steps of fewer micro-batches."""
    cases = {schedule: case_of(schedule, sequence_parallel=True) for schedule in schedules}
    with tempfile.TemporaryDirectory() as folder:

        def body(context: ParallelContext) -> None:
            torch.save({name: several(case, context) for name, case in cases.items()}, f"{folder}/{context.global_rank}")

        on_ranks({}, lambda context: torch.save(several(case_of(), context), f"{folder}/one"))
        on_ranks(sizes, body)
        expected = torch.load(f"{folder}/one")
        assert len(set(expected)) == len(expected)
        for rank in range(math.prod(sizes.values())):
            found = torch.load(f"{folder}/{rank}")
            assert found == {name: pytest.approx(expected, rel=1e-12) for name in cases}


@pytest.mark.parametrize(
    ("schedule", "batch", "ramp", "message"),
    [
        ("1f1b", 1, None, r"^trainer.global_batch_size = 1: a batch of 1 makes 1 .* parallel.pp = 2 takes 2 or more\. Make it"),
        ("1f1b", 4, (1, 3), r"^trainer.batch_ramp.start = 1: a batch of 1 makes 1 micro-batches"),
        ("interleaved", 6, (2, 1), r"^trainer.batch_ramp.increment = 1: a batch of 5 .* Make it a batch of 4, which makes 4$"),
        ("zero_bubble", 7, None, r"^trainer.global_batch_size = 7: .* takes one round of up to 3, or equally long rounds of 2 or "),
    ],
)
def test_batches_that_a_schedule_cannot_order(
    schedule: Schedule, batch: int, ramp: tuple[int, int] | None, message: str
) -> None:
    """On the way up a ramp, too: a run is refused before it starts, not where it gets there."""
    grows = None if ramp is None else BatchRampConfig(*ramp, samples=100)
    trainer = TrainerConfig(train_samples=1000, global_batch_size=batch, batch_ramp=grows)
    config = Config(MODEL, ParallelConfig(pp=2, schedule=schedule), data=DataConfig("synthetic"), trainer=trainer).validate()
    one_replica: ParallelContext = SimpleNamespace(dp_size=1)  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=message):
        check_batches(config, one_replica)
    if ramp is not None:
        check_batches(config, one_replica, consumed_samples=100)
    check_batches(replace(config, parallel=ParallelConfig(pp=2, schedule="zbv")), one_replica)


# ------------------------------------------------------------------------------------------------------- zero bubble


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_weights_wait_for_their_gradients(sequence_parallel: bool) -> None:
    """After a backward pass inputs have their gradients and weights none; these are the same when they are computed."""

    def body(context: ParallelContext) -> None:
        torch.manual_seed(context.rank("tp"))
        context = replace(context, sequence_parallel=sequence_parallel)
        weights = [torch.randn(size, 6, dtype=torch.float64, requires_grad=True) for size in (3, 4)]
        out = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
        given = torch.randn(8, 6, dtype=torch.float64)
        found = {}
        for deferred in (None, []):
            place = replace(context, deferred=deferred)
            x = given.clone().requires_grad_()
            # Over views, as the parts of parameters are.
            views = [w.narrow(0, 0, len(w)) for w in weights]
            y = column_parallel(x, views, place, gather_again=True)
            row_parallel(y.tanh(), out.narrow(0, 0, 5), place).square().sum().backward()
            if deferred is not None:
                assert all(w.grad is None for w in (*weights, out))
                assert len(deferred) == 2
                for compute in deferred:
                    compute()
            found[deferred is None] = [x.grad, *(w.grad for w in (*weights, out))]
            for w in (*weights, out):
                w.grad = None
        assert all(torch.equal(a, b) for a, b in zip(found[True], found[False], strict=True))

    on_ranks({"tp": 2}, body)


@pytest.mark.parametrize("schedule", ["zero_bubble", "zbv"])
def test_gradients_of_weights_are_put_off(schedule: str) -> None:
    """While a rank has other passes to run: somewhere, several backward passes lie between one and its weights' gradients,
    and those of the projections do not exist before."""

    def body(context: ParallelContext) -> None:
        case, order = case_of(schedule), []
        pipeline = pipeline_of(case, context)
        backward, weights = PipelineStage.backward_one_chunk, PipelineStage.backward_weight_one_chunk

        def gradients(module: Any) -> list[Any]:
            names = ("in_proj_x", "out_proj", "q_proj", "up_proj", "down_proj")
            units = [unit for unit in module.modules() if isinstance(unit, FSDPModule)]
            kept = [p for unit in units for p in torch_private.unit_parameters(unit) if p._module_info.param_name in names]
            assert kept
            return [p._unsharded_param.grad for p in kept]

        def noted_backward(self: Any, chunk: int, **inputs: Any) -> None:
            first = not any(self.stage_index == stage for _, stage, _ in order)
            backward(self, chunk, **inputs)
            if not inputs.get("full_backward", True):
                order.append(("B", self.stage_index, chunk))
                assert not first or all(g is None for g in gradients(self.submod))

        def noted_weights(self: Any, chunk: int, **inputs: Any) -> None:
            weights(self, chunk, **inputs)
            order.append(("W", self.stage_index, chunk))
            assert all(g is not None for g in gradients(self.submod))

        with (
            patch.object(PipelineStage, "backward_one_chunk", noted_backward),
            patch.object(PipelineStage, "backward_weight_one_chunk", noted_weights),
        ):
            pipeline.step(share_of(case, context, torch.Generator().manual_seed(1)), scale=0.1, chunk_tokens=20)
        apart = [order.index(("W", stage, chunk)) - i for i, (kind, stage, chunk) in enumerate(order) if kind == "B"]
        waited = torch.tensor(float(max(apart, default=0)))
        assert reduce_(waited, context.group("pp"), "max") > 1, order
        assert pipeline.context.deferred == []

    on_ranks({"pp": 2}, body)


@pytest.mark.parametrize("mesh", MESHES)
def test_lower_precision_is_summed_in_fp32(mesh: str) -> None:
    """bf16 gradients of micro-batches add up in fp32, whether a pass computes them or they are put off: the sums differ from
    those without a pipeline by fp32's rounding. With what moves them into fp32 left out they do not, before torch 2.15: there
    autograd adds in fp32, and nothing is left to move."""
    sizes = MESHES[mesh]
    plain = {name: size for name, size in sizes.items() if name != "pp"}
    cases = {schedule: case_of(schedule, precision="bf16") for schedule in ("1f1b", "zbv")}
    cases["planted"] = cases["zbv"]
    moved = hasattr(FSDPParam, "accumulate_unsharded_grad_if_needed")
    expected = whole_gradients({"plain": cases["1f1b"]}, plain)["plain"]
    for name, found in whole_gradients(cases, sizes).items():
        assert found.keys() == expected.keys()
        errors = {key: ((found[key] - value).norm() / value.norm()).item() for key, value in expected.items()}
        assert (max(errors.values()) <= 1e-6) == (name != "planted" or not moved), (name, errors)


def whole_gradients(cases: dict[str, Case], sizes: dict[str, int]) -> dict[str, dict[str, Tensor]]:
    """Of each case, gradients of one step by name and data-parallel rank."""
    with tempfile.TemporaryDirectory() as folder:

        def gradients(name: str, context: ParallelContext) -> dict[str, Tensor]:
            pipeline = pipeline_of(cases[name], context)
            batches = share_of(cases[name], context, torch.Generator().manual_seed(1))
            with patch.object(fsdp, "keep_deferred", lambda _: None) if name == "planted" else nullcontext():
                pipeline.step(batches, scale=1e-3, chunk_tokens=20)
            return {f"{key} {context.dp_rank}": fsdp.local(p.grad) for key, p in pipeline.named_parameters()}

        def body(context: ParallelContext) -> None:
            torch.save({name: gradients(name, context) for name in cases}, f"{folder}/{context.global_rank}")

        on_ranks(sizes, body)
        parts = [torch.load(f"{folder}/{rank}") for rank in range(math.prod(sizes.values()))]
    return {name: {k: g for part in parts for k, g in part[name].items() if g.numel()} for name in cases}
