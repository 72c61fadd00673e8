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

Of a sequence spread over ranks (section 8.2), rank i first scans its piece for the state f_i alone, from a zero state: h'
without E h. With D_i the product of E_Q over its chunks, the state before its piece is
    h_i = sum_{j<i} (prod_{j<k<i} D_k) f_j
from which the scan above runs. Backward, g_j is the gradient of h_j through the outputs of piece j alone, its final state
among them: g_h = E_Q g_h' + sum_i E_i g_y_i C_i^T over its chunks, in reverse. The final state of rank i then has its own
gradient plus
    sum_{j>i} (prod_{i<k<j} D_k) g_j
A pass exchanges f or g and D, B H (P N + 1) numbers a rank for any length. The heads are worked in two parts, so that the
exchange of one overlaps the work on the other.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mamba_kernels.common import SequenceRanks, start_gradient_after, start_state_before

# Fastest, or within noise of it, forward and backward, for small models on a CPU (16 to 256 tried).
DEFAULT_CHUNK_SIZE = 64

# Elsewhere chunks cost kernel launches (64 to 1024 tried on an H200, 128 heads; 256 is faster by a fifth on one GPU, slower by
# four fifths over two, where the heads are worked in two parts).
DEVICE_CHUNK_SIZE = 512

# Sums of dt A below the first number decay to 0, so that no factor is near the smallest normal number: exp of numbers
# that underflow, and matrix products of subnormal ones, are 10 times slower than others. The second number is just
# above exp of the first.
NEGLIGIBLE_DECAY = {torch.float32: (-80.0, 2e-35), torch.float64: (-700.0, 1e-304)}

ALL = slice(None)


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
    ranks: SequenceRanks | None,
) -> tuple[Tensor, Tensor]:
    """`mamba_kernels.ssd` on checked arguments, with dt [B, S, H] already the positive step size; y and final state.

    `ranks` are several, and then there is no initial state, or None.
    """
    chunk_size = chunk_size or (DEFAULT_CHUNK_SIZE if x.device.type == "cpu" else DEVICE_CHUNK_SIZE)
    return _ChunkedSSD.apply(x, dt, A, B, C, D, initial_state, document_start, chunk_size, ranks)


class _Tensors(NamedTuple):
    """What the scan has a gradient for, or the gradients themselves; A and D in the dtype of dt."""

    x: Tensor  # [B, S, H, P]
    dt: Tensor  # [B, S, H]
    A: Tensor  # [H]
    B: Tensor  # [B, S, G, N]
    C: Tensor
    D: Tensor | None

    def part(self, heads: slice, groups: slice) -> "_Tensors":
        """Views of some heads, and of the groups they belong to."""
        if heads == ALL:
            return self
        D = None if self.D is None else self.D[heads]
        return _Tensors(self.x[:, :, heads], self.dt[:, :, heads], self.A[heads], self.B[:, :, groups], self.C[:, :, groups], D)


