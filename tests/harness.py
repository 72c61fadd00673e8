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

from megatron_mamba.config import ModelConfig, OptimConfig, ParallelConfig, RecomputeConfig
from megatron_mamba.model import LanguageModel, build
from megatron_mamba.model.parameters import parameter_table
from megatron_mamba.optim import build_optimizer, clip_, global_grad_norm, set_learning_rate
from megatron_mamba.parallel import fsdp, tensor
from megatron_mamba.parallel.context import MESH_DIMENSIONS, ParallelContext

BATCH, LENGTH, STEPS = 4, 36, 2
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
    """Sequences a step, in two micro-batches on each data-parallel rank that gets more than one."""


Result = dict[str, Tensor]
"""What must not depend on the mesh: ``loss S``, ``norm S``, ``gradient S NAME`` and ``parameter NAME``, as this rank holds
them (one rank: as global tensors)."""


def owned(model: LanguageModel) -> dict[str, tuple[slice, ...]]:
    """Where this rank's part of each parameter lies in the global tensor."""
    return {
        name: tensor.owned_slices(row.shape, row.split_dim, row.units, model.context, sharded=not row.fp32)
        for name, _, row in model.table_parameters()
    }


def perturb(model: LanguageModel, seed: int = 5) -> None:
    """Add noise, the same on every mesh, to every weight: ones and zeros would hide a slice that lies wrong."""
    slices = owned(model)
    for i, (name, parameter, row) in enumerate(model.table_parameters()):
        noise = torch.randn(row.shape, generator=torch.Generator().manual_seed(seed + i), dtype=torch.float64)
        fsdp.local(parameter.detach()).add_(0.2 * noise[slices[name]] * (row.shape[-1] ** -0.5 if row.decay else 1.0))


def train(case: Case, context: ParallelContext) -> tuple[Result, dict[str, tuple[slice, ...]]]:
    """Two steps of (if the batch allows) two micro-batches on this rank's share of a batch of packed sequences.

    Returns this rank's results, and where they lie in the global ones.
    """
    context = replace(
        context,
        sequence_parallel=case.sequence_parallel and context.size("tp") > 1,
        reshard_after_forward=case.reshard_after_forward,
        reduce_every_micro_batch=case.reduce_every_micro_batch,
    )
    model = build(case.model, context, precision=case.precision, seed=11, recompute=case.recompute)
    perturb(model)
    parameters = list(model.parameters())
    optimizer = build_optimizer(model.named_parameters(), parameter_table(case.model), OptimConfig(lr=1e-2))
    set_learning_rate(optimizer, 1e-2)
    generator, found = torch.Generator().manual_seed(2), {}
    for step in range(STEPS):
        tokens = torch.randint(0, case.model.vocab_size, (case.batch, LENGTH + 1), generator=generator)
        starts = torch.rand(case.batch, LENGTH, generator=generator) < 0.1
        share = case.batch // context.dp_size
        mine = slice(context.dp_rank * share, (context.dp_rank + 1) * share)
        micro_batches = list(zip(tokens[mine].split(max(share // 2, 1)), starts[mine].split(max(share // 2, 1)), strict=True))
        loss = torch.zeros((), dtype=torch.float64)
        for i, (t, s) in enumerate(micro_batches):
            model.last_backward(i == len(micro_batches) - 1)
            scale = 1 / (case.batch * LENGTH)
            part = model(t[:, :-1], labels_BS=t[:, 1:], document_start_BS=s, scale=scale, chunk_tokens=20)
            part.backward()
            loss += part.detach()
        model.sum_gradients()
        found |= {f"gradient {step} {n}": fsdp.local(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}
        found[f"loss {step}"] = context.sum_over_dp(loss)
        norm = global_grad_norm(parameters, context)
        found[f"norm {step}"] = norm.clone()
        clip_(parameters, norm, CLIP)
        optimizer.step()
        optimizer.zero_grad()
    found |= {f"parameter {name}": fsdp.local(p).detach().clone() for name, p in model.named_parameters()}
    return found, {key: index for name, index in owned(model).items() for key in found if key.split()[-1] == name}


def differences(found: Result, slices: dict[str, tuple[slice, ...]], expected: Result) -> dict[str, float]:
    """Largest difference of this rank's losses, gradients, gradient norms and parameters from one rank's, relative to the
    2-norm of the whole tensor; infinite for what only one of the two has."""
    largest: dict[str, float] = {}
    for name in expected | found:
        kind, error = name.split()[0], math.inf
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
            found = {}
            for name, case in cases.items():
                with (within or {}).get(name, nullcontext()):
                    found[name] = differences(*train(case, context), expected[name])
            torch.save(found, f"{folder}/{context.global_rank}")

        on_ranks(sizes, body)
        ranks = [torch.load(f"{folder}/{rank}") for rank in range(math.prod(sizes.values()))]
    return {name: {kind: max(rank[name][kind] for rank in ranks) for kind in ranks[0][name]} for name in cases}


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
