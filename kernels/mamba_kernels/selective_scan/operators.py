"""The selective scan on the kernels of `fused`: which runs on what, the operators `mamba_kernels::selective_scan` and
`selective_scan_backward`, and ranks.

The backward keeps, beside the inputs, the states before segments of tokens: at most as much memory as x in bfloat16. What kernels
write for each other in between is bounded: a long sequence is worked in windows, from which a state goes on to the next.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mamba_kernels.backend import Meta, Tunable, launch, register
from mamba_kernels.common import (
    SequenceRanks,
    cdiv,
    contiguous,
    next_power_of_2,
    start_gradient_after,
    start_state_before,
    unit_stride,
)
from mamba_kernels.selective_scan import fused
from mamba_kernels.selective_scan.reference import halves, total_decay

BLOCK, COLUMNS, STEPS = fused.BLOCK.value, fused.COLUMNS.value, fused.STEPS.value
MULTIPROCESSORS = 132  # Of the GPU the kernels were tuned on; with more or fewer, programs are shared out less evenly.
WINDOW_BYTES = 1 << 30  # Of what a window writes between kernels.


def padded(state_size: int) -> int:
    """The state dimensions worked with: whole parts of COLUMNS."""
    return cdiv(state_size, COLUMNS) * COLUMNS


def segment_tokens(state_size: int) -> int:
    """Tokens between kept states. Half as many are twice as much to keep, and half the scratch memory of the backward."""
    return max(64, 2 * padded(state_size))


def _scan_candidates(state_size: int) -> list[Meta]:
    return [
        {"GROUP": group, "PER_PROCESSOR": programs}
        for group, programs in ((4, 8), (4, 10), (4, 12), (2, 14), (2, 12), (2, 10), (2, 8))
    ]


def _gradient_candidates(state_size: int) -> list[Meta]:
    # With more tokens ahead the kernel hides more of the time that memory takes, and has fewer registers for the rest.
    few = [{"AHEAD": ahead, "PER_PROCESSOR": programs} for ahead in (4, 2) for programs in (8, 16)]
    return few if state_size > 64 else few[2:] + few[:2]


SCAN = Tunable("selective_scan", _scan_candidates)
GRADIENT = Tunable("selective_scan_backward", _gradient_candidates)


class Inputs(NamedTuple):
    """What the scan is of; the last dimension of x, dt, B and C has unit stride."""

    x: Tensor  # [B, S, E]
    dt: Tensor
    A: Tensor  # [E, N]
    B: Tensor  # [B, S, N]
    C: Tensor
    D: Tensor | None  # [E]
    dt_bias: Tensor | None
    document_start: Tensor | None  # [B, S]
    softplus: bool

    def tokens(self, window: slice) -> "Inputs":
        """Some tokens of the sequences."""
        starts = None if self.document_start is None else self.document_start[:, window]
        return self._replace(
            x=self.x[:, window], dt=self.dt[:, window], B=self.B[:, window], C=self.C[:, window], document_start=starts
        )

    def channels(self, some: slice) -> "Inputs":
        """Some channels; all of B and C, which channels share."""
        D, bias = (None if t is None else t[some] for t in (self.D, self.dt_bias))
        return self._replace(x=self.x[..., some], dt=self.dt[..., some], A=self.A[some], D=D, dt_bias=bias)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """B, S, E, N."""
        batch, length, channels = self.x.shape
        return batch, length, channels, self.A.shape[1]

    @property
    def blocks(self) -> int:
        """K, of channels."""
        return cdiv(self.x.shape[2], BLOCK)

    @property
    def states(self) -> int:
        """N, padded."""
        return padded(self.A.shape[1])

    @property
    def parts(self) -> int:
        """Of the state dimensions: a program's."""
        return self.states // COLUMNS

    @property
    def segment(self) -> int:
        """Tokens between kept states."""
        return segment_tokens(self.A.shape[1])

    def new(self, *shape: int) -> Tensor:
        """Uninitialised float32."""
        return torch.empty(shape, dtype=torch.float32, device=self.x.device)


