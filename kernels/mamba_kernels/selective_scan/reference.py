"""Selective scan (S6) in plain torch, by blocks of a few tokens.

A block computes all its decays and inputs at once, then one fused multiply-add per token. The backward keeps the inputs
and the state before each block and recomputes the block, so that [Q, B, N, E], with Q the tokens of one block, is the
largest tensor that ever exists. Time comes first and channels last inside, so that every step is one contiguous pass;
the three [Q, B, N, E] are allocated once, because allocating them for each block takes longer than filling them.
`g_` before a name is the gradient of the loss with respect to it.

Of a sequence spread over ranks (as for SSD: Mamba-2, arXiv 2405.21060, section 8.2), rank i first scans its piece for the
state f_i alone, from a zero state. With D_i = exp(A sum_t dt_t), 0 where a document starts in the piece, the state before it is
    h_i = sum_{j<i} (prod_{j<k<i} D_k) f_j
from which the scan proper runs. Backward, g_j is the gradient of h_j through the outputs of piece j alone, its final state
among them. The final state of rank i then has its own gradient plus
    sum_{j>i} (prod_{i<k<j} D_k) g_j
A pass exchanges f or g and the sums of dt, B E (N + 1) numbers a rank for any length; a sum is infinite where a document
starts. The channels are worked in two parts, so that the exchange of one overlaps the work on the other.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mamba_kernels.common import SequenceRanks, start_gradient_after, start_state_before

# Within noise of the fastest on a CPU (4 to 64 tried): the block stays in cache, and its set-up is spread over the steps.
BLOCK_SIZE = 16

ALL = slice(None)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    document_start: Tensor | None,
    ranks: SequenceRanks | None,
) -> tuple[Tensor, Tensor]:
    """`mamba_kernels.selective_scan` on checked arguments, with dt [B, S, E] already positive; y and the final state.

    `ranks` are several, and then there is no initial state, or None.
    """
    return _BlockedScan.apply(x, dt, A, B, C, D, initial_state, document_start, ranks)


class _Tensors(NamedTuple):
    """What the scan has a gradient for, or the gradients themselves; A and D in the dtype of dt."""

    x: Tensor  # [B, S, E]
    dt: Tensor
    A: Tensor  # [N, E]
    B: Tensor  # [B, S, N]
    C: Tensor
    D: Tensor | None  # [E]

    def part(self, channels: slice) -> "_Tensors":
        """Views of some channels; all of B and C, which channels share."""
        if channels == ALL:
            return self
        D = None if self.D is None else self.D[channels]
        return _Tensors(self.x[..., channels], self.dt[..., channels], self.A[:, channels], self.B, self.C, D)


def halves(channels: int, ranks: SequenceRanks | None) -> list[slice]:
    """The channels of each part: all for one rank, two halves for several."""
    if ranks is None or channels == 1:
        return [ALL]
    return [slice(channels // 2), slice(channels // 2, None)]


def _blocks(length: int) -> list[slice]:
    return [slice(begin, begin + BLOCK_SIZE) for begin in range(0, length, BLOCK_SIZE)]


def _work(t: _Tensors, count: int) -> list[Tensor]:
    """Memory for so many [Q, B, N, E] of one block."""
    (batch, length, _), (state_size, channels) = t.x.shape, t.A.shape
    return [t.dt.new_empty(min(BLOCK_SIZE, length), batch, state_size, channels) for _ in range(count)]


class _Block(NamedTuple):
    """A block of the sequence in the dtype of dt, with the decay of every step and the state after it."""

    x: Tensor  # [Q, B, E]
    dt: Tensor
    X: Tensor  # dt * x
    B: Tensor  # [Q, B, N]
    C: Tensor
    decay: Tensor  # [Q, B, N, E]
    states: Tensor


def _time_first(t: Tensor, tokens: slice, dtype: torch.dtype) -> Tensor:
    """The tokens of [B, S, ...] as contiguous [Q, B, ...]."""
    return t[:, tokens].transpose(0, 1).to(dtype).contiguous()


def _load_decay(tokens: slice, dt_QBE: Tensor, A_NE: Tensor, document_start: Tensor | None, out: Tensor) -> Tensor:
    """The decay of every step, [Q, B, N, E], in the memory of `out`."""
    decay_QBNE = out[: len(dt_QBE)]
    torch.mul(dt_QBE.unsqueeze(2), A_NE, out=decay_QBNE).exp_()
    if document_start is not None:
        decay_QBNE *= ~document_start[:, tokens].T[..., None, None]
    return decay_QBNE


def _load_block(tokens: slice, t: _Tensors, document_start: Tensor | None, state_BNE: Tensor, work_QBNE: list[Tensor]) -> _Block:
    """Slice the sequence and scan the block from the state before it, in the memory of the first two of `work`."""
    x_QBE, dt_QBE, B_QBN, C_QBN = (_time_first(s, tokens, t.dt.dtype) for s in (t.x, t.dt, t.B, t.C))
    decay_QBNE = _load_decay(tokens, dt_QBE, t.A, document_start, work_QBNE[0])
    states_QBNE = work_QBNE[1][: len(x_QBE)]
    X_QBE = dt_QBE * x_QBE
    torch.mul(X_QBE.unsqueeze(2), B_QBN.unsqueeze(3), out=states_QBNE)
    for decay, state in zip(decay_QBNE.unbind(), states_QBNE.unbind(), strict=True):
        state_BNE = state.addcmul_(decay, state_BNE)
    return _Block(x_QBE, dt_QBE, X_QBE, B_QBN, C_QBN, decay_QBNE, states_QBNE)


def _scan(t: _Tensors, document_start: Tensor | None, state: Tensor, y: Tensor) -> list[Tensor]:
    """Scan from a state [B, N, E] and write y; the states before each block and, last, the final one."""
    work, states = _work(t, 2), [state]
    for tokens in _blocks(t.x.shape[1]):
        b = _load_block(tokens, t, document_start, states[-1], work)
        y_QBE = (b.C.unsqueeze(2) @ b.states).squeeze(2)
        if t.D is not None:
            y_QBE.addcmul_(b.x, t.D)
        y[:, tokens] = y_QBE.transpose(0, 1)
        states.append(b.states[-1].clone())
    return states


def _scan_gradients(
    t: _Tensors, g: _Tensors, document_start: Tensor | None, states_before: list[Tensor], g_y: Tensor, g_state: Tensor
) -> None:
    """Write the gradients of x and dt, add those of A, B, C and D; turns g_state into that of the state it began from."""
    work, g_A_BNE = _work(t, 3), torch.zeros_like(g_state)
    for tokens, before in reversed(list(zip(_blocks(t.x.shape[1]), states_before, strict=True))):
        b = _load_block(tokens, t, document_start, before, work)
        g_y_QBE = _time_first(g_y, tokens, t.dt.dtype)
        # Row vector times matrix: with the matrix first the batched product is several times slower.
        g.C[:, tokens].add_((g_y_QBE.unsqueeze(2) @ b.states.mT).squeeze(2).transpose(0, 1))
        g_states = torch.mul(b.C.unsqueeze(3), g_y_QBE.unsqueeze(2), out=work[2][: len(g_y_QBE)])
        decays, states = b.decay.unbind(), b.states.unbind()
        for step in reversed(range(len(decays))):
            # The decay of a step makes place for the gradient of its logarithm, dt A.
            g_step = g_states[step].add_(g_state)
            torch.mul(g_step, decays[step], out=g_state)
            torch.mul(g_state, states[step - 1] if step else before, out=decays[step])
            g_A_BNE.addcmul_(decays[step], b.dt[step].unsqueeze(1))
        g_X = (b.B.unsqueeze(2) @ g_states).squeeze(2)
        g.B[:, tokens].add_((b.X.unsqueeze(2) @ g_states.mT).squeeze(2).transpose(0, 1))
        g.dt[:, tokens] = b.decay.mul_(t.A).sum(2).addcmul_(g_X, b.x).transpose(0, 1)
        g_X *= b.dt
        if t.D is not None and g.D is not None:
            g_X.addcmul_(g_y_QBE, t.D)
            g.D.add_((g_y_QBE * b.x).sum((0, 1)))
        g.x[:, tokens] = g_X.transpose(0, 1)
    g.A.add_(g_A_BNE.sum(0))


def _start_state(t: _Tensors, document_start: Tensor | None, ranks: SequenceRanks) -> Callable[[], Tensor]:
    """Begin to compute the state before this rank's piece, [B, N, E]: f_i and sum of dt here, the rest after the exchange."""
    state, work = t.dt.new_zeros(t.x.shape[0], *t.A.shape), _work(t, 2)
    for tokens in _blocks(t.x.shape[1]):
        state = _load_block(tokens, t, document_start, state, work).states[-1].clone()
    return start_state_before(ranks, _sum_dt(t, document_start), state, partial(total_decay, t.A))


