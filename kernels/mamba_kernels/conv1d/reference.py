"""Causal depthwise convolution in plain torch: some tokens of a sequence at a time, a fused multiply-add for each tap.

The backward keeps only the inputs and recomputes the convolution. `g_` before a name is the gradient of the loss with
respect to it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mamba_kernels.common import accumulate_dtype, row_blocks, silu_gradient


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_state: Tensor | None,
    document_start: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`mamba_kernels.causal_conv1d` on checked arguments; y and the final state."""
    return _CausalConv1d.apply(x, weight, bias, silu, initial_state, document_start)


def _masks(document_start: Tensor | None, width: int, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """What a document boundary separates, as factors 0 and 1; None if there are no boundaries.

    For each tap whether the input it reads belongs to the document of its token, [B, W, S, 1]; and for each of the last
    W-1 inputs whether it belongs to the document that goes on after the sequence, [B, W-1, 1].
    """
    if document_start is None:
        return None, None
    batch, length = document_start.shape
    starts = torch.cat([document_start.new_zeros(batch, width - 1), document_start], 1)
    same = torch.ones_like(document_start)
    taps = [same]
    for tap in reversed(range(1, width)):
        # The input of tap - 1 is in the document of the token if that of tap is, and does not start it.
        same = same & ~starts[:, tap : tap + length]
        taps.insert(0, same)
    last = starts[:, length:]
    later_starts = last.flip(1).cumsum(1).flip(1) - last.to(torch.int64)
    return torch.stack(taps, 1).to(dtype).unsqueeze(-1), (later_starts == 0).to(dtype).unsqueeze(-1)


def _window(x_SC: Tensor, before_WC: Tensor | None, tokens: slice, width: int, dtype: torch.dtype) -> Tensor:
    """The inputs of some tokens with the W-1 before them, from x, `before` x, or zero."""
    first = tokens.start - (width - 1)
    if first >= 0:
        return x_SC[first : tokens.stop].to(dtype)
    if before_WC is None:
        before_WC = x_SC.new_zeros(width - 1, x_SC.shape[1])
    return torch.cat([before_WC[first:].to(dtype), x_SC[: tokens.stop].to(dtype)])


def _rows(i: int, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t[i] for t in tensors]


def _masked(t_SC: Tensor, same_WS1: Tensor | None, tap: int, tokens: slice) -> Tensor:
    return t_SC if same_WS1 is None else t_SC * same_WS1[tap, tokens]


def _convolve(window: Tensor, weight_WC: Tensor, bias_C: Tensor, same_WS1: Tensor | None, tokens: slice) -> Tensor:
    """The convolution of some tokens before its activation."""
    width = len(weight_WC)
    length = len(window) - width + 1
    out = bias_C.repeat(length, 1)
    for tap in range(width):
        out.addcmul_(_masked(window[tap : tap + length], same_WS1, tap, tokens), weight_WC[tap])
    return out


def _tap_major(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight as contiguous [W, C] and bias [C], zero if None, in the accumulation dtype."""
    weight_WC = weight.to(dtype).T.contiguous()
    return weight_WC, weight_WC.new_zeros(len(weight)) if bias is None else bias.to(dtype)


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        silu: bool,
        initial_state: Tensor | None,
        document_start: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        (batch, length, channels), width, dtype = x.shape, weight.shape[1], accumulate_dtype(x.dtype)
        weight_WC, bias_C = _tap_major(weight, bias, dtype)
        same, kept = _masks(document_start, width, dtype)
        y, final_state = x.new_empty(x.shape), x.new_empty(batch, width - 1, channels)
        for i in range(batch):
            before, same_i = _rows(i, initial_state, same)
            for tokens in row_blocks(x[i]):
                window = _window(x[i], before, tokens, width, dtype)
                out = _convolve(window, weight_WC, bias_C, same_i, tokens)
                y[i, tokens] = functional.silu(out, inplace=True) if silu else out
            final_state[i] = _window(x[i], before, slice(length, length), width, dtype)
        if kept is not None:
            final_state *= kept
        ctx.save_for_backward(x, weight, bias, initial_state, document_start)
        ctx.silu = silu
        return y, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_y: Tensor, g_final: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, initial_state, document_start = ctx.saved_tensors
        batch, width, dtype = len(x), weight.shape[1], accumulate_dtype(x.dtype)
        weight_WC, bias_C = _tap_major(weight, bias, dtype)
        same, kept = _masks(document_start, width, dtype)
        g_x, g_weight, g_bias = x.new_empty(x.shape), torch.zeros_like(weight_WC), torch.zeros_like(bias_C)
        # The gradient of the W-1 inputs before the tokens done so far, from the last token to the first.
        g_before = g_final.to(dtype) if kept is None else g_final * kept
        g_initial = torch.empty_like(g_before)
        for i in range(batch):
            (before, same_i), carry = _rows(i, initial_state, same), g_before[i]
            for tokens in reversed(row_blocks(x[i])):
                window = _window(x[i], before, tokens, width, dtype)
                g_out = g_y[i, tokens].to(dtype)
                if ctx.silu:
                    g_out = silu_gradient(g_out, _convolve(window, weight_WC, bias_C, same_i, tokens))
                g_window = torch.zeros_like(window)
                g_window[len(g_out) :] = carry
                g_bias += g_out.sum(0)
                for tap in range(width):
                    span, g_tap = slice(tap, tap + len(g_out)), _masked(g_out, same_i, tap, tokens)
                    g_window[span].addcmul_(g_tap, weight_WC[tap])
                    g_weight[tap] += (g_tap * window[span]).sum(0)
                g_x[i, tokens], carry = g_window[width - 1 :], g_window[: width - 1]
            g_initial[i] = carry
        g_initial_or_none = None if initial_state is None else g_initial.to(initial_state.dtype)
        return (
            g_x, g_weight.T.to(weight.dtype), None if bias is None else g_bias.to(bias.dtype), None, g_initial_or_none,
            None,
        )  # fmt: skip
