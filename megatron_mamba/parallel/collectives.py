"""Collectives that autograd sees. Each is the identity on a group of one.

Names say what happens in the forward pass; the backward pass does the adjoint. Tensors are `[T, ...]` and gathered or
scattered along dimension 0.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


def copy(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`x` itself, used differently on each rank: the gradient is summed over `group`."""
    return x if group.size() == 1 else _Copy.apply(x, group)


def all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum of `x` over `group`; every rank goes on with the same value, so the gradient passes unchanged."""
    return x if group.size() == 1 else _AllReduce.apply(x, group)


def reduce_(x: Tensor, group: dist.ProcessGroup, op: str = "sum") -> Tensor:
    """`x` reduced in place over `group` ("sum" or "max"), outside autograd."""
    if group.size() > 1:
        dist.all_reduce(x, op={"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op], group=group)
    return x
