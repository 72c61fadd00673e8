"""Causal softmax attention with grouped key/value heads and optional (partial) RoPE."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_kernels import rope
from megatron_mamba.config import ModelConfig
from megatron_mamba.model import parameters
from megatron_mamba.model.module import KeyValueState, SequenceInfo, TableModule
from megatron_mamba.parallel import ring_attention
from megatron_mamba.parallel.context import ParallelContext
from megatron_mamba.parallel.linear import row_parallel, sum_partial


class Attention(TableModule):
    """``out_proj(softmax(q k^T / sqrt(P)) v)`` over the heads of this rank; attention never crosses a document start."""

    def __init__(self, config: ModelConfig, context: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__(parameters.attention(config), context, dtype)
        self.head_dim, self.kv_heads = config.attention.head_dim, self.local_units("k_proj")

    def forward(self, x_TD: Tensor, info: SequenceInfo, state: KeyValueState | None = None) -> Tensor:
        """x `[T, D]` -> `[T, D]`; with `state`, attends to the cached positions too and adds the new ones."""
        packed_TC = self.project(x_TD, "q_proj", "k_proj", "v_proj")
        return sum_partial(self.inside(self._mix, packed_TC, info, state), self.context)

    def _mix(self, packed_TC: Tensor, info: SequenceInfo, state: KeyValueState | None) -> Tensor:
        """From the projected `[T, q + k + v]` to this rank's part of the output's sum, `[T, D]`."""
        packed = packed_TC.unflatten(0, (info.batch, info.length)).unflatten(-1, (-1, self.head_dim))
        q, k, v = packed.split([self.local_units("q_proj"), self.kv_heads, self.kv_heads], dim=-2)
        if info.rope is not None:
            q, k = rope(q, *info.rope), rope(k, *info.rope)
        if info.ring is not None:
            y = ring_attention.attention(q, k, v, info.ring, self.context)
        elif state is None:
            y = _by_document(q, k, v, info)
        else:
            end = info.offset + info.length
            state.key[:, info.offset : end] = k
            state.value[:, info.offset : end] = v
            y = _sdpa(q, state.key[:, :end], state.value[:, :end], mask=_cache_mask(info))
        return row_parallel(y.flatten(-2).flatten(0, 1), self.local("out_proj"), self.context)

    step = forward

    def new_state(self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> KeyValueState:
        """Room for `capacity` positions of `batch` rows."""
        shape = (batch, capacity, self.kv_heads, self.head_dim)
        return KeyValueState(torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype))


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None) -> Tensor:
    """q `[B, S, H, P]`, k and v `[B, L, K, P]` -> `[B, S, H, P]`; causal when `mask` is None."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=gqa).transpose(1, 2)


def _by_document(q: Tensor, k: Tensor, v: Tensor, info: SequenceInfo) -> Tensor:
    """Causal attention inside each document: work and memory go with the documents, no S x S mask is made."""
    if info.document_start is None:
        return _sdpa(q, k, v, mask=None)
    rows = []
    for row, lengths in enumerate(info.documents):
        pieces = (t[row : row + 1].split(lengths, dim=1) for t in (q, k, v))
        rows.append(torch.cat([_sdpa(*piece, mask=None) for piece in zip(*pieces, strict=True)], dim=1))
    return torch.cat(rows)


def _cache_mask(info: SequenceInfo) -> Tensor | None:
    """`[B, 1, S, L]` bool: which of the L = offset + S positions each new token sees; None where plain causal is right."""
    if info.offset == 0 and info.start is None:
        return None
    key = torch.arange(info.offset + info.length, device=info.device)
    query = key[info.offset :, None]
    mask = (key <= query)[None, None]
    if info.start is not None:
        first = info.start[:, None, None, None]
        # Padding sees only itself: its output is never used, but a row with nothing to attend to would be NaN.
        mask = mask & ((key >= first) | (key == query))
    return mask
