"""Gated group RMSNorm in plain torch; the backward keeps the inputs and recomputes the rest.

`g_` before a name is the gradient of the loss with respect to it. A group that is spread over processes needs two sums of
one number a token, which the caller provides: of u^2 in the forward, of g_normed * normed in the backward.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mamba_kernels.common import accumulate_dtype, row_blocks, silu_gradient

SumParts = Callable[[Tensor], Tensor]


def gated_norm(y: Tensor, z: Tensor, weight: Tensor, group_size: int, eps: float, sum_parts: SumParts | None) -> Tensor:
    """`mamba_kernels.gated_norm` on checked arguments."""
    return _GatedNorm.apply(y, z, weight, group_size, eps, sum_parts)


def _gated(y: Tensor, z: Tensor, local_size: int) -> tuple[Tensor, Tensor]:
    """y silu(z) as [T, groups, channels here], and silu(z) [T, E], from rows in the accumulation dtype."""
    silu_z = functional.silu(z)
    return (y * silu_z).unflatten(1, (-1, local_size)), silu_z


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, z: Tensor, weight: Tensor, group_size: int, eps: float, sum_parts: SumParts | None
    ) -> Tensor:
        local_size = min(group_size, len(weight))
        out, weight_E = y.new_empty(y.shape), weight.to(accumulate_dtype(y.dtype))
        y_TE, z_TE, out_TE = (t.reshape(-1, len(weight)) for t in (y, z, out))
        squares = None
        if sum_parts is not None:
            squares = weight_E.new_empty(len(y_TE))
            for rows in row_blocks(y_TE):
                gated, _ = _gated(y_TE[rows].to(weight_E.dtype), z_TE[rows].to(weight_E.dtype), local_size)
                squares[rows] = gated.square_().sum((1, 2))
            squares = sum_parts(squares)
        for rows in row_blocks(y_TE):
            gated, _ = _gated(y_TE[rows].to(weight_E.dtype), z_TE[rows].to(weight_E.dtype), local_size)
            torch.mul(_normalise(gated, squares, rows, group_size, eps)[0].flatten(1), weight_E, out=out_TE[rows])
        ctx.save_for_backward(y, z, weight, squares)
        ctx.group_size, ctx.local_size, ctx.eps, ctx.sum_parts = group_size, local_size, eps, sum_parts
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_out: Tensor) -> tuple[Tensor | None, ...]:
        y, z, weight, squares = ctx.saved_tensors
        g_y, g_z, weight_E = y.new_empty(y.shape), z.new_empty(z.shape), weight.to(accumulate_dtype(y.dtype))
        g_weight = torch.zeros_like(weight_E)
        y_TE, z_TE, g_out_TE, g_y_TE, g_z_TE = (t.reshape(-1, len(weight)) for t in (y, z, g_out, g_y, g_z))
        projections = None
        if ctx.sum_parts is not None:
            projections = weight_E.new_empty(len(y_TE))
            for rows in row_blocks(y_TE):
                y_, z_, g_out_ = (t[rows].to(weight_E.dtype) for t in (y_TE, z_TE, g_out_TE))
                normed, _ = _normalise(_gated(y_, z_, ctx.local_size)[0], squares, rows, ctx.group_size, ctx.eps)
                projections[rows] = ((g_out_ * weight_E).view_as(normed) * normed).sum((1, 2))
            projections = ctx.sum_parts(projections)
        for rows in row_blocks(y_TE):
            y_, z_, g_out_ = (t[rows].to(weight_E.dtype) for t in (y_TE, z_TE, g_out_TE))
            gated, silu_z = _gated(y_, z_, ctx.local_size)
            normed, inverse_rms = _normalise(gated, squares, rows, ctx.group_size, ctx.eps)
            g_weight += (g_out_ * normed.flatten(1)).sum(0)
            g_normed = (g_out_ * weight_E).view_as(normed)
            total = (g_normed * normed).sum(2, keepdim=True) if projections is None else projections[rows, None, None]
            g_gated = g_normed.sub_(normed.mul_(total / ctx.group_size)).mul_(inverse_rms).flatten(1)
            torch.mul(silu_gradient(g_gated, z_), y_, out=g_z_TE[rows])
            torch.mul(g_gated, silu_z, out=g_y_TE[rows])
        return g_y, g_z, g_weight.to(weight.dtype), None, None, None


def _normalise(
    gated: Tensor, squares_T: Tensor | None, rows: slice, group_size: int, eps: float
) -> tuple[Tensor, Tensor]:
    """`gated` normalised in place, and the factor that did it, [T, groups, 1]; `squares` are the sums of whole groups."""
    total = gated.square().sum(2, keepdim=True) if squares_T is None else squares_T[rows, None, None]
    inverse_rms = (total / group_size).add_(eps).rsqrt_()
    return gated.mul_(inverse_rms), inverse_rms
