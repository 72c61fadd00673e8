"""Column- and row-parallel linear layers as functions on local tensors, and the borders of sequence parallelism.

The residual stream outside the layers is `x_TD`, equal on all tp ranks, or with sequence parallelism `x_tD`, this rank's
tokens of it. :func:`column_parallel` takes either to all tokens of this rank's channels, :func:`sum_partial` brings sums over
channels back. Gradients of replicated parameters that see only a part of the tokens are summed at the end of a step.

Under a zero-bubble schedule the context has a place for what is put off: the backward pass then computes gradients of inputs
only, and leaves there what computes those of the two projections' weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_mamba.parallel import collectives
from megatron_mamba.parallel.context import ParallelContext


def column_parallel(x: Tensor, weights: Sequence[Tensor], context: ParallelContext, *, gather_again: bool = False) -> Tensor:
    """``x @ concat(weights).T``: several projections of one input as one matrix product.

    x: `[T, D]`, the same on every tp rank (`[t, D]` with sequence parallelism); weights: `[rows_i, D]`, this rank's rows;
    returns `[T, sum(rows_i)]`. The gradient of x is summed over tp. `gather_again` keeps `[t, D]` for the backward pass,
    not `[T, D]`, at the price of one more gather, which overlaps a matrix product. Weights are concatenated again in the
    backward pass, so that what FSDP has gathered is not held in between.
    """
    later = _Later.of(weights, x, context)
    given = weights if later is None else [w.detach() for w in weights]
    return _ColumnParallel.apply(x, context, gather_again and context.sequence_parallel, later, *given)


def row_parallel(x_Tc: Tensor, weight: Tensor, context: ParallelContext) -> Tensor:
    """``x @ weight.T`` over this rank's channels: x `[T, c]`, weight `[D, c]` -> this rank's part of the sum, `[T, D]`."""
    later = _Later.of([weight], x_Tc, context)
    return F.linear(x_Tc, weight) if later is None else _RowParallel.apply(x_Tc, weight.detach(), later)


def sum_partial(x_TD: Tensor, context: ParallelContext) -> Tensor:
    """The sum over tp ranks of `x` `[T, D]`: equal on all of them, or with sequence parallelism each rank's `[t, D]`."""
    group = context.group("tp")
    return collectives.scatter(x_TD, group) if context.sequence_parallel else collectives.all_reduce(x_TD, group)


def all_tokens(x: Tensor, context: ParallelContext) -> Tensor:
    """The residual stream of all tokens, `[T, D]`, from what this rank holds of it."""
    return collectives.gather(x, context.group("tp")) if context.sequence_parallel else x


def shared_sum(x: Tensor, context: ParallelContext) -> Tensor:
    """The sum of `x` over tp ranks which each of them uses for channels of its own: gradients are summed as well."""
    group = context.group("tp")
    return collectives.copy(collectives.all_reduce(x, group), group)


def group_sum(x: Tensor, groups: int, context: ParallelContext) -> Tensor:
    """The sum of `x` `[T]` over the tp ranks that share one of `groups` (fewer than ranks), outside autograd."""
    sums = x.new_zeros(groups, *x.shape)
    mine = context.rank("tp") * groups // context.size("tp")
    sums[mine] = x
    return collectives.reduce_(sums, context.group("tp"))[mine]


class _Later:
    """Weights whose gradients the backward pass leaves to the context's place for that.

    Functions get the weights detached, so that the graph they are in has no edge to them; what is put off reaches them through
    the views held here, whose own graph keeps no tensors.
    """

    def __init__(self, weights: Sequence[Tensor], place: list[Callable[[], None]]) -> None:
        self._weights, self._place = list(weights), place

    @classmethod
    def of(cls, weights: Sequence[Tensor], x: Tensor, context: ParallelContext) -> _Later | None:
        """None where there is nothing to put off: no such place, or no backward pass of `x` that could do it."""
        if context.deferred is None or not (torch.is_grad_enabled() and x.requires_grad):
            return None
        return cls(weights, context.deferred)

    def compute(self, gradient: Callable[[], Tensor]) -> None:
        """Have the gradient of the concatenated weights added to theirs, later."""
        weights = self._weights

        def run() -> None:
            with torch.no_grad():
                parts = gradient().split([w.shape[0] for w in weights])
            torch.autograd.backward(weights, parts)

        self._place.append(run)


class _RowParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, later: _Later) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.later = later
        return F.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        ctx.later.compute(lambda: grad.T @ x)
        return grad @ weight, None, None


class _ColumnParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, context: ParallelContext, gather_again: bool, later: _Later | None, *weights: Tensor
    ) -> Tensor:
        group = context.group("tp")
        x_TD = collectives.start_gather(x, group).wait() if context.sequence_parallel else x
        ctx.save_for_backward(x if gather_again else x_TD, *weights)
        ctx.group, ctx.scattered, ctx.gather_again, ctx.later = group, context.sequence_parallel, gather_again, later
        return F.linear(x_TD, _concatenated(weights))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        kept, *weights = ctx.saved_tensors
        # The collectives run while matrix products do: the gather beside that of x's gradient, the sum beside the weights'.
        group = ctx.group
        gathering = collectives.start_gather(kept, group) if ctx.gather_again and ctx.later is None else None
        g_x = grad @ _concatenated(weights)
        x_TD = gathering.wait() if gathering is not None else kept
        start = collectives.start_scatter if ctx.scattered else collectives.start_sum
        summing = start(g_x, group)
        if ctx.later is not None:
            again = ctx.gather_again
            ctx.later.compute(lambda: grad.T @ (collectives.start_gather(kept, group).wait() if again else kept))
            return summing.wait(), None, None, None, *[None for _ in weights]
        g_weights = (grad.T @ x_TD).split([w.shape[0] for w in weights])
        return summing.wait(), None, None, None, *g_weights


def _concatenated(weights: Sequence[Tensor]) -> Tensor:
    return weights[0] if len(weights) == 1 else torch.cat(list(weights))
