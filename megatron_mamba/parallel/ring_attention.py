"""Causal attention over sequences spread over cp ranks: a ring of keys and values, with equal work for every rank.

Contiguous pieces would give the last rank most of the work, since it sees all keys. For the time of the attention the 2 cp
half-pieces (chunks) of a sequence are therefore dealt out anew: rank i gets chunks i and 2 cp - 1 - i, in one all-to-all of
q, k and v before and one of the output after. Then keys and values go round (Ring Attention, arXiv 2310.01889): in cp steps
each rank meets every rank's two chunks while the next ones are on their way, and computes half the pairs of chunks at every
step. Partial results are merged by their log-sum-exps. A rank holds two pieces of keys and values at a time, whatever cp.

Attention never crosses a document start: what a chunk of queries sees of a chunk of keys is a list of rectangles without
masks, since an earlier chunk can share one document only with a later one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend

from megatron_mamba.parallel.collectives import Pending
from megatron_mamba.parallel.context import ParallelContext
from megatron_mamba.parallel.sequence import all_to_all, start_shift


class Block(NamedTuple):
    """Queries and keys that meet: rows of the batch, and positions in this rank's and in another rank's two chunks."""

    rows: slice
    query: slice
    key: slice
    causal: bool
    """Position i of the queries sees keys up to its own; otherwise all."""


Ring = list[list[Block]]
"""What this rank computes with the chunks of each rank of the ring."""


def schedule(batch: int, length: int, starts: Sequence[Sequence[int]] | None, context: ParallelContext) -> Ring:
    """What this rank computes, for pieces of `length` tokens.

    `starts`: for each row of the batch the positions in the whole sequence at which documents start, in order (0 may be
    left out); None: every row is one document.
    """
    ranks, rank = context.size("cp"), context.rank("cp")
    bounds = [0]
    for chunk in range(2 * ranks):
        bounds.append(bounds[-1] + _chunk_size(length, chunk))
    rows = [slice(0, batch)] if starts is None else [slice(i, i + 1) for i in range(batch)]
    found: Ring = []
    for other in range(ranks):
        blocks = []
        for row in rows:
            borders = sorted({0, *(() if starts is None else starts[row.start]), bounds[-1]})
            for q, q_at in _places(rank, ranks, length):
                for k, k_at in _places(other, ranks, length):
                    blocks += _between(row, borders, (bounds[q], bounds[q + 1], q_at), (bounds[k], bounds[k + 1], k_at))
        found.append(blocks)
    return found


def attention(q: Tensor, k: Tensor, v: Tensor, blocks: Ring, context: ParallelContext) -> Tensor:
    """Causal attention: q `[B, s, H, P]`, k and v `[B, s, K, P]`, this rank's pieces -> `[B, s, H, P]`. K divides H."""
    output: Tensor = _RingAttention.apply(q, k, v, blocks, context.group("cp"))
    return output


def _chunk_size(length: int, chunk: int) -> int:
    """Tokens of a half-piece: of an odd piece the even chunk has one more."""
    return length // 2 if chunk % 2 else length - length // 2


def _dealt(rank: int, ranks: int) -> tuple[int, int]:
    """The chunks that a rank computes with: an early and a late one, one of them even."""
    return rank, 2 * ranks - 1 - rank


def _places(rank: int, ranks: int, length: int) -> list[tuple[int, int]]:
    """The chunks that a rank computes with, and where each begins in what it holds."""
    first, second = _dealt(rank, ranks)
    return [(first, 0), (second, _chunk_size(length, first))]


def _between(rows: slice, borders: list[int], q: tuple[int, int, int], k: tuple[int, int, int]) -> list[Block]:
    """The rectangles between chunks given as (begin, end, place in the rank's memory), documents lying between `borders`."""
    (q_begin, q_end, q_at), (k_begin, k_end, k_at) = q, k
    if k_begin > q_begin:
        return []
    blocks = []
    # From the document of the first query on.
    for i in range(bisect_right(borders, q_begin) - 1, len(borders) - 1):
        begin, end = borders[i], borders[i + 1]
        if begin >= min(q_end, k_end):
            break
        query, key = (max(begin, q_begin), min(end, q_end)), (max(begin, k_begin), min(end, k_end))
        if query[0] < query[1] and key[0] < key[1]:
            at = slice(query[0] - q_begin + q_at, query[1] - q_begin + q_at)
            blocks.append(Block(rows, at, slice(key[0] - k_begin + k_at, key[1] - k_begin + k_at), q_begin == k_begin))
    return blocks


