"""SSD by chunks in plain torch (Mamba-2, arXiv 2405.21060, section 6): matrix products inside a chunk, a recurrence between.

Forward and backward take one chunk at a time, so no [Q, Q] matrix of more than one chunk exists; the backward keeps the
inputs and the state before each chunk, and recomputes the rest. With X_j = dt_j x_j, a_j = dt_j A and h the state
before the chunk, a chunk of Q tokens is, for one head,
    L_ij = exp(a_{j+1} + ... + a_i)   decay from token j to token i >= j, 0 across a document start
    E_i  = exp(a_1 + ... + a_i)       decay from the chunk's start to token i, 0 from the first document start on
    F_j  = exp(a_{j+1} + ... + a_Q)   decay from token j to the chunk's end, 0 before the last document start
    y_i  = sum_j L_ij (C_i . B_j) X_j + E_i h C_i + D x_i
    h'   = E_Q h + sum_j F_j X_j B_j^T
The K = H / G heads of a group share B and C: they share the product C_i . B_j, and count as one head of K * P channels in
the products with the state. `g_` before a name is the gradient of the loss with respect to it.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Fastest, or within noise of it, forward and backward, for small models on a CPU (16 to 256 tried).
DEFAULT_CHUNK_SIZE = 64

# Sums of dt A below the first number decay to 0, so that no factor is near the smallest normal number: exp of numbers
# that underflow, and matrix products of subnormal ones, are 10 times slower than others. The second number is just
# above exp of the first.
NEGLIGIBLE_DECAY = {torch.float32: (-80.0, 2e-35), torch.float64: (-700.0, 1e-304)}


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    document_start: Tensor | None,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """`mamba_kernels.ssd` on checked arguments, with dt [B, S, H] already the positive step size; y and final state."""
    return _ChunkedSSD.apply(x, dt, A, B, C, D, initial_state, document_start, chunk_size or DEFAULT_CHUNK_SIZE)


class _Chunk(NamedTuple):
    """What forward and backward both need of a chunk, in the dtype of dt."""

    X_BHQP: Tensor
    B_BGQN: Tensor
    C_BGQN: Tensor
    CB_BGQQ: Tensor
    L_BHQQ: Tensor
    E_BHQ: Tensor
    F_BHQ: Tensor


def _load_chunk(tokens: slice, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, document_start: Tensor | None) -> _Chunk:
    """Slice the sequence, and compute the decays and the products C_i . B_j of the chunk."""
    dtype = dt.dtype
    x_BHQP, dt_BHQ = x[:, tokens].transpose(1, 2), dt[:, tokens].mT
    B_BGQN, C_BGQN = (t[:, tokens].transpose(1, 2).to(dtype) for t in (B, C))
    # In float64: the sum over a short segment is a small difference of cumulative sums that may be large.
    sums_BHQ = (dt_BHQ * A[:, None]).double().cumsum(-1)
    # Masked after exp, and before it too, as exp that overflows, above the diagonal, is 10 times slower.
    L_BHQQ = _decay((sums_BHQ[..., :, None] - sums_BHQ[..., None, :]).tril_(), dtype).tril_()
    E_BHQ, F_BHQ = _decay(sums_BHQ, dtype), _decay(sums_BHQ[..., -1:] - sums_BHQ, dtype)
    if document_start is not None:
        document_BQ = document_start[:, tokens].cumsum(1)
        L_BHQQ *= (document_BQ[:, None, :, None] == document_BQ[:, None, None, :]).to(dtype)
        E_BHQ *= (document_BQ == 0).unsqueeze(1)
        F_BHQ *= (document_BQ == document_BQ[:, -1:]).unsqueeze(1)
    X_BHQP = dt.new_empty(x_BHQP.shape)
    torch.mul(x_BHQP, dt_BHQ.unsqueeze(-1), out=X_BHQP)
    return _Chunk(X_BHQP, B_BGQN, C_BGQN, C_BGQN @ B_BGQN.mT, L_BHQQ, E_BHQ, F_BHQ)


def _decay(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(sums), or 0 where negligible."""
    least, negligible = NEGLIGIBLE_DECAY[dtype]
    decay = sums.to(dtype, copy=True).clamp_(min=least).exp_()
    return torch.threshold_(decay, negligible, 0.0)


