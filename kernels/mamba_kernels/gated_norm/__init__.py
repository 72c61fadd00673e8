"""The normalisation at the end of a Mamba-2 mixer: gate first, then RMSNorm over each group of channels."""

from collections.abc import Callable

from torch import Tensor

from mamba_kernels.backend import use_fused
from mamba_kernels.common import Sizes, check_group_size, check_tensors
from mamba_kernels.gated_norm import reference


def gated_norm(
    y: Tensor,
    z: Tensor,
    weight: Tensor,
    *,
    group_size: int,
    eps: float,
    sum_parts: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Gate y with silu(z), then RMSNorm it over each group of `group_size` channels (arXiv 2405.21060, section 8.2).

        u = y silu(z)        out = weight u / sqrt(mean of u^2 over the group + eps)

    Shapes: y, z [..., E]; weight [E]; group_size a divisor of E. Returns [..., E] in the dtype of y. Differentiable in
    y, z and weight. Computes in float32 (float64 if y is). Raises ValueError for a wrong shape, dtype, device or size.

    Where a group is spread over processes, y holds a part of one group: E divides group_size, and `sum_parts` returns
    the sum over those processes of a tensor [T] (outside autograd; called once in the forward and once in the backward).
    """
    sizes: Sizes = {}
    check_tensors("gated_norm", sizes, y=(y, "... E"), z=(z, "... E"), weight=(weight, "E"))
    check_group_size("gated_norm", sizes["E"], group_size, spread=sum_parts is not None)
    if use_fused(y):
        from mamba_kernels.gated_norm import fused

        return fused.gated_norm(y, z, weight, group_size, eps, sum_parts)
    return reference.gated_norm(y, z, weight, group_size, eps, sum_parts)
