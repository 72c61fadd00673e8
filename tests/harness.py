"""Forked ranks: a world of processes on one machine in a fraction of a second, and training compared between meshes.

Mark tests (or modules) that use it with ``pytest.mark.ranks``: they run first, while the parent has not run autograd.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch
import torch._dynamo  # DTensor imports it at its first operation: once here is cheaper than once on every forked rank
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from megatron_mamba.config import Config, ModelConfig, OptimConfig, ParallelConfig, RecomputeConfig
from megatron_mamba.data.loader import Batch
from megatron_mamba.layout import Schedule
from megatron_mamba.model import LanguageModel, build_pipeline
from megatron_mamba.model.parameters import parameter_table
from megatron_mamba.model.stages import stages_of
from megatron_mamba.optim import build_optimizer, clip_, global_grad_norm, set_learning_rate
from megatron_mamba.parallel import fsdp, tensor
from megatron_mamba.parallel.context import MESH_DIMENSIONS, ParallelContext
from megatron_mamba.parallel.pipeline import Pipeline

BATCH, LENGTH = 4, 36
CLIP = 0.5


def _rank(rank: int, world: int, folder: str, layout: ParallelConfig, body: Callable[[ParallelContext], None]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", layout.sizes(world), mesh_dim_names=MESH_DIMENSIONS)
    body(ParallelContext.over(mesh, torch.device("cpu"), layout))
    dist.destroy_process_group()


def on_ranks(sizes: dict[str, int], body: Callable[[ParallelContext], None]) -> None:
    """Run `body` on every rank of a mesh of `sizes` (dimension -> size, 1 where absent); a failure on any fails the test."""
    world = math.prod(sizes.values())
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world, folder, ParallelConfig(**({"dp_shard": 1} | sizes)), body)
        mp.start_processes(_rank, arguments, nprocs=world, start_method="fork")


@dataclass(frozen=True)
class Case:
    """A training to be repeated on other meshes: model, precision, what is recomputed, and FSDP's settings."""

    model: ModelConfig
    precision: str = "fp64"
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    sequence_parallel: bool = False
    reshard_after_forward: bool = True
    reduce_every_micro_batch: bool = False
    batch: int = BATCH
    """Sequences a step."""
    micro_batches: int = 2
    """A step, on each data-parallel rank that gets as many sequences."""
    steps: int = 2
    schedule: Schedule = "1f1b"
    """Of a pipeline, if the mesh has one."""
    stages_per_rank: int | None = None


Result = dict[str, Tensor]
"""What must not depend on the mesh: ``loss S``, ``norm S``, ``gradient S NAME`` and ``parameter NAME``, as this rank holds
them (one rank: as global tensors)."""


def owned(*models: LanguageModel) -> dict[str, tuple[slice, ...]]:
    """Where this rank's part of each parameter of the models (stages of one) lies in the global tensor."""
    return {
        name: tensor.owned_slices(row.shape, row.split_dim, row.units, model.context, sharded=not row.fp32)
        for model in models
        for name, _, row in model.table_parameters()
    }


def perturb(model: LanguageModel, seed: int = 5) -> None:
    """Add noise, the same on every mesh, to every weight: ones and zeros would hide a slice that lies wrong."""
    slices, number = owned(model), {name: i for i, name in enumerate(parameter_table(model.config))}
    for name, parameter, row in model.table_parameters():
        noise = torch.randn(row.shape, generator=torch.Generator().manual_seed(seed + number[name]), dtype=torch.float64)
        fsdp.local(parameter).detach().add_(0.2 * noise[slices[name]] * (row.shape[-1] ** -0.5 if row.decay else 1.0))


def pipeline_of(case: Case, context: ParallelContext) -> Pipeline:
    """The case's model on this rank, cut into stages if the mesh has a pipeline, with noise on its weights."""
    pp, layout = context.size("pp"), ParallelConfig()
    if pp > 1:
        layout = ParallelConfig(pp=pp, schedule=case.schedule, stages_per_rank=case.stages_per_rank)
    layout.validate()
    context = replace(
        context,
        sequence_parallel=case.sequence_parallel and context.size("tp") > 1,
        reshard_after_forward=case.reshard_after_forward,
        reduce_every_micro_batch=case.reduce_every_micro_batch,
        schedule=layout.schedule,
        deferred=[] if layout.defers_weights else None,
    )
    stages = stages_of(Config(model=case.model, parallel=layout))
    pipeline = build_pipeline(case.model, stages, context, precision=case.precision, seed=11, recompute=case.recompute)
    for module in pipeline.modules:
        perturb(module)
    return pipeline