def _start_gradient(
    t: _Tensors, document_start: Tensor | None, g_y: Tensor, g_final: Tensor, ranks: SequenceRanks
) -> Callable[[], Tensor]:
    """Begin to compute the gradient of this rank's final state, [B, N, E], of which `g_final` is its own share."""
    g_state, work = g_final.clone(memory_format=torch.contiguous_format), _work(t, 2)
    for tokens in reversed(_blocks(t.x.shape[1])):
        dt_QBE, C_QBN, g_y_QBE = (_time_first(s, tokens, t.dt.dtype) for s in (t.dt, t.C, g_y))
        decay_QBNE = _load_decay(tokens, dt_QBE, t.A, document_start, work[0])
        g_states = torch.mul(C_QBN.unsqueeze(3), g_y_QBE.unsqueeze(2), out=work[1][: len(g_y_QBE)])
        for decay, g_step in zip(reversed(decay_QBNE.unbind()), reversed(g_states.unbind()), strict=True):
            torch.mul(g_step.add_(g_state), decay, out=g_state)
    after = start_gradient_after(ranks, _sum_dt(t, document_start), g_state, partial(total_decay, t.A))
    return lambda: after().add_(g_final)


def _sum_dt(t: _Tensors, document_start: Tensor | None) -> Tensor:
    """The sum of dt over the sequence, [B, E]; infinite where a document starts."""
    sum_BE = t.dt.sum(1)
    return sum_BE if document_start is None else sum_BE.masked_fill_(document_start.any(1, keepdim=True), torch.inf)


