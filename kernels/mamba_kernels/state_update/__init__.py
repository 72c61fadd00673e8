"""One token of each sequence operator, for decoding: the state is updated in place, and autograd records nothing."""

from torch import Tensor

from mamba_kernels.backend import use_fused
from mamba_kernels.common import Sizes, check_choice, check_groups, check_tensors
from mamba_kernels.state_update import reference


def ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """One token of `ssd`: updates state [B, H, P, N] in place and returns y [B, H, P] in the dtype of x.

    Shapes: x [B, H, P]; dt [B, H]; A, D, dt_bias [H]; B, C [B, G, N]. Not differentiable. Computes in float32 (float64
    if x is). Raises ValueError for a wrong shape, dtype or device.
    """
    sizes: Sizes = {}
    check_tensors(
        "ssd_step", sizes, x=(x, "B H P"), state=(state, "B H P N"), dt=(dt, "B H"), A=(A, "H"), B=(B, "B G N"),
        C=(C, "B G N"), D=(D, "H"), dt_bias=(dt_bias, "H"),
    )  # fmt: skip
    check_groups("ssd_step", sizes)
    if use_fused(x):
        from mamba_kernels.state_update import fused

        return fused.ssd_step(state, x, dt, A, B, C, D, dt_bias, dt_softplus)
    return reference.ssd_step(state, x, dt, A, B, C, D, dt_bias, dt_softplus)


def selective_scan_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """One token of `selective_scan`: updates state [B, E, N] in place and returns y [B, E] in the dtype of x.

    Shapes: x, dt [B, E]; A [E, N]; B, C [B, N]; D, dt_bias [E]. Not differentiable. Computes in float32 (float64 if x
    is). Raises ValueError for a wrong shape, dtype or device.
    """
    check_tensors(
        "selective_scan_step", {}, x=(x, "B E"), state=(state, "B E N"), dt=(dt, "B E"), A=(A, "E N"), B=(B, "B N"),
        C=(C, "B N"), D=(D, "E"), dt_bias=(dt_bias, "E"),
    )  # fmt: skip
    if use_fused(x):
        from mamba_kernels.state_update import fused

        return fused.selective_scan_step(state, x, dt, A, B, C, D, dt_bias, dt_softplus)
    return reference.selective_scan_step(state, x, dt, A, B, C, D, dt_bias, dt_softplus)


def causal_conv1d_step(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None
) -> Tensor:
    """One token of `causal_conv1d`: shifts x into state [B, W-1, C] in place and returns y [B, C] in the dtype of x.

    Shapes: x [B, C]; weight [C, W]; bias [C]; activation None or "silu". Not differentiable. Computes in float32
    (float64 if x is). Raises ValueError for a wrong shape, dtype, device or activation.
    """
    check_tensors("causal_conv1d_step", {}, x=(x, "B C"), weight=(weight, "C W"), state=(state, "B W-1 C"), bias=(bias, "C"))
    check_choice("causal_conv1d_step", "activation", activation, (None, "silu"))
    if use_fused(x):
        from mamba_kernels.state_update import fused

        return fused.causal_conv1d_step(state, x, weight, bias, activation == "silu")
    return reference.causal_conv1d_step(state, x, weight, bias, activation == "silu")
