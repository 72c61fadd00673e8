"""Rotary position embedding in plain torch; autograd keeps nothing but the tables."""

import torch
from torch import Tensor

from mamba_kernels.common import accumulate_dtype


def rope_tables(positions: Tensor, rotary_dim: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`mamba_kernels.rope_tables` on checked arguments."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=positions.device) / rotary_dim
    angles = positions.to(torch.float64).unsqueeze(-1) * base**-exponents
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`mamba_kernels.rope` on checked arguments."""
    dtype, half = accumulate_dtype(x.dtype), cos.shape[-1]
    cos, sin = (t.to(dtype).unsqueeze(-2) for t in (cos, sin))
    first, second = x[..., :half], x[..., half : 2 * half]
    rotated = (first * cos - second * sin).to(x.dtype), (second * cos + first * sin).to(x.dtype)
    return torch.cat([*rotated, x[..., 2 * half :]], dim=-1)