class Gradients(NamedTuple):
    """Where the gradients go; the last dimension of those of x, dt, B and C has unit stride."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    dt_bias: Tensor | None
    initial_state: Tensor | None  # [B, E, N]; of a window, in blocks


class _Prepared(NamedTuple):
    """What the kernels of a window share, in float32: dt as the recurrence has it, A, and B and C by token and by dimension."""

    step: Tensor  # [B, K, S, BLOCK], S up to a multiple of STEPS here and below
    A: Tensor  # [K, N, BLOCK]
    rows: Tensor  # [2, B, S, N]
    columns: Tensor  # [B, S / STEPS, N, 2, STEPS], for the backward


def _inputs(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None, softplus: bool,
    document_start: Tensor | None,
) -> Inputs:  # fmt: skip
    starts = None if document_start is None else document_start.view(torch.uint8)
    x, dt, B, C = (unit_stride(t) for t in (x, dt, B, C))
    return Inputs(x, dt, A, B, C, contiguous(D), contiguous(dt_bias), starts, softplus)


def _strides(t: Tensor | None, count: int) -> tuple[int, ...]:
    return (0,) * count if t is None else t.stride()[:count]


def _new_blocks(t: Inputs) -> Tensor:
    """A state in blocks, [B, 1, K, N, BLOCK], of which kernels write the padding too."""
    return t.new(t.x.shape[0], 1, t.blocks, t.states, BLOCK)


def _in_blocks(t: Inputs, state: Tensor | None) -> Tensor | None:
    """A state [B, E, N] in blocks: kernels that read it along N would spread N, not channels, over lanes."""
    if state is None:
        return None
    batch, _, channels, state_size = t.sizes
    blocks, whole = _new_blocks(t).zero_(), state.new_zeros(batch, t.blocks * BLOCK, state_size)
    whole[:, :channels] = state
    blocks[:, 0, :, :state_size] = whole.unflatten(1, (t.blocks, BLOCK)).transpose(2, 3)
    return blocks


def _out_of_blocks(t: Inputs, blocks: Tensor, state: Tensor) -> None:
    """Write a state in blocks to [B, E, N]."""
    _, _, channels, state_size = t.sizes
    state.copy_(blocks[:, 0, :, :state_size].transpose(2, 3).flatten(1, 2)[:, :channels])


def _chunk_tokens(t: Inputs, meta: Meta) -> int:
    """Tokens of a chunk, whole segments: so many chunks that all programs run at once, and fill the GPU if they can."""
    batch, length, _, _ = t.sizes
    segments = cdiv(length, t.segment)
    chunks = MULTIPROCESSORS * meta["PER_PROCESSOR"] // (batch * t.blocks * t.parts)
    return cdiv(segments, min(max(chunks, 1), segments)) * t.segment


def _windows(t: Inputs, bytes_per_token: int) -> list[slice]:
    """Even pieces of the sequences, of whole segments, none of which writes more than WINDOW_BYTES."""
    batch, length, _, _ = t.sizes
    segments = cdiv(length, t.segment)
    count = min(cdiv(batch * length * bytes_per_token, WINDOW_BYTES), segments)
    tokens = cdiv(segments, count) * t.segment
    return [slice(first, min(first + tokens, length)) for first in range(0, length, tokens)]


def _forward_windows(t: Inputs) -> list[slice]:
    return _windows(t, 4 * t.blocks * BLOCK * (1 + t.parts))


def _backward_windows(t: Inputs) -> list[slice]:
    return _windows(t, 4 * t.blocks * (BLOCK * (1 + 2 * t.parts) + 2 * t.states))


def _prepare(t: Inputs, backward: bool) -> _Prepared:
    batch, length, channels, state_size = t.sizes
    padded_length = cdiv(length, STEPS) * STEPS
    step, A = t.new(batch, t.blocks, padded_length, BLOCK), t.new(t.blocks, t.states, BLOCK)
    rows = t.new(2, batch, padded_length, t.states)
    columns = t.new(batch, padded_length, 2 * t.states) if backward else rows
    launch(
        fused.prepare_kernel, (cdiv(length, t.segment), t.blocks + 1, batch), t.dt, t.dt_bias, t.A, t.B, t.C, step, A, rows,
        columns, length, channels, state_size, padded_length, *_strides(t.dt, 2), *t.A.stride(), *_strides(t.B, 2),
        *_strides(t.C, 2), BIAS=t.dt_bias is not None, SOFTPLUS=t.softplus, BACKWARD=backward, SEGMENT=t.segment, NT=t.states,
        WIDTH=next_power_of_2(t.states), ROWS=32, num_warps=4,
    )  # fmt: skip
    return _Prepared(step, A, rows, columns)


def _chunk_states(
    t: Inputs, p: _Prepared, g_y: Tensor | None, tokens: int, meta: Meta, *, every: bool
) -> tuple[Tensor, Tensor]:
    """What chunks leave of a zero state [B, C, K, N, BLOCK], or its gradient from that of y, and the sums of their dt.

    Not of the last chunk to be passed, of which no other needs it, unless of `every` one.
    """
    batch, length, channels, _ = t.sizes
    chunks, source, starts = cdiv(length, tokens), t.x if g_y is None else g_y, t.document_start
    states, sums = t.new(batch, chunks, t.blocks, t.states, BLOCK), t.new(batch, chunks, t.blocks, BLOCK)
    passed, first = (chunks, 0) if every else (chunks - 1, int(g_y is not None))
    launch(
        fused.chunk_kernel, (t.blocks, passed, batch * t.parts), source, p.step, starts, p.A, p.rows[0 if g_y is None else 1],
        states, sums, length, channels, p.rows.shape[2], tokens, first, chunks, *_strides(source, 2), *_strides(starts, 2),
        REVERSE=g_y is not None, STARTS=starts is not None, NT=t.states, GROUP=meta["GROUP"], num_warps=1,
    )  # fmt: skip
    return states, sums


def _carry(
    t: Inputs, p: _Prepared, states: Tensor, sums: Tensor, begin: Tensor | None, end: Tensor | None, *, reverse: bool, store: bool
) -> None:
    """From what chunks leave to what there is before each, in place if `store`; `begin` and `end` in blocks."""
    launch(
        fused.carry_kernel, (t.blocks, t.parts, states.shape[0]), states, sums, p.A, begin, end, states.shape[1], REVERSE=reverse,
        BEGIN=begin is not None, STORE=store, END=end is not None, NT=t.states, num_warps=4,
    )  # fmt: skip


def _state_through(t: Inputs, begin: Tensor | None, g_y: Tensor | None) -> tuple[Tensor, Tensor]:
    """The state [B, E, N] after a sequence, from that before it (zero if None), and the sums of dt [B, E].

    With the gradient of y: that of the state before the sequence, from that of the state after it.
    """
    batch, _, channels, state_size = t.sizes
    windows, meta, begin = _forward_windows(t), SCAN(state_size), _in_blocks(t, begin)
    windows = windows if g_y is None else windows[::-1]
    total, end = torch.zeros(batch, channels, dtype=torch.float32, device=t.x.device), t.new(batch, channels, state_size)
    for window in windows:
        of_window, after = t.tokens(window), _new_blocks(t)
        p, tokens = _prepare(of_window, backward=False), _chunk_tokens(of_window, meta)
        states, sums = _chunk_states(of_window, p, None if g_y is None else g_y[:, window], tokens, meta, every=True)
        _carry(of_window, p, states, sums, begin, after, reverse=g_y is not None, store=False)
        total += sums.sum(1).flatten(1)[:, :channels]
        begin = after
    _out_of_blocks(t, after, end)
    return end, total


def forward_into(t: Inputs, begin: Tensor | None, y: Tensor, end: Tensor, kept: Tensor | None) -> None:
    """Write y [B, S, E], the state after the last token [B, E, N], and the states before segments if `kept` for a backward."""
    begin = _in_blocks(t, begin)
    for window in _forward_windows(t):
        kept_of_window, after = None if kept is None else kept[:, window.start // t.segment :], _new_blocks(t)
        _forward_window(t.tokens(window), begin, y[:, window], after, kept_of_window)
        begin = after
    _out_of_blocks(t, after, end)


def _forward_window(t: Inputs, begin: Tensor | None, y: Tensor, end: Tensor, kept: Tensor | None) -> None:
    batch, length, channels, state_size = t.sizes
    p, meta, starts = _prepare(t, backward=False), SCAN(state_size), t.document_start
    tokens = _chunk_tokens(t, meta)
    chunks, before = cdiv(length, tokens), begin
    if chunks > 1:
        before, sums = _chunk_states(t, p, None, tokens, meta, every=False)
        _carry(t, p, before, sums, begin, None, reverse=False, store=True)
    of_parts = y if t.parts == 1 else t.new(batch, t.parts, t.blocks, length, BLOCK)
    y_strides = (y.stride(0), 0, BLOCK, y.stride(1)) if t.parts == 1 else of_parts.stride()[:4]
    launch(
        fused.scan_kernel, (t.blocks, chunks, batch * t.parts), t.x, p.step, starts, p.A, p.rows, t.D, before, kept, end, of_parts,
        length, channels, p.rows.shape[2], tokens, batch, *_strides(t.x, 2), *_strides(starts, 2), *_strides(kept, 1), *y_strides,
        STARTS=starts is not None, SKIP=t.D is not None,
        BEGIN=before is not None, KEEP=kept is not None, ONLY=chunks == 1, SEGMENT=t.segment, NT=t.states, GROUP=meta["GROUP"],
        num_warps=1,
    )  # fmt: skip
    if t.parts > 1:
        launch(
            fused.sum_parts_kernel, (cdiv(length, 32), t.blocks, batch), of_parts, y, length, channels, t.parts, *_strides(y, 2),
            ROWS=32, num_warps=4,
        )  # fmt: skip


def backward_into(t: Inputs, kept: Tensor, g_y: Tensor, g_final: Tensor | None, g: Gradients) -> None:
    """Write the gradients, from those of y [B, S, E] and of the state after the last token [B, E, N]."""
    batch, length, channels, state_size = t.sizes
    windows, meta = _backward_windows(t), GRADIENT(state_size)
    tokens = [_chunk_tokens(t.tokens(window), meta) for window in windows]
    chunks = [cdiv(w.stop - w.start, size) for w, size in zip(windows, tokens, strict=True)]
    segments, last, begin = cdiv(length, t.segment), sum(chunks), _in_blocks(t, g_final)
    # What chunks have in the gradient of A, and segments in those of D and dt_bias: of all windows one after the other.
    g_state_and_A = t.new(batch * last, t.blocks, t.parts, 2, COLUMNS, BLOCK)
    g_D, g_bias = t.new(batch * segments, t.blocks, BLOCK), t.new(batch * segments, t.blocks, BLOCK)
    for window, size, count in reversed(list(zip(windows, tokens, chunks, strict=True))):
        end = None if window.start == 0 and g.initial_state is None else _new_blocks(t)
        of_window = g._replace(x=g.x[:, window], dt=g.dt[:, window], B=g.B[:, window], C=g.C[:, window], initial_state=end)
        done = batch * window.start // t.segment
        shares = (g_state_and_A[batch * (last - count) : batch * last], g_D[done:], g_bias[done:])
        _backward_window(
            t.tokens(window), kept[:, window.start // t.segment :], g_y[:, window], begin, of_window, shares, size, meta
        )
        last, begin = last - count, end
    if g.initial_state is not None and end is not None:
        _out_of_blocks(t, end, g.initial_state)
    launch(
        fused.sum_chunks_kernel, (t.blocks, t.parts), g_state_and_A, g_D, g_bias, g.A, g.D, g.dt_bias, channels, state_size,
        len(g_state_and_A), len(g_bias), *g.A.stride(), SKIP=g.D is not None, BIAS=g.dt_bias is not None, NT=t.states, num_warps=4,
    )  # fmt: skip


def _backward_window(
    t: Inputs, kept: Tensor, g_y: Tensor, begin: Tensor | None, g: Gradients, shares: tuple[Tensor, Tensor, Tensor], tokens: int,
    meta: Meta,
) -> None:  # fmt: skip
    """`shares`: of the window's chunks in the gradient of A (beside that of the state), of its segments in those of D and bias."""
    batch, length, channels, state_size = t.sizes
    p, starts, (g_state_and_A, g_D, g_bias) = _prepare(t, backward=True), t.document_start, shares
    chunks, padded_length, after = cdiv(length, tokens), p.rows.shape[2], begin
    if chunks > 1:
        after, sums = _chunk_states(t, p, g_y, tokens, SCAN(state_size), every=False)
        _carry(t, p, after, sums, begin, None, reverse=True, store=True)
    over_states = t.new(2, batch, t.parts, t.blocks, padded_length, BLOCK)
    scratch = t.new(g_state_and_A.numel() // 2 * (t.segment // STEPS))
    of_B_and_C = t.new(t.blocks, 2, batch, padded_length, t.states)
    launch(
        fused.gradient_kernel, (t.blocks, chunks, batch * t.parts), t.x, p.step, starts, p.A, p.rows, p.columns, kept, g_y, after,
        scratch, g_state_and_A, over_states, of_B_and_C, g.initial_state, length, channels, state_size, padded_length, tokens,
        batch, *_strides(t.x, 2), *_strides(starts, 2), *_strides(kept, 1), *_strides(g_y, 2), STARTS=starts is not None,
        BEGIN=after is not None, END=g.initial_state is not None, EXACT=t.x.dtype == torch.float32, SEGMENT=t.segment, NT=t.states,
        AHEAD=meta["AHEAD"], num_warps=1,
    )  # fmt: skip
    launch(
        fused.finish_kernel, (cdiv(length, t.segment), t.blocks, batch), t.x, t.dt, t.dt_bias, t.D, g_y, over_states, g.x, g.dt,
        g_D, g_bias, length, channels, padded_length, t.parts, *_strides(t.x, 2), *_strides(t.dt, 2), *_strides(g_y, 2),
        *_strides(g.x, 2), *_strides(g.dt, 2), SKIP=t.D is not None, BIAS=t.dt_bias is not None, SOFTPLUS=t.softplus,
        SEGMENT=t.segment, ROWS=16, num_warps=4,
    )  # fmt: skip
    width = 512
    launch(
        fused.sum_shares_kernel, (cdiv(padded_length * t.states, width), 2, batch), of_B_and_C, g.B, g.C, length, state_size,
        padded_length, t.blocks, *_strides(g.B, 2), *_strides(g.C, 2), NT=t.states, WIDTH=width, DEPTH=8, num_warps=4,
    )  # fmt: skip


def _kept_shape(x: Tensor, A: Tensor) -> tuple[int, ...]:
    """The states before segments, [B, S / segment, K, N, BLOCK]."""
    batch, length, channels = x.shape
    return batch, cdiv(length, segment_tokens(A.shape[1])), cdiv(channels, BLOCK), padded(A.shape[1]), BLOCK


def _forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
    initial_state: Tensor | None, document_start: Tensor | None, softplus: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y, final_state, kept = _forward_fake(x, dt, A, B, C, D, dt_bias, initial_state, document_start, softplus, keep)
    t = _inputs(x, dt, A, B, C, D, dt_bias, softplus, document_start)
    forward_into(t, initial_state, y, final_state, kept if keep else None)
    return y, final_state, kept


def _forward_fake(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
    initial_state: Tensor | None, document_start: Tensor | None, softplus: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    new = partial(torch.empty, dtype=torch.float32, device=x.device)
    return x.new_empty(x.shape), new(x.shape[0], *A.shape), new(_kept_shape(x, A) if keep else (0,))


def _backward(
    g_y: Tensor, g_final: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    dt_bias: Tensor | None, initial_state: Tensor | None, document_start: Tensor | None, kept: Tensor, softplus: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    outputs = _backward_fake(g_y, g_final, x, dt, A, B, C, D, dt_bias, initial_state, document_start, kept, softplus)
    given = (x, dt, A, B, C, D, dt_bias, initial_state)
    t = _inputs(x, dt, A, B, C, D, dt_bias, softplus, document_start)
    g = Gradients(*(None if of is None else out for of, out in zip(given, outputs, strict=True)))  # type: ignore[arg-type]
    backward_into(t, kept, unit_stride(g_y), g_final, g)
    return outputs


def _backward_fake(
    g_y: Tensor, g_final: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    dt_bias: Tensor | None, initial_state: Tensor | None, document_start: Tensor | None, kept: Tensor, softplus: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients in the order and dtypes of their tensors; empty for those that are None."""
    given = (x, dt, A, B, C, D, dt_bias, initial_state)
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in given)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.softplus = inputs[-2]
    ctx.save_for_backward(*inputs[:-2], output[2])


def _autograd(ctx: Any, g_y: Tensor | None, g_final: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    given = ctx.saved_tensors
    if g_y is None and g_final is None:
        return (None,) * 11
    g_y = torch.zeros_like(given[0]) if g_y is None else g_y
    gradients = _gradients(g_y, g_final, *given, ctx.softplus)
    return *(None if t is None else g for t, g in zip(given[:8], gradients, strict=True)), None, None, None


_INPUTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, Tensor? initial_state, Tensor? document_start"
)
_gradients = register(
    "selective_scan_backward",
    f"(Tensor g_y, Tensor? g_final, {_INPUTS}, Tensor kept, bool softplus)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_scan = register(
    "selective_scan", f"({_INPUTS}, bool softplus, bool keep) -> (Tensor, Tensor, Tensor)", _forward, _forward_fake,
    setup_context=_setup_context, backward=_autograd,
)  # fmt: skip


def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None, softplus: bool,
    initial_state: Tensor | None, document_start: Tensor | None, ranks: SequenceRanks | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`mamba_kernels.selective_scan` on checked arguments; y and the final state.

    `ranks` are several, and then there is no initial state, or None.
    """
    if ranks is not None:
        return _SpreadScan.apply(x, dt, A, B, C, D, dt_bias, document_start, softplus, ranks)
    given = (x, dt, A, B, C, D, dt_bias, initial_state)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    y, final_state, _ = _scan(*given, document_start, softplus, keep)
    return y, final_state


class _SpreadScan(torch.autograd.Function):
    """The scan of a sequence spread over ranks: see `reference`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
        document_start: Tensor | None, softplus: bool, ranks: SequenceRanks,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        whole = _inputs(x, dt, A, B, C, D, dt_bias, softplus, document_start)
        y, final_state = x.new_empty(x.shape), whole.new(x.shape[0], *A.shape)
        parts, arriving, kept = halves(x.shape[2], ranks), list[Callable[[], Tensor]](), list[Tensor]()
        for part in parts:
            t = whole.channels(part)
            state, total = _state_through(t, None, None)
            arriving.append(start_state_before(ranks, total, state, partial(total_decay, t.A.float(), state_dim=2)))
        for part, state_before in zip(parts, arriving, strict=True):
            t = whole.channels(part)
            kept.append(t.new(*_kept_shape(t.x, t.A)))
            forward_into(t, state_before(), y[..., part], final_state[:, part], kept[-1])
        ctx.save_for_backward(x, dt, A, B, C, D, dt_bias, document_start, *kept)
        ctx.softplus, ctx.ranks = softplus, ranks
        return y, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_y: Tensor, g_final: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, dt_bias, document_start, *kept = ctx.saved_tensors
        whole, g_y = _inputs(x, dt, A, B, C, D, dt_bias, ctx.softplus, document_start), unit_stride(g_y)
        parts, arriving = halves(x.shape[2], ctx.ranks), list[Callable[[], Tensor]]()
        for part in parts:
            t = whole.channels(part)
            gradient, total = _state_through(t, g_final[:, part], g_y[..., part])
            arriving.append(start_gradient_after(ctx.ranks, total, gradient, partial(total_decay, t.A.float(), state_dim=2)))
        g_x, g_dt, g_A = (t.new_empty(t.shape) for t in (x, dt, A))
        g_D, g_bias = (None if t is None else t.new_empty(t.shape) for t in (D, dt_bias))
        # Of the sum of two parts' gradients, only the result is rounded to the dtype of B and C.
        g_Bs, g_Cs = ([whole.new(*t.shape) for _ in parts] for t in (B, C))
        for i, (part, gradient_after) in enumerate(zip(parts, arriving, strict=True)):
            of_D, of_bias = (None if t is None else t[part] for t in (g_D, g_bias))
            g = Gradients(g_x[..., part], g_dt[..., part], g_A[part], g_Bs[i], g_Cs[i], of_D, of_bias, None)
            after = gradient_after().add_(g_final[:, part])
            backward_into(whole.channels(part), kept[i], g_y[..., part], after, g)
        g_B, g_C = (sum(shares[1:], shares[0]).to(t.dtype) for shares, t in ((g_Bs, B), (g_Cs, C)))
        return g_x, g_dt, g_A, g_B, g_C, g_D, g_bias, None, None, None
