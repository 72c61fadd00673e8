"""Context parallelism: rank i of cp holds the i-th contiguous piece of every sequence, equally long on all ranks.

A convolution needs the last inputs of the piece before (:func:`with_halo`), a scan one state (:class:`Ranks`): what crosses the
network does not grow with the length. Attention is in :mod:`megatron_mamba.parallel.ring_attention`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_mamba.parallel.collectives import Pending, start_gather
from megatron_mamba.parallel.context import ParallelContext


def whole_sequence(x: Tensor, context: ParallelContext) -> Tensor:
    """All ranks' pieces `[B, s, ...]` as `[B, S, ...]`; outside autograd."""
    group = context.group("cp")
    if group.size() == 1:
        return x
    return start_gather(x.unsqueeze(0), group).wait().transpose(0, 1).flatten(1, 2)


class Ranks:
    """The cp ranks as a scan sees them (mamba_kernels.common.SequenceRanks): in order, and able to collect a small tensor."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank, self.size = group.rank(), group.size()
        self._group = group

    def start_gather(self, x: Tensor) -> Callable[[], Tensor]:
        """Begin to collect `x` `[n]` of all ranks; the function returned waits and returns `[size, n]`."""
        return start_gather(x.unsqueeze(0), self._group).wait


def sequence_ranks(context: ParallelContext) -> Ranks | None:
    """The ranks that a sequence is spread over; None where one holds all of it."""
    return Ranks(context.group("cp")) if context.size("cp") > 1 else None


def start_shift(x: Tensor, group: dist.ProcessGroup, by: int, *, around: bool) -> Pending:
    """The `x` of the rank `by` places before this one (equal shapes), zeros where there is none; outside autograd.

    `around`: the first rank comes after the last. One all-to-all in which a rank sends to one other.
    """
    rank, size = group.rank(), group.size()
    target, source = rank + by, rank - by
    to, of = [0] * size, [0] * size
    if around or 0 <= target < size:
        to[target % size] = x.numel()
    if around or 0 <= source < size:
        of[source % size] = x.numel()
    sent = x.contiguous().view(-1)[: sum(to)]
    received = x.new_empty(x.shape) if sum(of) else x.new_zeros(x.shape)
    return Pending(received, all_to_all(received.view(-1)[: sum(of)], sent, of, to, group), sent)


def all_to_all(
    received: Tensor, sent: Tensor, of: list[int], to: list[int], group: dist.ProcessGroup
) -> dist.Work | None:
    """Start to send `to[i]` elements of `sent` to rank i, and to receive `of[i]` of each, in order."""
    return dist.all_to_all_single(received, sent, of, to, group=group, async_op=True)


class _Halo(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, channels: slice, width: int, document_start: Tensor | None, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        tail, ctx.seen, ctx.channels, ctx.group = x[:, x.shape[1] - width :, channels], None, channels, group
        if document_start is not None:
            # What a later start in the tail cuts off from the next piece.
            starts = document_start[:, x.shape[1] - width :].long()
            ctx.seen = (starts.flip(1).cumsum(1).flip(1) == starts).unsqueeze(-1)
            tail = tail * ctx.seen
        return x.view_as(x), start_shift(tail, group, 1, around=False).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_before: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        returned = start_shift(grad_before, ctx.group, -1, around=False).wait()
        # In place: the gradient is fresh from the convolution, or the mixer that has one, which alone uses x.
        grad[:, grad.shape[1] - returned.shape[1] :, ctx.channels] += returned if ctx.seen is None else returned * ctx.seen
        return grad, None, None, None, None


def with_halo(
    x: Tensor, width: int, document_start: Tensor | None, context: ParallelContext, channels: slice = slice(None)
) -> tuple[Tensor, Tensor | None]:
    """x `[B, s, C]` and, for a convolution over some of its channels, the `width` inputs before it, `[B, width, channels]`: the
    end of the left neighbour's x, zero before the sequence and before the document that goes on (`document_start` `[B, s]` bool,
    None: one a row); None where one rank holds whole sequences. Gradients of these go back to the neighbour. Raises ValueError
    for pieces shorter than `width`."""
    if context.size("cp") == 1 or width == 0:
        return x, None
    if x.shape[1] < width:
        raise ValueError(f"a piece of {x.shape[1]} tokens is shorter than the {width} that a convolution sees: use fewer cp ranks")
    x, before = _Halo.apply(x, channels, width, document_start, context.group("cp"))
    return x, before
