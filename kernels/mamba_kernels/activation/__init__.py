"""Activations of the MLP. All are elementwise, keep only their inputs for the backward, and return the input's dtype."""

from torch import Tensor

from mamba_kernels.activation import reference
from mamba_kernels.backend import use_fused
from mamba_kernels.common import check_choice, check_tensors


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202, section 2), for gate and up [..., F]; ValueError for a wrong shape or dtype."""
    check_tensors("swiglu", {}, gate=(gate, "... F"), up=(up, "... F"))
    if use_fused(gate):
        from mamba_kernels.activation import fused

        return fused.swiglu(gate, up)
    return reference.swiglu(gate, up)


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2 (arXiv 2109.08668, section 3), for x [..., F]; ValueError if x is not floating-point."""
    check_tensors("squared_relu", {}, x=(x, "... F"))
    if use_fused(x):
        from mamba_kernels.activation import fused

        return fused.squared_relu(x)
    return reference.squared_relu(x)


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """GELU (arXiv 1606.08415, section 2) for x [..., F], exact or by the "tanh" approximation.

    Raises ValueError if x is not floating-point, or `approximate` neither "none" nor "tanh".
    """
    check_tensors("gelu", {}, x=(x, "... F"))
    check_choice("gelu", "approximate", approximate, ("none", "tanh"))
    if use_fused(x):
        from mamba_kernels.activation import fused

        return fused.gelu(x, approximate)
    return reference.gelu(x, approximate)
