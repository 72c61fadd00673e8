"""Gradient norm, clipping and optimizer steps over every mix of meshes and shardings, against the global tensors."""

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from harness import on_ranks
from megatron_mamba.config import OptimConfig
from megatron_mamba.optim import build_optimizer, clip_, global_grad_norm
from megatron_mamba.parallel.context import ParallelContext

pytestmark = pytest.mark.ranks

F64 = torch.float64
MESHES = {
    "one": {},
    "dp2": {"dp_shard": 2},
    "tp2": {"tp": 2},
    "dp2 tp2": {"dp_shard": 2, "tp": 2},
    "hsdp": {"dp_replicate": 2, "dp_shard": 2},
    "pp2 tp2": {"pp": 2, "tp": 2},
    "tp4": {"tp": 4},
}


@dataclass
class Case:
    """A parameter on this rank, with its global value and gradient."""

    parameter: Tensor
    value: Tensor
    gradient: Tensor


def place(value: Tensor, mesh: Any, placements: list[Any]) -> Tensor:
    """A laid-out copy: without the clone, a mesh of one would share memory with the expected value."""
    return value.clone() if mesh is None else distribute_tensor(value.clone(), mesh, placements)


def cases(context: ParallelContext) -> dict[str, Case]:
    """Parameters of one model, laid out in every way that occurs. Pipeline stages draw different ones."""
    generator = torch.Generator().manual_seed(7 + context.rank("pp"))
    tp, dp, both = context.mesh["tp"], context.mesh["dp_replicate", "dp_shard"], context.mesh["dp_shard", "tp"]
    layouts: dict[str, tuple[tuple[int, ...], Any, list[Any]]] = {
        "tp rows": ((8, 3), tp, [Shard(0)]),
        "tp columns": ((3, 8), tp, [Shard(1)]),
        "tp replicated": ((5,), tp, [Replicate()]),
        "dp uneven": ((5, 4), dp, [Replicate(), Shard(0)]),
        "dp one row": ((1, 4), dp, [Replicate(), Shard(0)]),
        "dp and tp": ((6, 8), both, [Shard(0), Shard(1)]),
        "dp of replicas": ((6, 2), both, [Shard(0), Replicate()]),
        "replicas": ((2, 3), both, [Replicate(), Replicate()]),
        "plain": ((7,), None, []),
    }
    found = {}
    for name, (shape, mesh, placements) in layouts.items():
        value, gradient = torch.randn(2, *shape, dtype=F64, generator=generator).unbind()
        parameter = nn.Parameter(place(value, mesh, placements))
        parameter.grad = place(gradient, mesh, placements)
        found[name] = Case(parameter, value, gradient)
    found["no gradient"] = Case(nn.Parameter(torch.ones(3, dtype=F64)), torch.ones(3, dtype=F64), torch.zeros(3, dtype=F64))
    found |= fsdp_cases(context, generator)
    return found


def fsdp_cases(context: ParallelContext, generator: torch.Generator) -> dict[str, Case]:
    """Parameters as FSDP2 leaves them when it cuts what tp has cut already (strided shards)."""
    module = nn.Module()
    values = {name: torch.randn(8, 3, dtype=F64, generator=generator) for name in ("cut", "whole")}
    module.cut = nn.Parameter(place(values["cut"], context.mesh["tp"], [Shard(0)]))
    module.whole = nn.Parameter(place(values["whole"], context.mesh["tp"], [Replicate()]))
    fully_shard(module, mesh=context.mesh["dp_replicate", "dp_shard"])
    for parameter in module.parameters():
        parameter.grad = parameter.detach().clone()
    return {f"fsdp {n}": Case(p, values[n], values[n]) for n, p in module.named_parameters()}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_norm_and_clipping(context: ParallelContext) -> None:
    found = cases(context)
    squares = torch.tensor(math.fsum(float(x) ** 2 for c in found.values() for x in c.gradient.flatten()), dtype=F64)
    stages = [torch.zeros_like(squares) for _ in range(context.size("pp"))]
    dist.all_gather(stages, squares, group=context.group("pp"))
    expected = math.sqrt(sum(stages))
    parameters = [c.parameter for c in found.values()]
    norm = global_grad_norm(parameters, context)
    assert norm.shape == ()
    assert abs(float(norm) / expected - 1) < 1e-12, (float(norm), expected)

    clip_(parameters, norm, 2 * expected)
    clip_(parameters, norm, 0.0)
    for name, case in found.items():
        assert case.parameter.grad is None or torch.equal(whole(case.parameter.grad), case.gradient), name
    clip_(parameters, norm, 0.5)
    for name, case in found.items():
        if case.parameter.grad is not None:
            scaled = case.gradient * (0.5 / expected)
            torch.testing.assert_close(whole(case.parameter.grad), scaled, rtol=1e-12, atol=1e-14, msg=name)
    assert abs(float(global_grad_norm(parameters, context)) / 0.5 - 1) < 1e-12