def total_decay(A: Tensor, sum_BE: Tensor, state_dim: int = 1) -> Tensor:
    """What steps of that sum leave of a state: [B, N, E] for A [N, E], or [B, E, N] for A [E, N] and `state_dim` 2."""
    sums = sum_BE.unsqueeze(state_dim)
    return (A * sums).exp_().masked_fill_(sums.isinf(), 0.0)


class _BlockedScan(torch.autograd.Function):
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
        ranks: SequenceRanks | None,
    ) -> tuple[Tensor, Tensor]:
        whole = _Tensors(x, dt, A.to(dt.dtype).T.contiguous(), B, C, None if D is None else D.to(dt.dtype))
        parts = halves(x.shape[2], ranks)
        arriving: list[Callable[[], Tensor]]
        if ranks is not None:
            arriving = [_start_state(whole.part(part), document_start, ranks) for part in parts]
        elif initial_state is not None:
            arriving = [partial(initial_state.mT.to, dt.dtype, copy=True, memory_format=torch.contiguous_format)]
        else:
            arriving = [partial(dt.new_zeros, (x.shape[0], *whole.A.shape))]
        y = x.new_empty(x.shape)
        states_before: list[Tensor] = []
        final_states: list[Tensor] = []
        for part, state in zip(parts, arriving, strict=True):
            *before, final = _scan(whole.part(part), document_start, state(), y[..., part])
            states_before += before
            final_states.append(final.mT)
        ctx.save_for_backward(x, dt, A, B, C, D, initial_state, document_start, *states_before)
        ctx.ranks = ranks
        return y, torch.cat(final_states, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_y: Tensor, g_final: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, initial_state, document_start, *states_before = ctx.saved_tensors
        whole = _Tensors(x, dt, A.to(dt.dtype).T.contiguous(), B, C, None if D is None else D.to(dt.dtype))
        parts = halves(x.shape[2], ctx.ranks)
        # Of the sum of two parts' gradients, only the result is rounded to the dtype of B and C.
        sum_dtype = dt.dtype if len(parts) > 1 else None
        g_B, g_C = (torch.zeros_like(s, dtype=sum_dtype, memory_format=torch.contiguous_format) for s in (B, C))
        g_A, g_D = torch.zeros_like(whole.A), None if D is None else dt.new_zeros(D.shape)
        g = _Tensors(x.new_empty(x.shape), dt.new_empty(dt.shape), g_A, g_B, g_C, g_D)
        g_final = g_final.mT
        arriving: list[Callable[[], Tensor]] = [partial(g_final.clone, memory_format=torch.contiguous_format)]
        if ctx.ranks is not None:
            arriving = [
                _start_gradient(whole.part(part), document_start, g_y[..., part], g_final[..., part], ctx.ranks) for part in parts
            ]
        blocks = len(states_before) // len(parts)
        for index, (part, gradient) in enumerate(zip(parts, arriving, strict=True)):
            before, g_state = states_before[index * blocks : (index + 1) * blocks], gradient()
            _scan_gradients(whole.part(part), g.part(part), document_start, before, g_y[..., part], g_state)
        return (
            g.x, g.dt, g_A.T.to(A.dtype), g_B.to(B.dtype), g_C.to(C.dtype), None if g_D is None else g_D.to(D.dtype),
            None if initial_state is None else g_state.mT.to(initial_state.dtype), None, None,
        )  # fmt: skip