def halves(heads: int, groups: int, ranks: SequenceRanks | None) -> list[tuple[slice, slice]]:
    """The heads and groups of each part: all for one rank; two parts for several, which share B and C if G = 1."""
    if ranks is None or heads == 1:
        return [(ALL, ALL)]
    if groups == 1:
        return [(half, ALL) for half in (slice(heads // 2), slice(heads // 2, None))]
    cut, per_group = groups // 2, heads // groups
    return [(slice(cut * per_group), slice(cut)), (slice(cut * per_group, None), slice(cut, None))]


def _chunks(length: int, chunk_size: int) -> list[slice]:
    return [slice(begin, begin + chunk_size) for begin in range(0, length, chunk_size)]


class _Decays(NamedTuple):
    """The decays of a chunk from and to its borders, and what those from token to token are made of."""

    sums_BHQ: Tensor  # of dt A, from the chunk's start, in float64
    document_BQ: Tensor | None
    E_BHQ: Tensor
    F_BHQ: Tensor


class _Chunk(NamedTuple):
    """What forward and backward both need of a chunk, in the dtype of dt."""

    X_BHQP: Tensor
    B_BGQN: Tensor
    C_BGQN: Tensor
    CB_BGQQ: Tensor
    L_BHQQ: Tensor
    E_BHQ: Tensor
    F_BHQ: Tensor


def _load_decays(tokens: slice, t: _Tensors, document_start: Tensor | None) -> _Decays:
    # In float64: the sum over a short segment is a small difference of cumulative sums that may be large.
    sums_BHQ = (t.dt[:, tokens].mT * t.A[:, None]).double().cumsum(-1)
    E_BHQ, F_BHQ = _decay(sums_BHQ, t.dt.dtype), _decay(sums_BHQ[..., -1:] - sums_BHQ, t.dt.dtype)
    document_BQ = None
    if document_start is not None:
        document_BQ = document_start[:, tokens].cumsum(1)
        E_BHQ *= (document_BQ == 0).unsqueeze(1)
        F_BHQ *= (document_BQ == document_BQ[:, -1:]).unsqueeze(1)
    return _Decays(sums_BHQ, document_BQ, E_BHQ, F_BHQ)


def _load_chunk(tokens: slice, t: _Tensors, document_start: Tensor | None) -> _Chunk:
    """Slice the sequence, and compute the decays and the products C_i . B_j of the chunk."""
    dtype = t.dt.dtype
    x_BHQP, dt_BHQ = t.x[:, tokens].transpose(1, 2), t.dt[:, tokens].mT
    B_BGQN, C_BGQN = _load_groups(t.B, tokens, dtype), _load_groups(t.C, tokens, dtype)
    sums_BHQ, document_BQ, E_BHQ, F_BHQ = _load_decays(tokens, t, document_start)
    # Masked after exp, and before it too, as exp that overflows, above the diagonal, is 10 times slower.
    L_BHQQ = _decay((sums_BHQ[..., :, None] - sums_BHQ[..., None, :]).tril_(), dtype).tril_()
    if document_BQ is not None:
        L_BHQQ *= (document_BQ[:, None, :, None] == document_BQ[:, None, None, :]).to(dtype)
    X_BHQP = dt_BHQ.new_empty(x_BHQP.shape)
    torch.mul(x_BHQP, dt_BHQ.unsqueeze(-1), out=X_BHQP)
    return _Chunk(X_BHQP, B_BGQN, C_BGQN, C_BGQN @ B_BGQN.mT, L_BHQQ, E_BHQ, F_BHQ)


def _load_groups(t_BSGN: Tensor, tokens: slice, dtype: torch.dtype) -> Tensor:
    """The tokens of B or C as [B, G, Q, N]."""
    return t_BSGN[:, tokens].transpose(1, 2).to(dtype)


def _decay(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(sums), or 0 where negligible."""
    least, negligible = NEGLIGIBLE_DECAY[dtype]
    decay = sums.to(dtype, copy=True).clamp_(min=least).exp_()
    return torch.threshold_(decay, negligible, 0.0)


def _by_group(t: Tensor, groups: int) -> Tensor:
    """[B, H, ...] as [B, G, K, ...]."""
    return t.unflatten(1, (groups, -1))


def _merge_heads(t_BHQP: Tensor, scale_BHQ: Tensor, groups: int) -> Tensor:
    """scale * t as [B, G, Q, K * P], the layout in which a group is one head, in the dtype of scale."""
    t_BGQKP = _by_group(t_BHQP, groups).transpose(2, 3)
    scaled = scale_BHQ.new_empty(t_BGQKP.shape)
    torch.mul(t_BGQKP, _by_group(scale_BHQ, groups).transpose(2, 3).unsqueeze(-1), out=scaled)
    return scaled.flatten(3)


def _split_heads(t_BGQR: Tensor, heads: int) -> Tensor:
    """[B, G, Q, K * P] as a [B, H, Q, P] view, or copy where the strides of G and K do not merge."""
    per_group = heads // t_BGQR.shape[1]
    return t_BGQR.unflatten(3, (per_group, -1)).transpose(2, 3).flatten(1, 2)


def _scaled_by_CB(t_BHQQ: Tensor, CB_BGQQ: Tensor) -> Tensor:
    """t * CB in place, the heads of a group sharing CB."""
    return _by_group(t_BHQQ, CB_BGQQ.shape[1]).mul_(CB_BGQQ.unsqueeze(2)).flatten(1, 2)


def _next_state(state_BHPN: Tensor, E_BHQ: Tensor, left_BGQR: Tensor, right_BGQN: Tensor) -> Tensor:
    """E_Q state + left^T right: the recurrence between chunks, and its transpose in the backward."""
    update = (left_BGQR.mT @ right_BGQN).view(state_BHPN.shape)
    return update.addcmul_(state_BHPN, E_BHQ[..., -1, None, None])


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
    return g_X.add_(g_X_next), g_a, g_B, g_C, _next_state(g_next_BHPN, c.E_BHQ, g_y_E, c.C_BGQN)


def _scan(t: _Tensors, document_start: Tensor | None, chunk_size: int, state: Tensor, y: Tensor) -> list[Tensor]:
    """Scan from a state and write y; the states before each chunk and, last, the final one."""
    D_H1 = None if t.D is None else t.D.unsqueeze(-1)
    states = [state]
    for tokens in _chunks(t.x.shape[1], chunk_size):
        c = _load_chunk(tokens, t, document_start)
        y_BQHP = _chunk_output(c, states[-1]).transpose(1, 2)
        y[:, tokens] = y_BQHP if D_H1 is None else y_BQHP.addcmul_(t.x[:, tokens], D_H1)
        states.append(_next_state(states[-1], c.E_BHQ, _merge_heads(c.X_BHQP, c.F_BHQ, t.B.shape[2]), c.B_BGQN))
    return states


def _scan_gradients(
    t: _Tensors,
    g: _Tensors,
    document_start: Tensor | None,
    chunk_size: int,
    states_before: list[Tensor],
    g_y: Tensor,
    g_state: Tensor,
) -> Tensor:
    """Write the gradients of x and dt, add those of A, B, C and D; the gradient of the state the scan began from."""
    dtype, D_H1 = t.dt.dtype, None if t.D is None else t.D.unsqueeze(-1)
    for tokens, state in reversed(list(zip(_chunks(t.x.shape[1], chunk_size), states_before, strict=True))):
        x_BQHP, dt_BQH, g_y_BQHP = (s[:, tokens].to(dtype) for s in (t.x, t.dt, g_y))
        c = _load_chunk(tokens, t, document_start)
        g_y_BHQP = g_y_BQHP.transpose(1, 2).contiguous()
        g_X, g_a, g_B, g_C, g_state = _chunk_gradients(c, state, g_y_BHQP, g_state)
        g_X, g_a = g_X.transpose(1, 2), g_a.mT
        g.B[:, tokens].add_(g_B.transpose(1, 2))
        g.C[:, tokens].add_(g_C.transpose(1, 2))
        g.A.add_((g_a * dt_BQH).sum((0, 1)))
        g.dt[:, tokens] = (g_X * x_BQHP).sum(-1).addcmul_(g_a, t.A)
        g_X *= dt_BQH.unsqueeze(-1)
        if D_H1 is not None and g.D is not None:
            g.D.add_((g_y_BQHP * x_BQHP).sum((0, 1, 3)))
            g_X.addcmul_(g_y_BQHP, D_H1)
        g.x[:, tokens] = g_X
    return g_state


def _start_state(t: _Tensors, document_start: Tensor | None, chunk_size: int, ranks: SequenceRanks) -> Callable[[], Tensor]:
    """Begin to compute the state before this rank's piece, [B, H, P, N]: f_i and D_i here, the rest after the exchange."""
    (batch, length, heads, head_dim), (groups, state_size) = t.x.shape, t.B.shape[2:]
    state, decay = t.dt.new_zeros(batch, heads, head_dim, state_size), t.dt.new_ones(batch, heads)
    for tokens in _chunks(length, chunk_size):
        d = _load_decays(tokens, t, document_start)
        X_F = _merge_heads(t.x[:, tokens].transpose(1, 2), d.F_BHQ * t.dt[:, tokens].mT, groups)
        state = _next_state(state, d.E_BHQ, X_F, _load_groups(t.B, tokens, t.dt.dtype))
        decay *= d.E_BHQ[..., -1]
    return start_state_before(ranks, decay, state, over_state)


def _start_gradient(
    t: _Tensors, document_start: Tensor | None, chunk_size: int, g_y: Tensor, g_final: Tensor, ranks: SequenceRanks
) -> Callable[[], Tensor]:
    """Begin to compute the gradient of this rank's final state, [B, H, P, N], of which `g_final` is its own share."""
    g_state, decay = g_final, t.dt.new_ones(t.dt.shape[0], t.dt.shape[2])
    for tokens in reversed(_chunks(t.x.shape[1], chunk_size)):
        d = _load_decays(tokens, t, document_start)
        g_y_E = _merge_heads(g_y[:, tokens].transpose(1, 2), d.E_BHQ, t.C.shape[2])
        g_state = _next_state(g_state, d.E_BHQ, g_y_E, _load_groups(t.C, tokens, t.dt.dtype))
        decay *= d.E_BHQ[..., -1]
    after = start_gradient_after(ranks, decay, g_state, over_state)
    return lambda: after().add_(g_final)


def over_state(decay_BH: Tensor) -> Tensor:
    """As a factor of a state [B, H, P, N]."""
    return decay_BH[..., None, None]


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
        ranks: SequenceRanks | None,
    ) -> tuple[Tensor, Tensor]:
        whole = _Tensors(x, dt, A.to(dt.dtype), B, C, None if D is None else D.to(dt.dtype))
        parts = halves(x.shape[2], B.shape[2], ranks)
        arriving: list[Callable[[], Tensor]]
        if ranks is not None:
            arriving = [_start_state(whole.part(*part), document_start, chunk_size, ranks) for part in parts]
        elif initial_state is not None:
            arriving = [initial_state.to(dt.dtype).contiguous]
        else:
            arriving = [lambda: dt.new_zeros(x.shape[0], *x.shape[2:], B.shape[3])]
        y = x.new_empty(x.shape)
        states_before: list[Tensor] = []
        final_states: list[Tensor] = []
        for (heads, groups), state in zip(parts, arriving, strict=True):
            *before, final = _scan(whole.part(heads, groups), document_start, chunk_size, state(), y[:, :, heads])
            states_before += before
            final_states.append(final)
        ctx.save_for_backward(x, dt, A, B, C, D, initial_state, document_start, *states_before)
        ctx.chunk_size, ctx.ranks = chunk_size, ranks
        return y, final_states[0] if len(parts) == 1 else torch.cat(final_states, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_y: Tensor, g_final: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, initial_state, document_start, *states_before = ctx.saved_tensors
        whole = _Tensors(x, dt, A.to(dt.dtype), B, C, None if D is None else D.to(dt.dtype))
        chunk_size, ranks, parts = ctx.chunk_size, ctx.ranks, halves(x.shape[2], B.shape[2], ctx.ranks)
        # Of the sum of two parts' gradients, only the result is rounded to the dtype of B and C.
        sum_dtype = dt.dtype if len(parts) > 1 and B.shape[2] == 1 else None
        g_B, g_C = (torch.zeros_like(s, dtype=sum_dtype, memory_format=torch.contiguous_format) for s in (B, C))
        g_A, g_D = torch.zeros_like(whole.A), None if D is None else torch.zeros_like(whole.A)
        g = _Tensors(x.new_empty(x.shape), dt.new_empty(dt.shape), g_A, g_B, g_C, g_D)
        arriving: list[Callable[[], Tensor]] = [g_final.contiguous]
        if ranks is not None:
            arriving = [
                _start_gradient(whole.part(heads, groups), document_start, chunk_size, g_y[:, :, heads], g_final[:, heads], ranks)
                for heads, groups in parts
            ]
        chunks = len(states_before) // len(parts)
        for index, ((heads, groups), g_state) in enumerate(zip(parts, arriving, strict=True)):
            before, part = states_before[index * chunks : (index + 1) * chunks], (heads, groups)
            g_initial = _scan_gradients(
                whole.part(*part), g.part(*part), document_start, chunk_size, before, g_y[:, :, heads], g_state()
            )
        return (
            g.x, g.dt, g_A.to(A.dtype), g_B.to(B.dtype), g_C.to(C.dtype), None if g_D is None else g_D.to(D.dtype),
            None if initial_state is None else g_initial.to(initial_state.dtype), None, None, None,
        )  # fmt: skip