def check_optimizer_steps(context: ParallelContext) -> None:
    config = OptimConfig(lr=0.1, weight_decay=0.5)
    found = cases(context)
    del found["no gradient"]
    specs = {name: SimpleNamespace(decay=case.value.ndim == 2) for name, case in found.items()}
    plain = {name: nn.Parameter(case.value.clone()) for name, case in found.items()}
    ours = build_optimizer([(name, case.parameter) for name, case in found.items()], specs, config)
    reference = build_optimizer(plain.items(), specs, config)
    for _ in range(2):
        for name, parameter in plain.items():
            parameter.grad = found[name].gradient
        ours.step()
        reference.step()
    for name, case in found.items():
        torch.testing.assert_close(whole(case.parameter.detach()), plain[name].detach(), rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("mesh", MESHES)
def test_norm_and_clipping_count_every_element_once(mesh: str) -> None:
    on_ranks(MESHES[mesh], check_norm_and_clipping)


@pytest.mark.parametrize("mesh", ["one", "dp2 tp2"])
def test_fused_steps_over_mixed_meshes_equal_plain_ones(mesh: str) -> None:
    on_ranks(MESHES[mesh], check_optimizer_steps)


def check_refusals_and_collectives(context: ParallelContext) -> None:
    partial = nn.Parameter(distribute_tensor(torch.ones(4, dtype=F64), context.mesh["tp"], [Replicate()]))
    partial.grad = DTensor.from_local(torch.ones(4, dtype=F64), context.mesh["tp"], [Partial()])
    with pytest.raises(ValueError, match="Partial"):
        global_grad_norm([partial], context)
    calls = []
    original, dist.all_reduce = dist.all_reduce, lambda *args, **kwargs: calls.append(original(*args, **kwargs))
    global_grad_norm([case.parameter for case in cases(context).values()], context)
    assert len(calls) == 2, "one all-reduce for dp and one for tp, however many parameters and meshes"


def test_unsummed_gradients_are_refused_and_collectives_are_few() -> None:
    on_ranks(MESHES["dp2 tp2"], check_refusals_and_collectives)


def test_norm_is_accumulated_in_fp32_and_never_silently_finite() -> None:
    def check(context: ParallelContext) -> None:
        small = nn.Parameter(torch.zeros(2**16, dtype=torch.bfloat16))
        small.grad = torch.full_like(small, 2.0**-7)
        norm = global_grad_norm([small], context)
        assert norm.dtype == torch.float32
        assert float(norm) == 2.0
        large = nn.Parameter(torch.zeros(2**23))
        large.grad = torch.full_like(large, 1e-3)
        assert float(global_grad_norm([large], context)) == pytest.approx(2**11.5 * 1e-3, rel=1e-5)
        for bad in (math.inf, math.nan):
            small.grad[5] = bad
            norm = global_grad_norm([small], context)
            assert not math.isfinite(norm)
            clip_([small], norm, 1.0)
            assert not small.grad.isfinite().all()
        assert float(global_grad_norm([nn.Parameter(torch.ones(3))], context)) == 0.0
        assert float(global_grad_norm([], context)) == 0.0

    on_ranks({}, check)
