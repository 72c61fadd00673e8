"""RMSNorm and LayerNorm over the last dimension, with the residual addition that precedes them."""

import torch
from torch import Tensor

from mamba_kernels.backend import use_fused
from mamba_kernels.common import check_tensors
from mamba_kernels.norm import reference


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm: weight h / sqrt(mean(h^2) + eps) with h = x, or h = x + residual (arXiv 1910.07467, equation 4).

    Shapes: x, residual [..., D]; weight [D]. Returns the norm [..., D] in the dtype of x; with `residual` the pair
    (norm, h), h in the wider dtype of x and residual, and the norm that of the rounded h. Differentiable in every
    tensor. Computes in float32 (float64 if h is) whatever the dtype of weight. Raises ValueError for a wrong shape,
    dtype or device.
    """
    check_tensors("rms_norm", {}, x=(x, "... D"), weight=(weight, "D"), residual=(residual, "... D"))
    if use_fused(x) and not _is_float64(residual):
        from mamba_kernels.norm import fused

        if residual is None:
            return fused.norm(x, weight, None, eps, False, False)
        return fused.add_norm(x, residual, weight, None, eps, False, False)
    if residual is None:
        return reference.rms_norm(x, weight, eps, x.dtype)
    h = x + residual
    return reference.rms_norm(h, weight, eps, x.dtype), h


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float,
    zero_centered: bool = False,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm: weight (h - mean(h)) / sqrt(var(h) + eps) + bias with h = x, or h = x + residual (arXiv 1607.06450).

    `zero_centered` is LayerNorm-1p: the factor is 1 + weight. Shapes: x, residual [..., D]; weight, bias [D]. Returns
    the norm [..., D] in the dtype of x; with `residual` the pair (norm, h), h in the wider dtype of x and residual, and
    the norm that of the rounded h. Differentiable in every tensor. Computes in float32 (float64 if h is) whatever the
    dtype of weight. Raises ValueError for a wrong shape, dtype or device.
    """
    check_tensors("layer_norm", {}, x=(x, "... D"), weight=(weight, "D"), bias=(bias, "D"), residual=(residual, "... D"))
    if use_fused(x) and not _is_float64(residual):
        from mamba_kernels.norm import fused

        if residual is None:
            return fused.norm(x, weight, bias, eps, True, zero_centered)
        return fused.add_norm(x, residual, weight, bias, eps, True, zero_centered)
    if residual is None:
        return reference.layer_norm(x, weight, bias, eps, zero_centered, x.dtype)
    h = x + residual
    return reference.layer_norm(h, weight, bias, eps, zero_centered, x.dtype), h


def _is_float64(residual: Tensor | None) -> bool:
    """Whether h is float64 although x is not: what the reference alone computes."""
    return residual is not None and residual.dtype == torch.float64
