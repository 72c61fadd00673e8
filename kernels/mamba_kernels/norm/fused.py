"""RMSNorm and LayerNorm, with the residual addition before them, as Triton kernels: one pass over the rows each way.

`g_` before a name is the gradient of the loss with respect to it. Tensors are [T, D] whose rows lie anywhere. The backward
computes the factor of each row again: its sums go with those that the gradient takes anyway, and nothing but h is kept.

Programs loop over rows and keep the weight, and their part of its gradient, in registers. How many there are is part of the
configuration, so that the order of a sum depends neither on the device nor on the run.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamba_kernels.backend import Meta, Tunable, launch, register
from mamba_kernels.common import as_rows, cdiv, contiguous, next_power_of_2


def block_meta(
    programs: int, elements: int, elements_a_warp: int, stages: int, dtype: torch.dtype, columns: int
) -> Meta:
    """Of programs that loop over blocks of so many elements, rows of `columns`, with up to so many stages of three tensors.

    Stages but the last take shared memory, of which sm_80 has the least.
    """
    elements = max(elements, columns)
    fitting = 1 + 98304 // (elements * 3 * dtype.itemsize)
    warps = min(max(elements // elements_a_warp, 1), 32)
    return {"PROGRAMS": programs, "BLOCK_T": elements // columns, "STAGES": min(stages, fitting), "num_warps": warps}


def _forward_candidates(dtype: torch.dtype, columns: int, layer: bool) -> list[Meta]:
    """For rows of a number of columns, rounded up to a power of two. A LayerNorm has one sum after the other, and two vectors to
    read, which programs that loop over rows read once."""
    configurations = [(32768, 4096, 1024, 1), (32768, 8192, 1024, 1), (32768, 4096, 512, 1), (396, 4096, 512, 3)]
    configurations += [(programs, 4096, 512, stages) for programs in (792, 1056) for stages in (2, 3)] if layer else []
    return [block_meta(*configuration, dtype, columns) for configuration in configurations]


def _backward_candidates(dtype: torch.dtype, columns: int, layer: bool) -> list[Meta]:
    """For rows of a number of columns, rounded up to a power of two."""
    configurations = ((256, 4096, 512, 3), (512, 2048, 512, 3), (256, 4096, 512, 2), (256, 4096, 256, 3), (512, 2048, 256, 2))
    return [block_meta(*configuration, dtype, columns) for configuration in configurations]


FORWARD = Tunable("norm", _forward_candidates)
BACKWARD = Tunable("norm_backward", _backward_candidates)


@triton.jit
def _weight(weight_ptr, columns, D, ONE_PLUS: tl.constexpr):
    weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    return 1.0 + weight if ONE_PLUS else weight


@triton.jit
def _norm_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, out_ptr, h_ptr, T, D, s_x, s_residual, s_out, s_h, eps,
    LAYER: tl.constexpr, ONE_PLUS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK_D)
    weight = _weight(weight_ptr, columns, D, ONE_PLUS)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    for first in tl.range(tl.program_id(0) * BLOCK_T, T, tl.num_programs(0) * BLOCK_T, num_stages=STAGES):
        rows = (first + tl.arange(0, BLOCK_T))[:, None].to(tl.int64)
        inside = (rows < T) & (columns < D)[None, :]
        h = tl.load(x_ptr + rows * s_x + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        if residual_ptr is not None:
            h += tl.load(residual_ptr + rows * s_residual + columns[None, :], mask=inside, other=0.0).to(tl.float32)
            rounded = h.to(h_ptr.dtype.element_ty)
            tl.store(h_ptr + rows * s_h + columns[None, :], rounded, mask=inside)
            h = rounded.to(tl.float32)
        if LAYER:
            h = tl.where(inside, h - tl.sum(h, 1, keep_dims=True) / D, 0.0)
        out = h * tl.rsqrt(tl.sum(h * h, 1, keep_dims=True) / D + eps) * weight[None, :]
        if bias_ptr is not None:
            out += bias[None, :]
        tl.store(out_ptr + rows * s_out + columns[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _norm_backward_kernel(
    h_ptr, weight_ptr, g_out_ptr, g_h_ptr, g_x_ptr, g_residual_ptr, partials_ptr, T, D,
    s_h, s_g_out, s_g_h, s_g_x, s_g_residual, eps,
    LAYER: tl.constexpr, ONE_PLUS: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK_D)
    weight = _weight(weight_ptr, columns, D, ONE_PLUS)
    g_weight = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    g_bias = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for first in tl.range(tl.program_id(0) * BLOCK_T, T, tl.num_programs(0) * BLOCK_T, num_stages=STAGES):
        rows = (first + tl.arange(0, BLOCK_T))[:, None].to(tl.int64)
        inside = (rows < T) & (columns < D)[None, :]
        h = tl.load(h_ptr + rows * s_h + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        g_out = tl.load(g_out_ptr + rows * s_g_out + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        g_normed = g_out * weight[None, :]
        if LAYER:
            # What goes to the mean of h: with it taken out of both, the rest is as for RMSNorm.
            g_mean = tl.sum(g_normed, 1, keep_dims=True) / D
            h = tl.where(inside, h - tl.sum(h, 1, keep_dims=True) / D, 0.0)
        # Of rows past the last with eps = 0, infinite: times zero it would be in the sums over rows.
        inverse_rms = tl.where(rows < T, tl.rsqrt(tl.sum(h * h, 1, keep_dims=True) / D + eps), 0.0)
        projection = tl.sum(g_normed * h, 1, keep_dims=True) / D * inverse_rms
        normed = h * inverse_rms
        g_weight += g_out * normed
        g_normed -= normed * projection
        if LAYER:
            g_normed -= g_mean
        g = g_normed * inverse_rms
        if BIAS:
            g_bias += g_out
        if g_h_ptr is not None:
            g += tl.load(g_h_ptr + rows * s_g_h + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(g_x_ptr + rows * s_g_x + columns[None, :], g.to(g_x_ptr.dtype.element_ty), mask=inside)
        if g_residual_ptr is not None:
            g = g.to(g_residual_ptr.dtype.element_ty)
            tl.store(g_residual_ptr + rows * s_g_residual + columns[None, :], g, mask=inside)
    partials_ptr += tl.program_id(0).to(tl.int64) * (2 * D if BIAS else D)
    tl.store(partials_ptr + columns, tl.sum(g_weight, 0), mask=columns < D)
    if BIAS:
        tl.store(partials_ptr + D + columns, tl.sum(g_bias, 0), mask=columns < D)


@triton.jit
def _sum_rows_kernel(
    partials_ptr, first_ptr, second_ptr, R, N_FIRST, N, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr
):
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    for start in range(0, R, BLOCK_R):
        rows = (start + tl.arange(0, BLOCK_R))[:, None]
        inside = (rows < R) & (columns < N)[None, :]
        total += tl.load(partials_ptr + rows.to(tl.int64) * N + columns[None, :], mask=inside, other=0.0)
    sums = tl.sum(total, 0)
    tl.store(first_ptr + columns, sums.to(first_ptr.dtype.element_ty), mask=columns < N_FIRST)
    if second_ptr is not None:
        is_second = (columns >= N_FIRST) & (columns < N)
        tl.store(second_ptr + (columns - N_FIRST), sums.to(second_ptr.dtype.element_ty), mask=is_second)


def sum_rows_into(partials_RN: Tensor, first: Tensor, second: Tensor | None = None) -> None:
    """Write the sums over the rows of a contiguous float32 [R, N], in fixed order, into `first` and then `second`.

    Together they have N elements, are contiguous, and of any dtype: the weight gradients whose parts the rows are.
    """
    rows, columns = partials_RN.shape
    meta = {"BLOCK_R": 128, "BLOCK_N": 32, "num_warps": 4} if rows > 64 else {"BLOCK_R": 32, "BLOCK_N": 128, "num_warps": 4}
    grid = (cdiv(columns, meta["BLOCK_N"]),)
    launch(_sum_rows_kernel, grid, partials_RN, first, second, rows, first.numel(), columns, **meta)


def _row_stride(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


def forward_into(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, out: Tensor, h: Tensor | None, eps: float,
    layer: bool, one_plus: bool,
) -> None:  # fmt: skip
    """Write the norm of [T, D] into `out` [T, D], and with `residual` the sum into `h` [T, D]."""
    (tokens, columns), block = x.shape, next_power_of_2(x.shape[1])
    meta = FORWARD(x.dtype, block, layer)
    launch(
        _norm_kernel, (min(cdiv(tokens, meta["BLOCK_T"]), meta["PROGRAMS"]),),
        x, residual, weight, bias, out, h, tokens, columns, *(_row_stride(t) for t in (x, residual, out, h)), float(eps),
        LAYER=layer, ONE_PLUS=one_plus, BLOCK_D=block, **_without_programs(meta),
    )  # fmt: skip


def backward_into(
    h: Tensor, weight: Tensor, g_out: Tensor, g_h: Tensor | None, g_x: Tensor, g_residual: Tensor | None,
    g_weight: Tensor, g_bias: Tensor | None, eps: float, layer: bool, one_plus: bool,
) -> None:  # fmt: skip
    """Write the gradients of x [T, D], of the residual [T, D] where it is not the same, and of weight and bias [D].

    `h` is what was normalised, `g_h` the gradient it has from elsewhere.
    """
    (tokens, columns), block = h.shape, next_power_of_2(h.shape[1])
    meta = BACKWARD(h.dtype, block, layer)
    programs = min(cdiv(tokens, meta["BLOCK_T"]), meta["PROGRAMS"])
    partials = torch.empty(programs, columns * (1 if g_bias is None else 2), dtype=torch.float32, device=h.device)
    launch(
        _norm_backward_kernel, (programs,), h, weight, g_out, g_h, g_x, g_residual, partials, tokens, columns,
        *(_row_stride(t) for t in (h, g_out, g_h, g_x, g_residual)), float(eps),
        LAYER=layer, ONE_PLUS=one_plus, BIAS=g_bias is not None, BLOCK_D=block, **_without_programs(meta),
    )  # fmt: skip
    sum_rows_into(partials, g_weight, g_bias)


def _without_programs(meta: Meta) -> Meta:
    return {name: value for name, value in meta.items() if name != "PROGRAMS"}


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, layer: bool, one_plus: bool) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    forward_into(as_rows(x), None, weight.contiguous(), contiguous(bias), as_rows(out), None, eps, layer, one_plus)
    return out


def _add_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, layer: bool, one_plus: bool
) -> tuple[Tensor, Tensor]:
    out, h = _add_norm_fake(x, residual)
    into = (as_rows(out), as_rows(h))
    forward_into(as_rows(x), as_rows(residual), weight.contiguous(), contiguous(bias), *into, eps, layer, one_plus)
    return out, h


def _add_norm_fake(x: Tensor, residual: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, residual.dtype)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty(x.shape, dtype=wide, device=x.device)


def _backward(
    h: Tensor, weight: Tensor, bias: Tensor | None, g_out: Tensor, g_h: Tensor | None, eps: float, layer: bool,
    one_plus: bool, x_dtype: torch.dtype, residual_dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    """The gradients of x, weight, bias if there is one, and the residual if its dtype is not that of x."""
    gradients = _backward_fake(h, weight, bias, g_out, g_h, eps, layer, one_plus, x_dtype, residual_dtype)
    g_x, g_weight = gradients[:2]
    g_bias = None if bias is None else gradients[2]
    g_residual = None if x_dtype == residual_dtype else as_rows(gradients[-1])
    g_h = None if g_h is None else as_rows(g_h)
    backward_into(
        as_rows(h), weight.contiguous(), as_rows(g_out), g_h, as_rows(g_x), g_residual, g_weight, g_bias, eps, layer, one_plus
    )
    return gradients


def _backward_fake(
    h: Tensor, weight: Tensor, bias: Tensor | None, g_out: Tensor, g_h: Tensor | None, eps: float, layer: bool,
    one_plus: bool, x_dtype: torch.dtype, residual_dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    gradients = [torch.empty(h.shape, dtype=x_dtype, device=h.device)]
    gradients += [torch.empty(t.shape, dtype=t.dtype, device=h.device) for t in (weight, bias) if t is not None]
    if x_dtype != residual_dtype:
        gradients.append(torch.empty(h.shape, dtype=residual_dtype, device=h.device))
    return gradients


_gradients = register(
    "norm_backward",
    "(Tensor h, Tensor weight, Tensor? bias, Tensor g_out, Tensor? g_h, float eps, bool layer, bool one_plus,"
    " ScalarType x_dtype, ScalarType residual_dtype) -> Tensor[]",
    _backward, _backward_fake,
)  # fmt: skip


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, *ctx.options = inputs
    ctx.save_for_backward(x, weight, bias)


def _norm_gradients(ctx: Any, g_out: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    g_x, g_weight, *g_bias = _gradients(x, weight, bias, g_out, None, *ctx.options, x.dtype, x.dtype)
    return g_x, g_weight, g_bias[0] if g_bias else None, None, None, None


def _save_add_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, residual, weight, bias, *ctx.options = inputs
    ctx.dtypes = x.dtype, residual.dtype
    ctx.save_for_backward(output[1], weight, bias)
    ctx.set_materialize_grads(False)


def _add_norm_gradients(ctx: Any, g_out: Tensor | None, g_h: Tensor | None) -> tuple[Tensor | None, ...]:
    h, weight, bias = ctx.saved_tensors
    if g_out is None:
        g_x, g_residual = (None if g_h is None else g_h.to(dtype) for dtype in ctx.dtypes)
        return g_x, g_residual, *[None] * 5
    gradients = _gradients(h, weight, bias, g_out, g_h, *ctx.options, *ctx.dtypes)
    g_residual = gradients[0] if ctx.dtypes[0] == ctx.dtypes[1] else gradients[-1]
    return gradients[0], g_residual, gradients[1], None if bias is None else gradients[2], None, None, None


norm = register(
    "norm", "(Tensor x, Tensor weight, Tensor? bias, float eps, bool layer, bool one_plus) -> Tensor", _norm,
    lambda x, *arguments: torch.empty(x.shape, dtype=x.dtype, device=x.device),
    setup_context=_save_norm, backward=_norm_gradients,
)  # fmt: skip
"""RMSNorm, or LayerNorm if `layer`, of x; the factor is 1 + weight if `one_plus`."""

add_norm = register(
    "add_norm",
    "(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps, bool layer, bool one_plus) -> (Tensor, Tensor)",
    _add_norm, _add_norm_fake, setup_context=_save_add_norm, backward=_add_norm_gradients,
)  # fmt: skip
"""The norm of x + residual, and the sum."""