def _deal(x: Tensor, group: dist.ProcessGroup, *, back: bool = False) -> Tensor:
    """From pieces `[B, s, ...]` to the rank's two chunks, `[B, s, ...]`, or `back`."""
    rank, ranks, length = group.rank(), group.size(), x.shape[1]

    def dealt_to(chunk: int) -> int:
        return min(chunk, 2 * ranks - 1 - chunk)

    def piece_of(chunk: int) -> int:
        return chunk // 2

    held, wanted, target, source = (2 * rank, 2 * rank + 1), _dealt(rank, ranks), dealt_to, piece_of
    if back:
        held, wanted, target, source = wanted, held, source, target
    parts = dict(zip(held, x.split([_chunk_size(length, chunk) for chunk in held], dim=1), strict=True))
    to, of = [0] * ranks, [0] * ranks
    per_token = x.numel() // length
    for chunk in held:
        to[target(chunk)] += per_token * _chunk_size(length, chunk)
    for chunk in wanted:
        of[source(chunk)] += per_token * _chunk_size(length, chunk)
    sent = torch.cat([parts[chunk].flatten() for chunk in sorted(held, key=lambda c: (target(c), c))])
    received = torch.empty_like(sent)
    Pending(received, all_to_all(received, sent, of, to, group)).wait()
    order = sorted(wanted, key=lambda c: (source(c), c))
    pieces = received.split([per_token * _chunk_size(length, chunk) for chunk in order])
    found = {chunk: flat.view(x.shape[0], -1, *x.shape[2:]) for chunk, flat in zip(order, pieces, strict=True)}
    return torch.cat([found[chunk] for chunk in wanted], dim=1)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: Ring, group: dist.ProcessGroup
    ) -> Tensor:
        heads, kv_heads = q.shape[2], k.shape[2]
        # [B, H, s, P] from here on, as the cores want it.
        dealt = _deal(torch.cat([q, k, v], dim=2), group).transpose(1, 2)
        q_, kv = dealt[:, :heads].contiguous(), dealt[:, heads:].contiguous()
        wide = torch.promote_types(q.dtype, torch.float32)
        out = torch.zeros(q_.shape, dtype=wide, device=q.device)
        lse = torch.full(q_.shape[:3], -torch.inf, dtype=wide, device=q.device)
        held = kv
        for step in range(group.size()):
            coming = start_shift(held, group, 1, around=True) if step < group.size() - 1 else None
            for block in blocks[(group.rank() - step) % group.size()]:
                part, part_lse = _core(*_operands(q_, held, kv_heads, block), block.causal)
                _merge(out[block.rows, :, block.query], lse[block.rows, :, block.query], part, part_lse)
            if coming is not None:
                held = coming.wait()
        out = out.to(q.dtype)
        ctx.save_for_backward(q_, kv, out, lse)
        ctx.blocks, ctx.group = blocks, group
        return _deal(out.transpose(1, 2), group, back=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, kv, out, lse = ctx.saved_tensors
        group, kv_heads = ctx.group, kv.shape[1] // 2
        grad = _deal(grad, group).transpose(1, 2).contiguous()
        g_q = torch.zeros_like(q, dtype=lse.dtype)
        held, returning = kv, None
        for step in range(group.size()):
            coming = start_shift(held, group, 1, around=True) if step < group.size() - 1 else None
            g_held = torch.zeros_like(held, dtype=lse.dtype)
            for block in ctx.blocks[(group.rank() - step) % group.size()]:
                at = (block.rows, slice(None), block.query)
                operands = _operands(q, held, kv_heads, block)
                parts = _core_backward(grad[at], *operands, out[at], lse[at].contiguous(), block.causal)
                g_q[at] += parts[0]
                g_held[block.rows, :kv_heads, block.key] += parts[1]
                g_held[block.rows, kv_heads:, block.key] += parts[2]
            # The gradients of keys and values follow them, one step behind, and are at home after a whole round.
            if returning is not None:
                g_held += returning.wait()
            returning = start_shift(g_held, group, 1, around=True)
            if coming is not None:
                held = coming.wait()
        assert returning is not None
        g_packed = torch.cat([g_q.to(q.dtype), returning.wait().to(q.dtype)], dim=1).transpose(1, 2)
        heads = q.shape[1]
        g_q, g_k, g_v = _deal(g_packed, group, back=True).split([heads, kv_heads, kv_heads], dim=2)
        return g_q, g_k, g_v, None, None


def _operands(q: Tensor, kv: Tensor, kv_heads: int, block: Block) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a rectangle."""
    return (
        q[block.rows, :, block.query],
        kv[block.rows, :kv_heads, block.key],
        kv[block.rows, kv_heads:, block.key],
    )


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Add to softmax averages `out` `[B, H, q, P]` over keys seen so far, of log-sum-exp `lse`, those over further keys; in
    place."""
    total = torch.logaddexp(lse, part_lse)
    out.mul_((lse - total).exp_().unsqueeze(-1)).addcmul_(part.to(out.dtype), (part_lse - total).exp_().unsqueeze(-1))
    lse.copy_(total)


def _kernel(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> SDPBackend:
    """Which of torch's attention kernels to use: what scaled_dot_product_attention would, if it tells log-sum-exps."""
    if q.device.type == "cpu":
        return SDPBackend.FLASH_ATTENTION
    choice = SDPBackend(torch._fused_sdp_choice(q, k, v, None, 0.0, causal, scale=None, enable_gqa=True))
    told = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
    # What is left are dtypes for checks.
    return choice if choice in told else SDPBackend.MATH


def _core(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention of q `[B, H, Q, P]` to k, v `[B, K, L, P]`: the averages, and their log-sum-exps `[B, H, Q]`."""
    aten, kernel = torch.ops.aten, _kernel(q, k, v, causal)
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    elif kernel == SDPBackend.CUDNN_ATTENTION:
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False)
        lse = lse.squeeze(-1)
    elif kernel == SDPBackend.FLASH_ATTENTION:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
    else:
        scores = _scores(q, k, causal)
        lse = scores.logsumexp(-1)
        out = (scores - lse.unsqueeze(-1)).exp() @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    return out, lse


def _core_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v through their rectangle, given the output and log-sum-exp over all keys."""
    aten, kernel = torch.ops.aten, _kernel(q, k, v, causal)
    if q.device.type == "cpu":
        g_q, g_k, g_v = aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, causal)
        return g_q, g_k, g_v
    if kernel == SDPBackend.MATH:
        shared = q.shape[1] // k.shape[1]
        weights = (_scores(q, k, causal) - lse.unsqueeze(-1)).exp()
        g_weights = grad @ v.repeat_interleave(shared, 1).mT
        g_scores = weights * (g_weights - (grad * out).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
        g_q = g_scores @ k.repeat_interleave(shared, 1)
        g_k, g_v = (t.unflatten(1, (-1, shared)).sum(2) for t in (g_scores.mT @ q, weights.mT @ grad))
        return g_q, g_k, g_v
    seed = torch.zeros((), dtype=torch.int64, device=q.device)  # of a dropout that there is not
    if kernel == SDPBackend.CUDNN_ATTENTION:
        g_q, g_k, g_v = aten._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, out, lse.unsqueeze(-1), seed, seed, None, None, None, q.shape[2], k.shape[2], 0.0, causal
        )
    else:
        g_q, g_k, g_v = aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, seed, seed
        )
    return g_q, g_k, g_v


def _scores(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """`[B, H, Q, L]`, -inf where a query does not see a key."""
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * q.shape[-1] ** -0.5
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu_(1)
        scores = scores.masked_fill_(later, -torch.inf)
    return scores
