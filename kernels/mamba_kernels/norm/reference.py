"""RMSNorm and LayerNorm in plain torch; `g_` before a name is the gradient of the loss with respect to it."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mamba_kernels.common import accumulate_dtype, row_blocks


def rms_norm(h: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """The norm of h times weight, in `dtype`."""
    return _RMSNorm.apply(h, weight, eps, dtype)


def layer_norm(h: Tensor, weight: Tensor, bias: Tensor | None, eps: float, zero_centered: bool, dtype: torch.dtype) -> Tensor:
    """The norm of h times weight (1 + weight if `zero_centered`) plus bias, in `dtype`."""
    compute = accumulate_dtype(h.dtype)
    weight = weight.to(compute) + 1.0 if zero_centered else weight.to(compute)
    bias = None if bias is None else bias.to(compute)
    return functional.layer_norm(h.to(compute), h.shape[-1:], weight, bias, eps).to(dtype)


class _RMSNorm(torch.autograd.Function):
    """Keeps h and one factor a token."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        weight_D = weight.to(accumulate_dtype(h.dtype))
        out = h.new_empty(h.shape, dtype=dtype)
        h_TD, out_TD = h.reshape(-1, len(weight)), out.view(-1, len(weight))
        inverse_rms = weight_D.new_empty(len(h_TD), 1)
        for rows in row_blocks(h_TD):
            h_ = h_TD[rows].to(weight_D.dtype)
            torch.rsqrt(h_.square().mean(1, keepdim=True).add_(eps), out=inverse_rms[rows])
            torch.mul(h_ * inverse_rms[rows], weight_D, out=out_TD[rows])
        ctx.save_for_backward(h, weight, inverse_rms)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_out: Tensor) -> tuple[Tensor | None, ...]:
        h, weight, inverse_rms = ctx.saved_tensors
        weight_D, g_h = weight.to(inverse_rms.dtype), h.new_empty(h.shape)
        g_weight = torch.zeros_like(weight_D)
        h_TD, g_out_TD, g_h_TD = (t.reshape(-1, len(weight)) for t in (h, g_out, g_h))
        for rows in row_blocks(h_TD):
            normed, g_out_ = h_TD[rows] * inverse_rms[rows], g_out_TD[rows].to(weight_D.dtype)
            g_weight += (g_out_ * normed).sum(0)
            g_normed = g_out_ * weight_D
            projection = (g_normed * normed).mean(1, keepdim=True)
            torch.mul(g_normed.sub_(normed.mul_(projection)), inverse_rms[rows], out=g_h_TD[rows])
        return g_h, g_weight.to(weight.dtype), None, None