def _by_group(t: Tensor, groups: int) -> Tensor:
    """[B, H, ...] as [B, G, K, ...]."""
    return t.unflatten(1, (groups, -1))


def _merge_heads(t_BHQP: Tensor, scale_BHQ: Tensor, groups: int) -> Tensor:
    """scale * t as [B, G, Q, K * P], the layout in which a group is one head."""
    t_BGQKP = _by_group(t_BHQP, groups).transpose(2, 3)
    scaled = t_BHQP.new_empty(t_BGQKP.shape)
    torch.mul(t_BGQKP, _by_group(scale_BHQ, groups).transpose(2, 3).unsqueeze(-1), out=scaled)
    return scaled.flatten(3)


def _split_heads(t_BGQR: Tensor, heads: int) -> Tensor:
    """[B, G, Q, K * P] as a [B, H, Q, P] view, or copy where the strides of G and K do not merge."""
    per_group = heads // t_BGQR.shape[1]
    return t_BGQR.unflatten(3, (per_group, -1)).transpose(2, 3).flatten(1, 2)


def _scaled_by_CB(t_BHQQ: Tensor, CB_BGQQ: Tensor) -> Tensor:
    """t * CB in place, the heads of a group sharing CB."""
    return _by_group(t_BHQQ, CB_BGQQ.shape[1]).mul_(CB_BGQQ.unsqueeze(2)).flatten(1, 2)


def _next_state(state_BHPN: Tensor, c: _Chunk, left_BGQR: Tensor, right_BGQN: Tensor) -> Tensor:
    """E_Q state + left^T right: the recurrence between chunks, and its transpose in the backward."""
    update = (left_BGQR.mT @ right_BGQN).view(state_BHPN.shape)
    return update.addcmul_(state_BHPN, c.E_BHQ[..., -1, None, None])


def _chunk_output(c: _Chunk, state_BHPN: Tensor) -> Tensor:
    """y without the D term, [B, H, Q, P]. Overwrites L."""
    heads, groups = c.X_BHQP.shape[1], c.B_BGQN.shape[1]
    y_BHQP = _scaled_by_CB(c.L_BHQQ, c.CB_BGQQ) @ c.X_BHQP
    state_BGRN = _by_group(state_BHPN, groups).flatten(2, 3)
    from_state = _split_heads(c.C_BGQN @ state_BGRN.mT, heads)
    return y_BHQP.addcmul_(from_state, c.E_BHQ.unsqueeze(-1))


