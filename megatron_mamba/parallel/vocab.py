"""Vocabulary-parallel embedding, logits and loss. `v` is this rank's contiguous slice of the vocabulary V."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mamba_kernels import softmax_gradient, softmax_statistics
from megatron_mamba.parallel import collectives
from megatron_mamba.parallel.context import ParallelContext
from megatron_mamba.parallel.linear import all_tokens, sum_partial

IGNORE = -100
"""Label of a token that is left out of the loss."""


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
    hidden_TD: Tensor, weight_vD: Tensor, labels_T: Tensor, context: ParallelContext, *, scale: float, chunk_tokens: int
) -> Tensor:
    """``scale * sum_t CE(softmax(hidden_t W^T), label_t)`` without ever holding logits of more than `chunk_tokens` tokens.

    hidden `[T, D]` (`[t, D]` with sequence parallelism), weight `[v, D]`, labels `[T]` int64 (:data:`IGNORE`, or any
    negative, is left out); returns an fp32 (fp64) scalar in nats, the same on every tp rank. Gradients of hidden and
    weight are computed in the forward pass while a chunk's logits exist.
    """
    with_gradient = torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_vD.requires_grad)
    return _CrossEntropy.apply(hidden_TD, weight_vD, labels_T, context, scale, chunk_tokens, with_gradient)


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
        wide = torch.promote_types(hidden.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        if with_gradient:
            ctx.hidden_grad = torch.empty_like(hidden)
            ctx.weight_grad = torch.zeros_like(weight, dtype=wide)
        for begin in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(begin, begin + chunk_tokens)
            h_TD, target_T = hidden[rows], labels[rows]
            logits_Tv = F.linear(h_TD, weight)
            local_max, local_sum, target_logit = softmax_statistics(logits_Tv, target_T, first)
            high = collectives.reduce_(local_max.clone(), group, "max")
            # One sum carries both what is still partial: the normaliser and the target's logit.
            sums = torch.stack([local_sum * (local_max - high).exp(), target_logit])
            total, target_logit = collectives.reduce_(sums, group).unbind()
            log_sum_exp = high + total.log()
            counted = target_T >= 0
            loss += ((log_sum_exp - target_logit) * counted).sum() * scale
            if with_gradient:
                grad_Tv = softmax_gradient(logits_Tv, target_T, log_sum_exp, counted.to(wide) * scale, first)
                torch.mm(grad_Tv, weight, out=ctx.hidden_grad[rows])
                if ctx.weight_grad.dtype == grad_Tv.dtype:
                    ctx.weight_grad.addmm_(grad_Tv.T, h_TD)
                else:
                    ctx.weight_grad += grad_Tv.T @ h_TD
        if with_gradient:
            start = collectives.start_scatter if context.sequence_parallel else collectives.start_sum
            ctx.hidden_grad = start(ctx.hidden_grad, group).wait()
            ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden_grad = ctx.hidden_grad.mul_(grad)
        weight_grad = ctx.weight_grad.mul_(grad).to(ctx.weight_dtype)
        ctx.hidden_grad = ctx.weight_grad = None
        return hidden_grad, weight_grad, None, None, None, None, None
