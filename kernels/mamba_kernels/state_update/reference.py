"""One-token updates in plain torch."""

import torch
from torch import Tensor
from torch.nn import functional

from mamba_kernels.common import accumulate_dtype, positive_dt


@torch.no_grad()
def ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    """`mamba_kernels.ssd_step` on checked arguments."""
    dtype = accumulate_dtype(x.dtype)
    x_BHP, dt_BH = x.to(dtype), positive_dt(dt, dt_bias, dt_softplus, dtype)
    groups = (B.shape[1], -1)
    decay_BH11 = torch.exp(dt_BH * A.to(dtype))[..., None, None]
    X_BGKP1 = (x_BHP * dt_BH.unsqueeze(-1)).unflatten(1, groups).unsqueeze(-1)
    B_BG11N, C_BG1N1 = B.to(dtype)[:, :, None, None], C.to(dtype)[:, :, None, :, None]
    new_BHPN = torch.addcmul((X_BGKP1 * B_BG11N).flatten(1, 2), decay_BH11, state)
    y_BHP = (new_BHPN.unflatten(1, groups) @ C_BG1N1).squeeze(-1).flatten(1, 2)
    if D is not None:
        y_BHP.addcmul_(x_BHP, D.to(dtype).unsqueeze(-1))
    state.copy_(new_BHPN)
    return y_BHP.to(x.dtype)


@torch.no_grad()
def selective_scan_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    """`mamba_kernels.selective_scan_step` on checked arguments."""
    dtype = accumulate_dtype(x.dtype)
    x_BE, dt_BE = x.to(dtype), positive_dt(dt, dt_bias, dt_softplus, dtype)
    decay_BEN = (dt_BE.unsqueeze(-1) * A.to(dtype)).exp_()
    new_BEN = torch.addcmul((x_BE * dt_BE).unsqueeze(-1) * B.to(dtype).unsqueeze(1), decay_BEN, state)
    y_BE = (new_BEN @ C.to(dtype).unsqueeze(-1)).squeeze(-1)
    if D is not None:
        y_BE.addcmul_(x_BE, D.to(dtype))
    state.copy_(new_BEN)
    return y_BE.to(x.dtype)


@torch.no_grad()
def causal_conv1d_step(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """`mamba_kernels.causal_conv1d_step` on checked arguments."""
    dtype = accumulate_dtype(x.dtype)
    window_BWC = torch.cat([state.to(dtype), x.to(dtype).unsqueeze(1)], 1)
    y_BC = (window_BWC * weight.to(dtype).T).sum(1)
    if bias is not None:
        y_BC += bias
    state.copy_(window_BWC[:, 1:])
    return (functional.silu(y_BC) if silu else y_BC).to(x.dtype)
