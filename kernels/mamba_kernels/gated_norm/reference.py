"""Gated group RMSNorm in plain torch; the backward keeps the inputs and recomputes the rest.

`g_` before a name is the gradient of the loss with respect to it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mamba_kernels.common import accumulate_dtype, row_blocks, silu_gradient


def gated_norm(y: Tensor, z: Tensor, weight: Tensor, group_size: int, eps: float) -> Tensor:
    """`mamba_kernels.gated_norm` on checked arguments."""
    return _GatedNorm.apply(y, z, weight, group_size, eps)


def _normalise(y_TE: Tensor, silu_TE: Tensor, group_size: int, eps: float) -> tuple[Tensor, Tensor]:
    """y silu(z) normalised, [T, groups, group size], and the factor that did it, [T, groups, 1]."""
    gated = (y_TE * silu_TE).unflatten(1, (-1, group_size))
    inverse_rms = gated.square().mean(2, keepdim=True).add_(eps).rsqrt_()
    return gated.mul_(inverse_rms), inverse_rms


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, weight: Tensor, group_size: int, eps: float) -> Tensor:
        ctx.save_for_backward(y, z, weight)
        ctx.group_size, ctx.eps = group_size, eps
        out, weight_E = y.new_empty(y.shape), weight.to(accumulate_dtype(y.dtype))
        y_TE, z_TE, out_TE = (t.reshape(-1, len(weight)) for t in (y, z, out))
        for rows in row_blocks(y_TE):
            silu_z = functional.silu(z_TE[rows].to(weight_E.dtype))
            normed, _ = _normalise(y_TE[rows], silu_z, group_size, eps)
            torch.mul(normed.flatten(1), weight_E, out=out_TE[rows])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_out: Tensor) -> tuple[Tensor | None, ...]:
        y, z, weight = ctx.saved_tensors
        g_y, g_z, weight_E = y.new_empty(y.shape), z.new_empty(z.shape), weight.to(accumulate_dtype(y.dtype))
        g_weight = torch.zeros_like(weight_E)
        y_TE, z_TE, g_out_TE, g_y_TE, g_z_TE = (t.reshape(-1, len(weight)) for t in (y, z, g_out, g_y, g_z))
        for rows in row_blocks(y_TE):
            y_, z_, g_out_ = (t[rows].to(weight_E.dtype) for t in (y_TE, z_TE, g_out_TE))
            silu_z = functional.silu(z_)
            normed, inverse_rms = _normalise(y_, silu_z, ctx.group_size, ctx.eps)
            g_weight += (g_out_ * normed.flatten(1)).sum(0)
            g_normed = (g_out_ * weight_E).view_as(normed)
            projection = (g_normed * normed).mean(2, keepdim=True)
            g_gated = g_normed.sub_(normed.mul_(projection)).mul_(inverse_rms).flatten(1)
            torch.mul(silu_gradient(g_gated, z_), y_, out=g_z_TE[rows])
            torch.mul(g_gated, silu_z, out=g_y_TE[rows])
        return g_y, g_z, g_weight.to(weight.dtype), None, None
