"""Selective scan (S6) in plain torch, by blocks of a few tokens.

A block computes all its decays and inputs at once, then one fused multiply-add per token. The backward keeps the inputs
and the state before each block and recomputes the block, so that [Q, B, N, E], with Q the tokens of one block, is the
largest tensor that ever exists. Time comes first and channels last inside, so that every step is one contiguous pass;
the three [Q, B, N, E] are allocated once, because allocating them for each block takes longer than filling them.
`g_` before a name is the gradient of the loss with respect to it.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Within noise of the fastest on a CPU (4 to 64 tried): the block stays in cache, and its set-up is spread over the steps.
BLOCK_SIZE = 16


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    document_start: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`mamba_kernels.selective_scan` on checked arguments, with dt [B, S, E] already positive; y and the final state."""
    return _BlockedScan.apply(x, dt, A, B, C, D, initial_state, document_start)


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


def _load_block(
    tokens: slice,
    x: Tensor,
    dt: Tensor,
    A_NE: Tensor,
    B: Tensor,
    C: Tensor,
    document_start: Tensor | None,
    state_BNE: Tensor,
    work_QBNE: list[Tensor],
) -> _Block:
    """Slice the sequence and scan the block from the state before it, in the memory of the first two of `work`."""
    x_QBE, dt_QBE, B_QBN, C_QBN = (_time_first(t, tokens, dt.dtype) for t in (x, dt, B, C))
    decay_QBNE, states_QBNE = (work[: len(x_QBE)] for work in work_QBNE[:2])
    torch.mul(dt_QBE.unsqueeze(2), A_NE, out=decay_QBNE).exp_()
    if document_start is not None:
        decay_QBNE *= ~document_start[:, tokens].T[..., None, None]
    X_QBE = dt_QBE * x_QBE
    torch.mul(X_QBE.unsqueeze(2), B_QBN.unsqueeze(3), out=states_QBNE)
    for decay, state in zip(decay_QBNE.unbind(), states_QBNE.unbind(), strict=True):
        state_BNE = state.addcmul_(decay, state_BNE)
    return _Block(x_QBE, dt_QBE, X_QBE, B_QBN, C_QBN, decay_QBNE, states_QBNE)


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
    ) -> tuple[Tensor, Tensor]:
        (batch, length, channels), state_size = x.shape, A.shape[1]
        A_NE, D_E = A.to(dt.dtype).T.contiguous(), None if D is None else D.to(dt.dtype)
        state = dt.new_zeros(batch, state_size, channels)
        if initial_state is not None:
            state.copy_(initial_state.mT)
        work = [state.new_empty(min(BLOCK_SIZE, length), *state.shape) for _ in range(2)]
        y = x.new_empty(x.shape)
        states_before = []
        for begin in range(0, length, BLOCK_SIZE):
            tokens = slice(begin, begin + BLOCK_SIZE)
            states_before.append(state)
            b = _load_block(tokens, x, dt, A_NE, B, C, document_start, state, work)
            y_QBE = (b.C.unsqueeze(2) @ b.states).squeeze(2)
            if D_E is not None:
                y_QBE.addcmul_(b.x, D_E)
            y[:, tokens] = y_QBE.transpose(0, 1)
            state = b.states[-1].clone()
        ctx.save_for_backward(x, dt, A, B, C, D, initial_state, document_start, *states_before)
        return y, state.mT.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_y: Tensor, g_final: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, initial_state, document_start, *states_before = ctx.saved_tensors
        A_NE, D_E = A.to(dt.dtype).T.contiguous(), None if D is None else D.to(dt.dtype)
        g_x, g_dt, g_B, g_C = (t.new_empty(t.shape) for t in (x, dt, B, C))
        g_D = torch.zeros_like(A_NE[0])
        g_state = g_final.mT.clone(memory_format=torch.contiguous_format)
        g_A_BNE = torch.zeros_like(g_state)
        work = [g_state.new_empty(min(BLOCK_SIZE, x.shape[1]), *g_state.shape) for _ in range(3)]
        for index in reversed(range(len(states_before))):
            tokens = slice(index * BLOCK_SIZE, (index + 1) * BLOCK_SIZE)
            before = states_before[index]
            b = _load_block(tokens, x, dt, A_NE, B, C, document_start, before, work)
            g_y_QBE = _time_first(g_y, tokens, dt.dtype)
            # Row vector times matrix: with the matrix first the batched product is several times slower.
            g_C[:, tokens] = (g_y_QBE.unsqueeze(2) @ b.states.mT).squeeze(2).transpose(0, 1)
            g_states = torch.mul(b.C.unsqueeze(3), g_y_QBE.unsqueeze(2), out=work[2][: len(g_y_QBE)])
            decays, states = b.decay.unbind(), b.states.unbind()
            for t in reversed(range(len(decays))):
                # The decay of a step makes place for the gradient of its logarithm, dt A.
                g_step = g_states[t].add_(g_state)
                torch.mul(g_step, decays[t], out=g_state)
                torch.mul(g_state, states[t - 1] if t else before, out=decays[t])
                g_A_BNE.addcmul_(decays[t], b.dt[t].unsqueeze(1))
            g_X = (b.B.unsqueeze(2) @ g_states).squeeze(2)
            g_B[:, tokens] = (b.X.unsqueeze(2) @ g_states.mT).squeeze(2).transpose(0, 1)
            g_dt[:, tokens] = b.decay.mul_(A_NE).sum(2).addcmul_(g_X, b.x).transpose(0, 1)
            g_X *= b.dt
            if D_E is not None:
                g_X.addcmul_(g_y_QBE, D_E)
                g_D += (g_y_QBE * b.x).sum((0, 1))
            g_x[:, tokens] = g_X.transpose(0, 1)
        g_initial = None if initial_state is None else g_state.mT.to(initial_state.dtype)
        return g_x, g_dt, g_A_BNE.sum(0).T.to(A.dtype), g_B, g_C, None if D is None else g_D.to(D.dtype), g_initial, None
