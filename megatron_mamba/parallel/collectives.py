"""Collectives that autograd sees. Each is the identity on a group of one.

Names say what happens in the forward pass; the backward pass does the adjoint. Tensors are `[T, ...]` and gathered or
scattered along dimension 0, rank after rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Newer versions of torch warn about the older names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Pending:
    """A collective under way; `wait` returns its result. The input stays alive until then."""

    def __init__(self, result: Tensor, work: dist.Work | None, source: Tensor | None = None) -> None:
        self._result, self._work, self._source = result, work, source

    def wait(self) -> Tensor:
        if self._work is not None:
            self._work.wait()
        self._work = self._source = None
        return self._result


Start = Callable[[Tensor, dist.ProcessGroup], Pending]


def start_gather(x: Tensor, group: dist.ProcessGroup) -> Pending:
    """All ranks' `x` `[t, ...]`, concatenated to `[T, ...]`; outside autograd."""
    if group.size() == 1:
        return Pending(x, None)
    x = x.contiguous()
    whole = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
    return Pending(whole, _all_gather(whole, x, group=group, async_op=True), x)


def start_scatter(x: Tensor, group: dist.ProcessGroup) -> Pending:
    """The sum over ranks of `x` `[T, ...]`, of which each rank gets its `[t, ...]`; outside autograd.

    Raises ValueError where T is not a multiple of the number of ranks.
    """
    if group.size() == 1:
        return Pending(x, None)
    if x.shape[0] % group.size():
        raise ValueError(f"{x.shape[0]} rows cannot be scattered over {group.size()} ranks: make them a multiple")
    x = x.contiguous()
    part = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    return Pending(part, _reduce_scatter(part, x, group=group, async_op=True), x)


def start_sum(x: Tensor, group: dist.ProcessGroup) -> Pending:
    """The sum of `x` over ranks, in place; outside autograd."""
    return Pending(x, dist.all_reduce(x, group=group, async_op=True) if group.size() > 1 else None)


def reduce_(x: Tensor, group: dist.ProcessGroup, op: str = "sum") -> Tensor:
    """`x` reduced in place over `group` ("sum" or "max"), outside autograd."""
    if group.size() > 1:
        dist.all_reduce(x, op={"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op], group=group)
    return x


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return reduce_(grad.clone(memory_format=torch.contiguous_format), ctx.group), None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return reduce_(x.clone(memory_format=torch.contiguous_format), group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


class _Exchange(torch.autograd.Function):
    """The collective that `there` starts; `back` starts its adjoint."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, there: Start, back: Start) -> Tensor:
        ctx.group, ctx.back = group, back
        return there(x, group).wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return ctx.back(grad, ctx.group).wait(), None, None, None


def copy(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`x` itself, used differently on each rank: the gradient is summed over `group`."""
    return x if group.size() == 1 else _Copy.apply(x, group)


def all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum of `x` over `group`; every rank goes on with the same value in the same way, so the gradient passes unchanged."""
    return x if group.size() == 1 else _AllReduce.apply(x, group)


def gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`x` `[t, ...]` of all ranks as `[T, ...]`, used differently on each rank: the gradient is summed and scattered."""
    return x if group.size() == 1 else _Exchange.apply(x, group, start_gather, start_scatter)


def scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum over ranks of `x` `[T, ...]`, split by rows to `[t, ...]`; the gradient is gathered."""
    return x if group.size() == 1 else _Exchange.apply(x, group, start_scatter, start_gather)