def share_of(case: Case, context: ParallelContext, generator: torch.Generator) -> list[Batch]:
    """This rank's share of a batch of packed sequences, in micro-batches; over cp ranks, its pieces of them."""
    tokens = torch.randint(0, case.model.vocab_size, (case.batch, LENGTH + 1), generator=generator)
    starts = torch.rand(case.batch, LENGTH, generator=generator) < 0.1
    share = case.batch // context.dp_size
    mine = slice(context.dp_rank * share, (context.dp_rank + 1) * share)
    size = max(share // case.micro_batches, 1)
    micro_batches = zip(tokens[mine].split(size), starts[mine].split(size), strict=True)
    rank, ranks = context.rank("cp"), context.size("cp")
    return [Batch(t[:, :-1], t[:, 1:], s).pieces(rank, ranks) for t, s in micro_batches]


def train(case: Case, context: ParallelContext) -> tuple[Result, dict[str, tuple[slice, ...]]]:
    """Steps of (if the batch allows) several micro-batches on this rank's share of a batch of packed sequences.

    Returns this rank's results, and where they lie in the global ones.
    """
    pipeline = pipeline_of(case, context)
    named = pipeline.named_parameters()
    parameters = [parameter for _, parameter in named]
    optimizer = build_optimizer(named, parameter_table(case.model), OptimConfig(lr=1e-2))
    set_learning_rate(optimizer, 1e-2)
    generator, found = torch.Generator().manual_seed(2), {}
    for step in range(case.steps):
        batches = share_of(case, context, generator)
        loss = pipeline.step(batches, scale=1 / (case.batch * LENGTH), chunk_tokens=20)
        found |= {f"gradient {step} {n}": fsdp.local(p.grad).clone() for n, p in named if p.grad is not None}
        found[f"loss {step}"] = pipeline.total(loss)
        norm = global_grad_norm(parameters, context)
        found[f"norm {step}"] = norm.clone()
        clip_(parameters, norm, CLIP)
        optimizer.step()
        optimizer.zero_grad()
    found |= {f"parameter {name}": fsdp.local(p).detach().clone() for name, p in named}
    slices = owned(*pipeline.modules)
    return found, {key: index for name, index in slices.items() for key in found if key.split()[-1] == name}


def differences(found: Result, slices: dict[str, tuple[slice, ...]], expected: Result) -> dict[str, float]:
    """Largest difference of this rank's losses, gradients, gradient norms and parameters from one rank's, relative to the
    2-norm of the whole tensor; infinite for what only one of the two has, but for parameters of other ranks' stages."""
    largest: dict[str, float] = {}
    for name in expected | found:
        kind, error = name.split()[0], math.inf
        if kind in ("gradient", "parameter") and f"parameter {name.split()[-1]}" not in found:
            continue
        if name in found and name in expected:
            value = expected[name]
            error = float((found[name] - value[slices.get(name, ...)]).norm() / value.norm().clamp(min=1e-30))
        largest[kind] = max(largest.get(kind, 0.0), error if math.isfinite(error) else math.inf)
    return largest


def compare_training(
    cases: dict[str, Case],
    sizes: dict[str, int],
    expected: dict[str, Result],
    within: Mapping[str, AbstractContextManager[object]] | None = None,
) -> dict[str, dict[str, float]]:
    """Train each of `cases` on a mesh of `sizes`, on every rank `within` its context manager if it has one; its largest
    differences on any rank from `expected`, by name."""
    with tempfile.TemporaryDirectory() as folder:

        def body(context: ParallelContext) -> None:
            found, seen = {}, {}
            for name, case in cases.items():
                with (within or {}).get(name, nullcontext()):
                    result, slices = train(case, context)
                found[name], seen[name] = differences(result, slices, expected[name]), {*result}
            torch.save((found, seen), f"{folder}/{context.global_rank}")

        on_ranks(sizes, body)
        ranks, seen = zip(*(torch.load(f"{folder}/{rank}") for rank in range(math.prod(sizes.values()))), strict=True)
    largest = {name: {kind: max(rank[name][kind] for rank in ranks) for kind in ranks[0][name]} for name in cases}
    for name in cases:
        for missing in expected[name].keys() - set().union(*(rank[name] for rank in seen)):
            largest[name][missing.split()[0]] = math.inf
    return largest


def train_alone(cases: Iterable[Case]) -> list[Result]:
    """Each case on one rank, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        on_ranks({}, lambda context: torch.save([train(case, context)[0] for case in cases], f"{folder}/one"))
        results: list[Result] = torch.load(f"{folder}/one")
        return results


def assert_same_training(case: Case, sizes: dict[str, int], tolerance: float = 1e-10) -> dict[str, float]:
    """A mesh of `sizes` trains as one rank does; returns the largest differences."""
    expected = train_alone([case])[0]
    found = compare_training({"case": case}, sizes, {"case": expected})["case"]
    assert max(found.values()) <= tolerance, found
    return found
