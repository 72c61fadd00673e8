"""Vocabulary-parallel embedding, logits and loss. `v` is this rank's contiguous slice of the vocabulary V."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mamba_kernels import softmax_gradient, softmax_statistics
from mamba_kernels.cross_entropy import scale_
from megatron_mamba.parallel import collectives
from megatron_mamba.parallel.context import ParallelContext
from megatron_mamba.parallel.linear import all_tokens, sum_partial

IGNORE = -100
"""Label of a token that is left out of the loss."""

LOGITS_BYTES = 1 << 30
"""Of the logits that exist at one time on a rank: enough tokens for fast matrix products."""

TILE = 256
"""Tokens: chunks are multiples of it, which no matrix product pads."""


def embed(tokens_T: Tensor, weight_vD: Tensor, context: ParallelContext) -> Tensor:
    """Rows of the embedding: tokens `[T]` int64 in [0, V), weight `[v, D]` -> `[T, D]` (`[t, D]` with sequence
    parallelism); one sum over tp."""
    start = context.rank("tp") * weight_vD.shape[0]
    local = tokens_T - start
    here = (local >= 0) & (local < weight_vD.shape[0])
    rows = F.embedding(local.where(here, 0), weight_vD)
    if context.size("tp") > 1:
        rows = rows * here.unsqueeze(-1)
    return sum_partial(rows, context)


def logits(hidden: Tensor, weight_vD: Tensor, context: ParallelContext) -> Tensor:
    """Full logits `[..., V]` for generation and checks, from hidden `[..., D]`; no gradient under tp > 1."""
    local = F.linear(hidden, weight_vD)
    if context.size("tp") == 1:
        return local
    shards = [torch.empty_like(local) for _ in range(context.size("tp"))]
    dist.all_gather(shards, local.detach().contiguous(), group=context.group("tp"))
    return torch.cat(shards, dim=-1)


def cross_entropy(
    hidden_TD: Tensor, weight_vD: Tensor, labels_T: Tensor, context: ParallelContext, *, scale: float, chunk_tokens: int = 0
) -> Tensor:
    """``scale * sum_t CE(softmax(hidden_t W^T), label_t)`` without ever holding logits of more than `chunk_tokens` tokens.

    hidden `[T, D]` (`[t, D]` with sequence parallelism), weight `[v, D]`, labels `[T]` int64 (:data:`IGNORE`, or any
    negative, is left out); `chunk_tokens` 0: as many as have logits of :data:`LOGITS_BYTES` on this rank. Returns an fp32
    (fp64) scalar in nats, the same on every tp rank. Gradients of hidden and weight are computed in the forward pass while
    a chunk's logits exist.
    """
    with_gradient = torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_vD.requires_grad)
    chunk_tokens = chunk_tokens or tokens_at_once(weight_vD)
    return _CrossEntropy.apply(hidden_TD, weight_vD, labels_T, context, scale, chunk_tokens, with_gradient)


def tokens_at_once(weight_vD: Tensor) -> int:
    """How many tokens have logits of :data:`LOGITS_BYTES`: whole tiles of a matrix product."""
    return max(LOGITS_BYTES // (weight_vD.shape[0] * weight_vD.itemsize) // TILE * TILE, TILE)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        context: ParallelContext,
        scale: float,
        chunk_tokens: int,
        with_gradient: bool,
    ) -> Tensor:
        group = context.group("tp")
        first = context.rank("tp") * weight.shape[0]
        hidden = all_tokens(x, context)
        tokens, wide = hidden.shape[0], torch.promote_types(hidden.dtype, torch.float32)
        chunks = [slice(begin, begin + chunk_tokens) for begin in range(0, max(tokens, 1), chunk_tokens)]
        if with_gradient:
            ctx.hidden_grad = torch.empty_like(hidden)
            ctx.weight_grad = torch.empty_like(weight)
        chunk_Tv = _empty_logits(min(tokens, chunk_tokens), weight)
        counted_T = (labels >= 0).to(wide)
        loss_T = torch.empty_like(counted_T)
        for rows in chunks:
            h_TD, target_T = hidden[rows], labels[rows]
            logits_Tv = chunk_Tv[: h_TD.shape[0]]
            torch.mm(h_TD, weight.T, out=logits_Tv)
            local_max, local_sum, target_logit = softmax_statistics(logits_Tv, target_T, first)
            high = collectives.reduce_(local_max.clone(), group, "max")
            # One sum carries both what is still partial: the normaliser and the target's logit.
            sums = torch.stack([local_sum * (local_max - high).exp(), target_logit])
            total, target_logit = collectives.reduce_(sums, group).unbind()
            log_sum_exp = high + total.log()
            torch.sub(log_sum_exp, target_logit, out=loss_T[rows])
            if with_gradient:
                # The matrix products scale: the logits' gradient is not rounded to its dtype with `scale`, the same way for all.
                grad_Tv = softmax_gradient(logits_Tv, target_T, log_sum_exp, counted_T[rows], first, out=logits_Tv)
                _add_product(ctx.hidden_grad[rows], grad_Tv, weight, scale, 0.0)
                # In the weight's own dtype, or it would take twice the gradient's memory. In bf16 the error is 1.1e-3 with 2
                # chunks and 2.4e-3 with 64, against float64; 0.9e-3 is one rounding's.
                _add_product(ctx.weight_grad, grad_Tv.T, h_TD, scale, 0.0 if rows is chunks[0] else 1.0)
        if with_gradient:
            start = collectives.start_scatter if context.sequence_parallel else collectives.start_sum
            ctx.hidden_grad = start(ctx.hidden_grad, group).wait()
        return loss_T.mul_(counted_T).sum() * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden_grad, weight_grad = scale_(ctx.hidden_grad, grad), scale_(ctx.weight_grad, grad)
        ctx.hidden_grad = ctx.weight_grad = None
        return hidden_grad, weight_grad, None, None, None, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor, scale: float, keep: float) -> None:
    """keep total + scale a b, in place; with `keep` 0 what was in `total` does not matter."""
    torch.addmm(total, a, b, beta=keep, alpha=scale, out=total)


def _empty_logits(tokens: int, weight_vD: Tensor) -> Tensor:
    """Room for logits `[T, v]` whose rows begin at multiples of 64 elements, as fast kernels want them."""
    vocabulary = weight_vD.shape[0]
    padded = weight_vD.new_empty(tokens, -(-vocabulary // 64) * 64)
    # A CPU's bf16 matrix product multiplies what is there by zeros.
    padded[:, vocabulary:].zero_()
    return padded[:, :vocabulary]
