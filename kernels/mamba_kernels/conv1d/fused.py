"""The causal convolution as Triton kernels that read every input once: a program slides over some tokens of some channels.

What a token needs of the W-1 before it stays in registers, in tuples over the inputs from t-(W-1), the oldest, up: the inputs
(`window`), zero where they are of another document, and the gradient they have so far (`pending`).
`g_` before a name is the gradient of the loss with respect to it.
"""
# ruff: noqa: RUF005 - Triton's language has no starred expressions

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamba_kernels.activation.fused import sigmoid
from mamba_kernels.backend import Meta, Tunable, launch, register
from mamba_kernels.common import cdiv, contiguous, next_power_of_2, unit_stride
from mamba_kernels.norm.fused import sum_rows_into


def _metas(width: int, configurations: Iterable[Sequence[int]]) -> list[Meta]:
    """From tokens a program, tokens a step, channels, stages and warps, for filters up to 4 wide.

    Wider ones leave registers for half the channels, and make of so many tokens a step that takes minutes to compile.
    """
    wide = width > 4
    return [
        {
            "TOKENS": min(max(tokens, unroll), 256), "UNROLL": min(unroll, 2) if wide else unroll,
            "BLOCK_C": channels // 2 if wide else channels, "STAGES": stages, "num_warps": warps,
        }
        for tokens, unroll, channels, stages, warps in configurations
    ]  # fmt: skip