def _chunk_gradients(
    c: _Chunk, state_BHPN: Tensor, g_y_BHQP: Tensor, g_next_BHPN: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of X [B, H, Q, P], dt A [B, H, Q], B and C [B, G, Q, N], and the state before the chunk. Overwrites L."""
    (heads, length, head_dim), groups = c.X_BHQP.shape[1:], c.B_BGQN.shape[1]
    # Token to token inside the chunk.
    g_M = (g_y_BHQP @ c.X_BHQP.mT).mul_(c.L_BHQQ)
    g_CB = _by_group(g_M, groups).sum(2)
    g_log_L = _scaled_by_CB(g_M, c.CB_BGQQ)
    g_X = _scaled_by_CB(c.L_BHQQ, c.CB_BGQQ).mT @ g_y_BHQP
    # Through the state before the chunk, and into the one after it.
    state_BGRN, g_next_BGRN = (_by_group(t, groups).flatten(2, 3) for t in (state_BHPN, g_next_BHPN))
    g_y_E = _merge_heads(g_y_BHQP, c.E_BHQ, groups)
    X_F = _merge_heads(c.X_BHQP, c.F_BHQ, groups)
    g_log_E = (g_y_E * (c.C_BGQN @ state_BGRN.mT)).unflatten(3, (-1, head_dim)).sum(-1).transpose(2, 3).flatten(1, 2)
    g_X_next = _split_heads(c.B_BGQN @ g_next_BGRN.mT, heads) * c.F_BHQ.unsqueeze(-1)
    g_log_F = (g_X_next * c.X_BHQP).sum(-1)
    g_log_decay = (g_next_BHPN * state_BHPN).sum((-1, -2)) * c.E_BHQ[..., -1]
    g_C = g_CB @ c.B_BGQN + g_y_E @ state_BGRN
    g_B = g_CB.mT @ c.C_BGQN + X_F @ g_next_BGRN
    # a_k is in L_ij for j < k <= i, in E_i for k <= i, in F_j for j < k. Summed as such: the difference of row sums and
    # column sums of g_log_L would lose small gradients to cancellation.
    before = torch.ones(length, length, dtype=g_M.dtype, device=g_M.device).triu_(1)
    g_a = (g_log_L @ before).tril_().sum(-2)
    g_a += g_log_E.flip(-1).cumsum(-1).flip(-1)
    g_a[..., 1:] += g_log_F.cumsum(-1)[..., :-1]
    g_a += g_log_decay.unsqueeze(-1)
    return g_X.add_(g_X_next), g_a, g_B, g_C, _next_state(g_next_BHPN, c, g_y_E, c.C_BGQN)


class _ChunkedSSD(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        initial_state: Tensor | None,
        document_start: Tensor | None,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        (batch, length, heads, head_dim), (groups, state_size) = x.shape, B.shape[2:]
        A_H, D_H1 = A.to(dt.dtype), None if D is None else D.to(dt.dtype).unsqueeze(-1)
        if initial_state is None:
            state = dt.new_zeros(batch, heads, head_dim, state_size)
        else:
            state = initial_state.to(dt.dtype).contiguous()
        y = x.new_empty(x.shape)
        states_before = []
        for begin in range(0, length, chunk_size):
            tokens = slice(begin, begin + chunk_size)
            states_before.append(state)
            c = _load_chunk(tokens, x, dt, A_H, B, C, document_start)
            y_BQHP = _chunk_output(c, state).transpose(1, 2)
            y[:, tokens] = y_BQHP if D_H1 is None else y_BQHP.addcmul_(x[:, tokens], D_H1)
            state = _next_state(state, c, _merge_heads(c.X_BHQP, c.F_BHQ, groups), c.B_BGQN)
        ctx.save_for_backward(x, dt, A, B, C, D, initial_state, document_start, *states_before)
        ctx.chunk_size = chunk_size
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_y: Tensor, g_state: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, initial_state, document_start, *states_before = ctx.saved_tensors
        A_H, D_H1 = A.to(dt.dtype), None if D is None else D.to(dt.dtype).unsqueeze(-1)
        g_x, g_dt, g_B, g_C = (t.new_empty(t.shape) for t in (x, dt, B, C))
        g_A, g_D = torch.zeros_like(A_H), torch.zeros_like(A_H)
        g_state = g_state.contiguous()
        for index in reversed(range(len(states_before))):
            tokens = slice(index * ctx.chunk_size, (index + 1) * ctx.chunk_size)
            x_BQHP, dt_BQH, g_y_BQHP = (t[:, tokens].to(dt.dtype) for t in (x, dt, g_y))
            c = _load_chunk(tokens, x, dt, A_H, B, C, document_start)
            g_y_BHQP = g_y_BQHP.transpose(1, 2).contiguous()
            g_X, g_a, g_B_c, g_C_c, g_state = _chunk_gradients(c, states_before[index], g_y_BHQP, g_state)
            g_X, g_a = g_X.transpose(1, 2), g_a.mT
            g_B[:, tokens], g_C[:, tokens] = g_B_c.transpose(1, 2), g_C_c.transpose(1, 2)
            g_A += (g_a * dt_BQH).sum((0, 1))
            g_dt[:, tokens] = (g_X * x_BQHP).sum(-1).addcmul_(g_a, A_H)
            g_X *= dt_BQH.unsqueeze(-1)
            if D_H1 is not None:
                g_D += (g_y_BQHP * x_BQHP).sum((0, 1, 3))
                g_X.addcmul_(g_y_BQHP, D_H1)
            g_x[:, tokens] = g_X
        g_initial = None if initial_state is None else g_state.to(initial_state.dtype)
        g_D_or_none = None if D is None else g_D.to(D.dtype)
        return g_x, g_dt, g_A.to(A.dtype), g_B, g_C, g_D_or_none, g_initial, None, None
