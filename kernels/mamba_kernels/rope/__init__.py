"""Rotary position embedding, half-split convention: dimension i of the rotated part turns with dimension i + half."""

import torch
from torch import Tensor

from mamba_kernels.backend import use_fused
from mamba_kernels.common import Sizes, check_tensors
from mamba_kernels.rope import reference


def rope_tables(
    positions: Tensor, rotary_dim: int, base: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles positions * base^(-2i / rotary_dim), i < rotary_dim / 2 (arXiv 2104.09864, eq. 15).

    Shapes: positions [S] or [B, S], integer. Returns cos and sin [..., rotary_dim // 2] in `dtype`; the angles are
    computed in float64, so that they are exact for long sequences too. Raises ValueError if positions are not integers
    or rotary_dim is not even and positive.
    """
    if positions.is_floating_point() or positions.is_complex() or positions.dtype == torch.bool:
        raise ValueError(f"rope_tables: positions has dtype {positions.dtype}, wanted an integer dtype")
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(f"rope_tables: rotary_dim is {rotary_dim}, wanted a positive even number")
    return reference.rope_tables(positions, rotary_dim, base, dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first rotary_dim of the P dimensions of every head by the angles of its token, and keep the others.

        out[i] = x[i] cos[i] - x[i + half] sin[i]        out[i + half] = x[i + half] cos[i] + x[i] sin[i]

    Shapes: x [B, S, H, P]; cos, sin [S, half] or [B, S, half] as from `rope_tables`, with half = rotary_dim / 2 <= P / 2.
    Returns [B, S, H, P] in the dtype of x. Differentiable in x, cos and sin. Computes in float32 (float64 if x is).
    Raises ValueError for a wrong shape, dtype or device.
    """
    sizes: Sizes = {}
    table = "S half" if cos.dim() == 2 else "B S half"
    check_tensors("rope", sizes, x=(x, "B S H P"), cos=(cos, table), sin=(sin, table))
    if 2 * sizes["half"] > sizes["P"]:
        raise ValueError(f"rope: cos rotates {2 * sizes['half']} dimensions, wanted at most the {sizes['P']} of x's heads")
    if use_fused(x):
        from mamba_kernels.rope import fused

        return fused.rope(x, cos, sin)
    return reference.rope(x, cos, sin)