def _forward_candidates(dtype: torch.dtype, width: int, work: int) -> list[Meta]:
    """For a filter width and so many million elements, rounded up to a power of two: the more, the longer a program's slide."""
    tokens = min(work // 4, 32)
    steps = ((8, 512, 1, 4), (8, 256, 1, 4), (16, 512, 1, 4), (16, 256, 1, 2), (4, 512, 3, 4))
    return _metas(width, ((tokens, *step) for step in steps))


def _backward_candidates(dtype: torch.dtype, width: int, work: int) -> list[Meta]:
    """As for the forward; programs are longer, as each leaves its part of the weight's gradient."""
    tokens = min(work, 128)
    steps = ((1, 8, 128, 3, 1), (1, 8, 512, 3, 4), (2, 8, 512, 2, 4), (2, 4, 512, 4, 4), (1, 4, 128, 3, 1))
    return _metas(width, ((times * tokens, *step) for times, *step in steps))


FORWARD = Tunable("causal_conv1d", _forward_candidates)
BACKWARD = Tunable("causal_conv1d_backward", _backward_candidates)


@triton.jit
def _without_first(values):
    rest = ()
    for i in tl.static_range(1, len(values)):
        rest = rest + (values[i],)
    return rest


@triton.jit
def _cleared(values, start):
    """Zero in place of all values, if a document starts."""
    kept = ()
    for i in tl.static_range(len(values)):
        kept = kept + (tl.where(start, 0.0, values[i]),)
    return kept


@triton.jit
def _limit(valid, C):
    """All channels if `valid`, else none: the interpreter cannot spread one bool over a block."""
    return tl.where(valid, C, 0)


@triton.jit
def _load(ptr, t, stride, channels, limit):
    """Row t of the channels below a limit, and zero from there on."""
    return tl.load(ptr + t.to(tl.int64) * stride + channels, mask=channels < limit, other=0.0)


@triton.jit
def _store(ptr, t, stride, channels, limit, values):
    """Write row t of the channels below a limit."""
    tl.store(ptr + t.to(tl.int64) * stride + channels, values.to(ptr.dtype.element_ty), mask=channels < limit)


@triton.jit
def _taps(weight_ptr, channels, inside, W: tl.constexpr):
    taps = ()
    for k in tl.static_range(W):
        taps = taps + (tl.load(weight_ptr + channels * W + k, mask=inside, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def _starts(starts_ptr, t, S, s_starts):
    """Whether a document starts at token t; none does before the sequence or after it.

    Without boundaries that is a comparison which the compiler sees to be false: it leaves out what is for documents.
    """
    if starts_ptr is None:
        return t < t
    else:
        nearest = tl.minimum(tl.maximum(t, 0), S - 1)
        return (tl.load(starts_ptr + nearest.to(tl.int64) * s_starts) != 0) & (t == nearest)


@triton.jit
def _any_starts(starts_ptr, t, S, s_starts, UNROLL: tl.constexpr):
    """Whether a document starts at one of the tokens from t on."""
    if starts_ptr is None:
        return t < t
    else:
        tokens = (t + tl.arange(0, UNROLL)).to(tl.int64)
        return tl.max(tl.load(starts_ptr + tokens * s_starts, mask=tokens < S, other=0).to(tl.int32), 0) != 0


@triton.jit
def _window_before(t, x_ptr, initial_ptr, starts_ptr, channels, S, C, s_x, s_starts, W: tl.constexpr):
    """The W-1 inputs before token t, as float32, zero where a document starts after them."""
    window = ()
    for k in tl.static_range(W - 1):
        s = t - (W - 1) + k
        x = _load(x_ptr, s, s_x, channels, _limit(s >= 0, C)).to(tl.float32)
        if initial_ptr is not None:
            x += _load(initial_ptr, s + W - 1, C, channels, _limit(s < 0, C)).to(tl.float32)
        window = _cleared(window, _starts(starts_ptr, s, S, s_starts))
        window = window + (x,)
    return window


@triton.jit
def _convolved(inputs, taps, bias, W: tl.constexpr):
    out = bias
    for k in tl.static_range(W):
        out += taps[k] * inputs[k]
    return out


@triton.jit
def _conv_step(t, x, start, window, taps, bias, y_ptr, channels, limit, s_y, SILU: tl.constexpr, W: tl.constexpr):
    """One token: writes its output, and returns the window of the next."""
    inputs = _cleared(window, start) + (x.to(tl.float32),)
    out = _convolved(inputs, taps, bias, W)
    if SILU:
        out *= sigmoid(out)
    _store(y_ptr, t, s_y, channels, limit, out)
    return _without_first(inputs)


@triton.jit
def _conv_kernel(
    x_ptr, weight_ptr, bias_ptr, initial_ptr, starts_ptr, y_ptr, final_ptr, S, C, s_x_B, s_x, s_starts_B, s_starts, s_y_B, s_y,
    SILU: tl.constexpr, W: tl.constexpr, BLOCK_C: tl.constexpr, TOKENS: tl.constexpr, UNROLL: tl.constexpr,
    STAGES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    channels, batch = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C), tl.program_id(2).to(tl.int64)
    inside, begin = channels < C, tl.program_id(1) * TOKENS
    x_ptr, y_ptr, final_ptr = x_ptr + batch * s_x_B, y_ptr + batch * s_y_B, final_ptr + batch * (W - 1) * C
    if initial_ptr is not None:
        initial_ptr += batch * (W - 1) * C
    if starts_ptr is not None:
        starts_ptr += batch * s_starts_B
    taps, bias = _taps(weight_ptr, channels, inside, W), tl.zeros([BLOCK_C], tl.float32)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + channels, mask=inside, other=0.0).to(tl.float32)
    window = _window_before(begin, x_ptr, initial_ptr, starts_ptr, channels, S, C, s_x, s_starts, W)
    for first in tl.range(0, tl.minimum(TOKENS, S - begin), UNROLL, num_stages=STAGES):
        # All loads before the first store: the compiler cannot know that x is not where y is.
        xs, t = (), begin + first
        for u in tl.static_range(UNROLL):
            xs = xs + (_load(x_ptr, t + u, s_x, channels, C if WHOLE else _limit(t + u < S, C)),)
        if _any_starts(starts_ptr, t, S, s_starts, UNROLL):
            # Seldom, and so by one token after the other: the code of the other case is the shorter for it.
            for i in range(UNROLL):  # noqa: B007
                limit, start = _limit(t < S, C), _starts(starts_ptr, t, S, s_starts)
                x = _load(x_ptr, t, s_x, channels, limit)
                window = _conv_step(t, x, start, window, taps, bias, y_ptr, channels, limit, s_y, SILU, W)
                t += 1
        else:
            for v in tl.static_range(UNROLL):
                limit = C if WHOLE else _limit(t + v < S, C)
                window = _conv_step(t + v, xs[v], False, window, taps, bias, y_ptr, channels, limit, s_y, SILU, W)
    if tl.program_id(1) == tl.num_programs(1) - 1:
        # Not S itself, which is a constant where it is 1 and then has no conversions.
        window = _window_before(begin * 0 + S, x_ptr, initial_ptr, starts_ptr, channels, S, C, s_x, s_starts, W)
        for k in tl.static_range(W - 1):
            tl.store(final_ptr + k * C + channels, window[k].to(final_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _store_gradient(s, kept_from, stop, g_x, g_x_ptr, g_initial_ptr, channels, C, s_g_x, W: tl.constexpr, ALWAYS: tl.constexpr):
    """Write the gradient of input s, if it is one of those still to be written here; if ALWAYS it is."""
    if ALWAYS:
        _store(g_x_ptr, s, s_g_x, channels, C, g_x)
    else:
        _store(g_x_ptr, s, s_g_x, channels, _limit((s >= kept_from) & (s >= 0) & (s < stop), C), g_x)
        if g_initial_ptr is not None:
            _store(g_initial_ptr, s + W - 1, C, channels, _limit((s >= kept_from) & (s < 0), C), g_x)


@triton.jit
def _conv_backward_step(
    t, x, g_y, start, kept_from, stop, window, pending, taps, bias, g_taps, g_bias,
    g_final_ptr, g_x_ptr, g_initial_ptr, channels, S, C, s_g_x,
    SILU: tl.constexpr, W: tl.constexpr, ACCUMULATE: tl.constexpr, ALWAYS: tl.constexpr,
):  # fmt: skip
    """One token: what its output's gradient gives to its W inputs, of which the oldest then has all it gets.

    Where a document starts, the inputs before it have all they get: they are written, and what `pending` gathers for them
    from there on is not. The inputs that are still to be written are those from `kept_from` to before `stop`.
    """
    if start:
        for k in tl.static_range(W - 1):
            s = t - (W - 1) + k
            _store_gradient(s, kept_from, stop, pending[k], g_x_ptr, g_initial_ptr, channels, C, s_g_x, W, False)
        kept_from = t
    inputs, g_out = _cleared(window, start) + (x.to(tl.float32),), g_y.to(tl.float32)
    if SILU:
        out = _convolved(inputs, taps, bias, W)
        gate = sigmoid(out)
        g_out *= gate
        g_out += g_out * (out - out * gate)
    pending, given = pending + (tl.zeros_like(bias),), ()
    for k in tl.static_range(W):
        given = given + (pending[k] + taps[k] * g_out,)
    if ACCUMULATE:
        summed = ()
        for k in tl.static_range(W):
            summed = summed + (g_taps[k] + g_out * inputs[k],)
        g_taps, g_bias = summed, g_bias + g_out
    s, g_x = t - (W - 1), given[0]
    if g_final_ptr is not None:
        g_x += _load(g_final_ptr, t - S, C, channels, _limit((t >= S) & (s < S), C)).to(tl.float32)
    _store_gradient(s, kept_from, stop, g_x, g_x_ptr, g_initial_ptr, channels, C, s_g_x, W, ALWAYS)
    return kept_from, _without_first(inputs), _without_first(given), g_taps, g_bias


@triton.jit
def _conv_backward_kernel(
    x_ptr, weight_ptr, bias_ptr, initial_ptr, starts_ptr, g_y_ptr, g_final_ptr, g_x_ptr, g_initial_ptr, partials_ptr, S, C,
    s_x_B, s_x, s_starts_B, s_starts, s_g_y_B, s_g_y, s_g_x_B, s_g_x,
    SILU: tl.constexpr, W: tl.constexpr, BLOCK_C: tl.constexpr, TOKENS: tl.constexpr, UNROLL: tl.constexpr,
    STAGES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    channels, batch = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C), tl.program_id(2).to(tl.int64)
    inside, begin = channels < C, tl.program_id(1) * TOKENS
    x_ptr, g_y_ptr, g_x_ptr = x_ptr + batch * s_x_B, g_y_ptr + batch * s_g_y_B, g_x_ptr + batch * s_g_x_B
    if initial_ptr is not None:
        initial_ptr += batch * (W - 1) * C
        g_initial_ptr += batch * (W - 1) * C
    if g_final_ptr is not None:
        g_final_ptr += batch * (W - 1) * C
    if starts_ptr is not None:
        starts_ptr += batch * s_starts_B
    zeros = tl.zeros([BLOCK_C], tl.float32)
    taps, bias, g_bias, g_taps, pending = _taps(weight_ptr, channels, inside, W), zeros, zeros, (zeros,), ()
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + channels, mask=inside, other=0.0).to(tl.float32)
    for _ in tl.static_range(W - 1):
        g_taps, pending = g_taps + (zeros,), pending + (zeros,)
    window = _window_before(begin, x_ptr, initial_ptr, starts_ptr, channels, S, C, s_x, s_starts, W)
    kept_from, stop = tl.where(begin == 0, 1 - W, begin), tl.minimum(begin + TOKENS, S)
    for first in tl.range(0, tl.minimum(TOKENS, S - begin), UNROLL, num_stages=STAGES):
        # All loads before the first store, and a start of a document, as in the forward.
        xs, g_ys, t = (), (), begin + first
        for u in tl.static_range(UNROLL):
            there = C if WHOLE else _limit(t + u < S, C)
            xs, g_ys = xs + (_load(x_ptr, t + u, s_x, channels, there),), g_ys + (_load(g_y_ptr, t + u, s_g_y, channels, there),)
        if _any_starts(starts_ptr, t, S, s_starts, UNROLL):
            for i in range(UNROLL):  # noqa: B007
                limit, start = _limit(t < S, C), _starts(starts_ptr, t, S, s_starts)
                x, g_y = _load(x_ptr, t, s_x, channels, limit), _load(g_y_ptr, t, s_g_y, channels, limit)
                kept_from, window, pending, g_taps, g_bias = _conv_backward_step(
                    t, x, g_y, start, kept_from, stop, window, pending, taps, bias, g_taps, g_bias,
                    g_final_ptr, g_x_ptr, g_initial_ptr, channels, S, C, s_g_x, SILU, W, True, False,
                )  # fmt: skip
                t += 1
        else:
            for v in tl.static_range(UNROLL):
                # Where all these tokens exist none has a part in the final state, and from the W-th on the input that is done
                # is one of theirs.
                kept_from, window, pending, g_taps, g_bias = _conv_backward_step(
                    t + v, xs[v], g_ys[v], False, kept_from, stop, window, pending, taps, bias, g_taps, g_bias,
                    None if WHOLE else g_final_ptr, g_x_ptr, g_initial_ptr, channels, S, C, s_g_x,
                    SILU, W, True, WHOLE and v >= W - 1,
                )  # fmt: skip
    # The inputs of this program have gradients from the W-1 tokens after it too, also where there are none (of the final state).
    end = begin + tl.cdiv(tl.maximum(tl.minimum(TOKENS, S - begin), 0), UNROLL) * UNROLL
    for i in range(W - 1):
        limit, start = _limit(end + i < S, C), _starts(starts_ptr, end + i, S, s_starts)
        x, g_y = _load(x_ptr, end + i, s_x, channels, limit), _load(g_y_ptr, end + i, s_g_y, channels, limit)
        kept_from, window, pending, g_taps, g_bias = _conv_backward_step(
            end + i, x, g_y, start, kept_from, stop, window, pending, taps, bias, g_taps, g_bias,
            g_final_ptr, g_x_ptr, g_initial_ptr, channels, S, C, s_g_x, SILU, W, False, False,
        )  # fmt: skip
    partials_ptr += (batch * tl.num_programs(1) + tl.program_id(1)) * C * (W + 1)
    for k in tl.static_range(W):
        tl.store(partials_ptr + channels * W + k, g_taps[k], mask=inside)
    tl.store(partials_ptr + C * W + channels, g_bias, mask=inside)


def _strides(t: Tensor | None) -> tuple[int, int]:
    """Of batch and sequence."""
    return (0, 0) if t is None else (t.stride(0), t.stride(1))


def _configured(tunable: Tunable, x: Tensor, width: int) -> tuple[tuple[int, int, int], Meta]:
    """The grid, with one program along an empty sequence too, and what else a launch takes."""
    batch, length, channels = x.shape
    meta = tunable(x.dtype, width, next_power_of_2(max(x.numel() >> 20, 1)))
    # A grid has at most 65,535 programs in its second dimension.
    tokens = max(meta["TOKENS"], next_power_of_2(cdiv(length, 65535)))
    meta = meta | {"TOKENS": tokens, "WHOLE": length % meta["UNROLL"] == 0}
    return (cdiv(channels, meta["BLOCK_C"]), max(cdiv(length, meta["TOKENS"]), 1), batch), meta


def forward_into(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, document_start: Tensor | None, silu: bool,
    y: Tensor, final_state: Tensor,
) -> None:  # fmt: skip
    """Write the convolution of [B, S, C] into `y` [B, S, C], and the state after it into a contiguous [B, W-1, C]."""
    document_start = document_start if x.shape[1] else None
    grid, meta = _configured(FORWARD, x, weight.shape[1])
    strides = (stride for t in (x, document_start, y) for stride in _strides(t))
    launch(
        _conv_kernel, grid, x, weight, bias, initial_state, document_start, y, final_state, *x.shape[1:], *strides,
        SILU=silu, W=weight.shape[1], **meta,
    )  # fmt: skip


def backward_into(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, document_start: Tensor | None, silu: bool,
    g_y: Tensor, g_final: Tensor | None, g_x: Tensor, g_weight: Tensor, g_bias: Tensor | None, g_initial: Tensor | None,
) -> None:  # fmt: skip
    """Write the gradients of x [B, S, C], of weight [C, W] and bias, and of the initial state, contiguous [B, W-1, C]."""
    document_start = document_start if x.shape[1] else None
    grid, meta = _configured(BACKWARD, x, weight.shape[1])
    partials = torch.empty(grid[1] * grid[2], weight.numel() + len(weight), dtype=torch.float32, device=x.device)
    strides = (stride for t in (x, document_start, g_y, g_x) for stride in _strides(t))
    launch(
        _conv_backward_kernel, grid, x, weight, bias, initial_state, document_start, g_y, g_final, g_x, g_initial, partials,
        *x.shape[1:], *strides, SILU=silu, W=weight.shape[1], **meta,
    )  # fmt: skip
    sum_rows_into(partials, g_weight, g_bias)


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, document_start: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    y, final_state = _forward_fake(x, weight)
    arguments = (weight.contiguous(), contiguous(bias), contiguous(initial_state), document_start, silu)
    forward_into(unit_stride(x), *arguments, y, final_state)
    return y, final_state


def _forward_fake(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    final_state = torch.empty(x.shape[0], weight.shape[1] - 1, x.shape[2], dtype=x.dtype, device=x.device)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), final_state


def _backward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, document_start: Tensor | None,
    g_y: Tensor | None, g_final: Tensor | None, silu: bool,
) -> list[Tensor]:  # fmt: skip
    """The gradients of x, weight, bias and initial_state, of those that there are."""
    gradients = _backward_fake(x, weight, bias, initial_state)
    g_x, g_weight, *others = gradients
    g_bias = None if bias is None else others[0]
    g_initial = None if initial_state is None else others[-1]
    g_y = torch.zeros_like(x) if g_y is None else g_y
    arguments = (weight.contiguous(), contiguous(bias), contiguous(initial_state), document_start, silu)
    backward_into(unit_stride(x), *arguments, unit_stride(g_y), contiguous(g_final), g_x, g_weight, g_bias, g_initial)
    return gradients


def _backward_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, *rest: Any
) -> list[Tensor]:
    tensors = (x, weight, bias, initial_state)
    return [torch.empty(t.shape, dtype=t.dtype, device=x.device) for t in tensors if t is not None]


_gradients = register(
    "causal_conv1d_backward",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? document_start, Tensor? g_y, Tensor? g_final,"
    " bool silu) -> Tensor[]",
    _backward, _backward_fake,
)  # fmt: skip


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _all_gradients(ctx: Any, g_y: Tensor | None, g_final: Tensor | None) -> tuple[Tensor | None, ...]:
    if g_y is None and g_final is None:
        return (None,) * 6
    x, weight, bias, initial_state, document_start = ctx.saved_tensors
    given = (x, weight, bias, initial_state, document_start, g_y, g_final, ctx.silu)
    gradients = iter(_gradients(*given))
    return *(None if t is None else next(gradients) for t in given[:4]), None, None


causal_conv1d = register(
    "causal_conv1d",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? document_start, bool silu) -> (Tensor, Tensor)",
    _forward, _forward_fake, setup_context=_save, backward=_all_gradients,
)  # fmt: skip
"""y and the final state."""
