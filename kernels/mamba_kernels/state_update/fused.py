"""One-token updates as one Triton kernel each: the state is read once and written once, in place.

Tensors may have any strides: inputs are slices of projections, the state may be a slot of a larger cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamba_kernels.activation.fused import sigmoid, softplus
from mamba_kernels.backend import Meta, Tunable, launch, register
from mamba_kernels.common import cdiv, next_power_of_2


def _tiles(*shapes: tuple[int, int]) -> list[Meta]:
    return [{"ROWS": rows, "num_warps": warps} for rows, warps in shapes]


SSD = Tunable("ssd_step", lambda state_size: _tiles((64, 8), (32, 8), (16, 2), (16, 4), (8, 2)))
SCAN = Tunable(
    "selective_scan_step",
    lambda state_size: (
        _tiles((16, 8), (16, 4), (8, 2), (32, 8)) if state_size > 32 else _tiles((64, 4), (32, 4), (64, 8), (128, 8), (32, 2))
    ),
)
CONV = Tunable("causal_conv1d_step", lambda dtype: _tiles((256, 4), (128, 4), (512, 4), (128, 1)))


@triton.jit
def _ssd_step_kernel(
    state_ptr, x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, y_ptr, P, N, heads_per_group,
    s_state_B, s_state_H, s_state_P, s_state_N, s_x_B, s_x_H, s_x_P, s_dt_B, s_dt_H, s_B_B, s_B_G, s_B_N,
    s_C_B, s_C_G, s_C_N, s_A, s_D, s_bias, s_y_B, s_y_H,
    SOFTPLUS: tl.constexpr, STATE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, STATE)
    in_rows, in_columns = rows < P, columns < N
    inside = in_rows[:, None] & in_columns[None, :]
    state_ptr += batch * s_state_B + head * s_state_H + rows[:, None] * s_state_P + columns[None, :] * s_state_N
    state = tl.load(state_ptr, mask=inside, other=0.0).to(tl.float32)
    group = head // heads_per_group
    B = tl.load(B_ptr + batch * s_B_B + group * s_B_G + columns * s_B_N, mask=in_columns, other=0.0).to(tl.float32)
    C = tl.load(C_ptr + batch * s_C_B + group * s_C_G + columns * s_C_N, mask=in_columns, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + batch * s_x_B + head * s_x_H + rows * s_x_P, mask=in_rows, other=0.0).to(tl.float32)
    dt = tl.load(dt_ptr + batch * s_dt_B + head * s_dt_H).to(tl.float32)
    if bias_ptr is not None:
        dt += tl.load(bias_ptr + head * s_bias).to(tl.float32)
    if SOFTPLUS:
        dt = softplus(dt)
    decay = tl.exp(dt * tl.load(A_ptr + head * s_A).to(tl.float32))
    state = state * decay + (x * dt)[:, None] * B[None, :]
    tl.store(state_ptr, state.to(state_ptr.dtype.element_ty), mask=inside)
    y = tl.sum(state * C[None, :], 1)
    if D_ptr is not None:
        y += x * tl.load(D_ptr + head * s_D).to(tl.float32)
    tl.store(y_ptr + batch * s_y_B + head * s_y_H + rows, y.to(y_ptr.dtype.element_ty), mask=in_rows)


@triton.jit
def _scan_step_kernel(
    state_ptr, x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, y_ptr, E, N,
    s_state_B, s_state_E, s_state_N, s_x_B, s_x_E, s_dt_B, s_dt_E, s_A_E, s_A_N, s_B_B, s_B_N, s_C_B, s_C_N, s_D,
    s_bias, s_y_B,
    SOFTPLUS: tl.constexpr, STATE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, STATE)
    in_rows, in_columns = rows < E, columns < N
    inside = in_rows[:, None] & in_columns[None, :]
    state_ptr += batch * s_state_B + rows[:, None].to(tl.int64) * s_state_E + columns[None, :] * s_state_N
    state = tl.load(state_ptr, mask=inside, other=0.0).to(tl.float32)
    A = tl.load(A_ptr + rows[:, None].to(tl.int64) * s_A_E + columns[None, :] * s_A_N, mask=inside, other=0.0).to(tl.float32)
    B = tl.load(B_ptr + batch * s_B_B + columns * s_B_N, mask=in_columns, other=0.0).to(tl.float32)
    C = tl.load(C_ptr + batch * s_C_B + columns * s_C_N, mask=in_columns, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + batch * s_x_B + rows * s_x_E, mask=in_rows, other=0.0).to(tl.float32)
    dt = tl.load(dt_ptr + batch * s_dt_B + rows * s_dt_E, mask=in_rows, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        dt += tl.load(bias_ptr + rows * s_bias, mask=in_rows, other=0.0).to(tl.float32)
    if SOFTPLUS:
        dt = softplus(dt)
    state = state * tl.exp(dt[:, None] * A) + (x * dt)[:, None] * B[None, :]
    tl.store(state_ptr, state.to(state_ptr.dtype.element_ty), mask=inside)
    y = tl.sum(state * C[None, :], 1)
    if D_ptr is not None:
        y += x * tl.load(D_ptr + rows * s_D, mask=in_rows, other=0.0).to(tl.float32)
    tl.store(y_ptr + batch * s_y_B + rows, y.to(y_ptr.dtype.element_ty), mask=in_rows)


@triton.jit
def _conv_step_kernel(
    state_ptr, x_ptr, weight_ptr, bias_ptr, y_ptr, channels,
    s_state_B, s_state_W, s_state_C, s_x_B, s_x_C, s_weight_C, s_weight_W, s_bias, s_y_B,
    SILU: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    batch, rows = tl.program_id(1).to(tl.int64), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < channels
    state_ptr += batch * s_state_B + rows * s_state_C
    weight_ptr += rows * s_weight_C
    x = tl.load(x_ptr + batch * s_x_B + rows * s_x_C, mask=inside, other=0.0)
    y = x.to(tl.float32) * tl.load(weight_ptr + (W - 1) * s_weight_W, mask=inside, other=0.0).to(tl.float32)
    for w in tl.static_range(W - 1):
        # Oldest first: an input is read before the next one takes its place.
        kept = tl.load(state_ptr + w * s_state_W, mask=inside, other=0.0)
        y += kept.to(tl.float32) * tl.load(weight_ptr + w * s_weight_W, mask=inside, other=0.0).to(tl.float32)
        if w > 0:
            tl.store(state_ptr + (w - 1) * s_state_W, kept, mask=inside)
    if W > 1:
        tl.store(state_ptr + (W - 2) * s_state_W, x.to(state_ptr.dtype.element_ty), mask=inside)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + rows * s_bias, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        y *= sigmoid(y)
    tl.store(y_ptr + batch * s_y_B + rows, y.to(y_ptr.dtype.element_ty), mask=inside)


def _stride(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


def _ssd_step(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensor:  # fmt: skip
    batch, heads, P, N = state.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    meta = SSD(N)
    launch(
        _ssd_step_kernel, (cdiv(P, meta["ROWS"]), heads, batch), state, x, dt, A, B, C, D, dt_bias, y, P, N,
        heads // B.shape[1], *state.stride(), *x.stride(), *dt.stride(), *B.stride(), *C.stride(), A.stride(0),
        _stride(D), _stride(dt_bias), *y.stride()[:2],
        SOFTPLUS=dt_softplus, STATE=next_power_of_2(N), **meta,
    )  # fmt: skip
    return y


def _selective_scan_step(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensor:  # fmt: skip
    batch, channels, N = state.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    meta = SCAN(N)
    launch(
        _scan_step_kernel, (cdiv(channels, meta["ROWS"]), batch), state, x, dt, A, B, C, D, dt_bias, y, channels, N,
        *state.stride(), *x.stride(), *dt.stride(), *A.stride(), *B.stride(), *C.stride(), _stride(D),
        _stride(dt_bias), y.stride(0),
        SOFTPLUS=dt_softplus, STATE=next_power_of_2(N), **meta,
    )  # fmt: skip
    return y


def _causal_conv1d_step(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    batch, channels = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    meta = CONV(x.dtype)
    launch(
        _conv_step_kernel, (cdiv(channels, meta["ROWS"]), batch), state, x, weight, bias, y, channels,
        *state.stride(), *x.stride(), *weight.stride(), _stride(bias), y.stride(0), SILU=silu, W=weight.shape[1], **meta,
    )  # fmt: skip
    return y


def _like_x(state: Tensor, x: Tensor, *rest: object) -> Tensor:
    return x.new_empty(x.shape)


_SCAN = (
    "(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, bool dt_softplus) -> Tensor"
)
_CONV = "(Tensor(a!) state, Tensor x, Tensor weight, Tensor? bias, bool silu) -> Tensor"
# Operators without a gradient would pass on that their inputs want one.
ssd_step = torch.no_grad()(register("ssd_step", _SCAN, _ssd_step, _like_x))
selective_scan_step = torch.no_grad()(register("selective_scan_step", _SCAN, _selective_scan_step, _like_x))
causal_conv1d_step = torch.no_grad()(register("causal_conv1d_step", _CONV, _causal_conv1d_step, _like_x))
