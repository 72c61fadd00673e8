"""The gated group RMSNorm as Triton kernels: one pass over the tensors each way, in float32 inside.

`g_` before a name is the gradient of the loss with respect to it. Tensors are [T, E] whose rows lie anywhere: z may be a slice
of a projection. A program has one group of channels and loops over rows, with its part of the weight's gradient in registers;
how many there are is part of the configuration, so that the order of a sum depends neither on the device nor on the run.

A group that is spread over processes is one group of E channels here. Its kernels run twice: the first time they write only the
sum a row has here (SUMS), and the second time they take the sums of whole groups.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mamba_kernels.activation.fused import sigmoid
from mamba_kernels.backend import Meta, Tunable, launch, register
from mamba_kernels.common import as_rows, cdiv, next_power_of_2
from mamba_kernels.norm.fused import block_meta, sum_rows_into


def _forward_candidates(dtype: torch.dtype, columns: int, groups: int) -> list[Meta]:
    """For a number of groups of a number of channels, rounded up to a power of two."""
    configurations = ((32768, 1024, 512, 1), (32768, 2048, 1024, 1), (32768, 2048, 512, 1), (32768, 1024, 256, 1))
    return [block_meta(*configuration, dtype, columns) for configuration in configurations]


def _backward_candidates(dtype: torch.dtype, columns: int, groups: int) -> list[Meta]:
    """For a number of groups of a number of channels, rounded up to a power of two: as many programs as run at once."""
    configurations = ((512, 512, 512, 3), (512, 1024, 256, 3), (512, 1024, 256, 2), (1024, 512, 512, 3), (4096, 1024, 256, 1))
    return [
        block_meta(max(programs * 1024 // max(elements, columns), 256) // groups or 1, elements, each, stages, dtype, columns)
        for programs, elements, each, stages in configurations
    ]


FORWARD = Tunable("gated_norm", _forward_candidates)
BACKWARD = Tunable("gated_norm_backward", _backward_candidates)


@triton.jit
def _inverse_rms(gated, squares_ptr, rows, T, SIZE, eps):
    """The factor that normalises rows of a group, from their sums of squares: given, or those of what is here. Past the last row it
    is zero: with eps = 0 it would be infinite, and times zero in the sums over rows."""
    if squares_ptr is not None:
        squares = tl.load(squares_ptr + rows, mask=rows < T, other=0.0)
    else:
        squares = tl.sum(gated * gated, 1, keep_dims=True)
    return tl.where(rows < T, tl.rsqrt(squares / SIZE + eps), 0.0)


@triton.jit
def _gated_norm_kernel(
    y_ptr, z_ptr, weight_ptr, out_ptr, squares_ptr, T, E, LOCAL, SIZE, s_y, s_z, s_out, eps,
    SUMS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    columns, group = tl.arange(0, BLOCK_E)[None, :], tl.program_id(0) * LOCAL
    y_ptr, z_ptr = y_ptr + group, z_ptr + group
    if not SUMS:
        weight = tl.load(weight_ptr + group + columns, mask=columns < LOCAL, other=0.0).to(tl.float32)
    for first in tl.range(tl.program_id(1) * BLOCK_T, T, tl.num_programs(1) * BLOCK_T, num_stages=STAGES):
        rows = (first + tl.arange(0, BLOCK_T))[:, None].to(tl.int64)
        inside = (rows < T) & (columns < LOCAL)
        y = tl.load(y_ptr + rows * s_y + columns, mask=inside, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + rows * s_z + columns, mask=inside, other=0.0).to(tl.float32)
        gated = y * (z * sigmoid(z))
        if SUMS:
            tl.store(squares_ptr + rows, tl.sum(gated * gated, 1, keep_dims=True), mask=rows < T)
        else:
            out = gated * _inverse_rms(gated, squares_ptr, rows, T, SIZE, eps) * weight
            tl.store(out_ptr + group + rows * s_out + columns, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gated_norm_backward_kernel(
    y_ptr, z_ptr, weight_ptr, g_out_ptr, g_y_ptr, g_z_ptr, partials_ptr, squares_ptr, projections_ptr, T, E, LOCAL, SIZE,
    s_y, s_z, s_g_out, s_g_y, s_g_z, eps,
    SUMS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    columns, group = tl.arange(0, BLOCK_E)[None, :], tl.program_id(0) * LOCAL
    y_ptr, z_ptr, g_out_ptr = y_ptr + group, z_ptr + group, g_out_ptr + group
    weight = tl.load(weight_ptr + group + columns, mask=columns < LOCAL, other=0.0).to(tl.float32)
    g_weight = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for first in tl.range(tl.program_id(1) * BLOCK_T, T, tl.num_programs(1) * BLOCK_T, num_stages=STAGES):
        rows = (first + tl.arange(0, BLOCK_T))[:, None].to(tl.int64)
        inside = (rows < T) & (columns < LOCAL)
        y = tl.load(y_ptr + rows * s_y + columns, mask=inside, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + rows * s_z + columns, mask=inside, other=0.0).to(tl.float32)
        g_out = tl.load(g_out_ptr + rows * s_g_out + columns, mask=inside, other=0.0).to(tl.float32)
        gate = sigmoid(z)
        silu = z * gate
        gated = y * silu
        inverse_rms = _inverse_rms(gated, squares_ptr, rows, T, SIZE, eps)
        normed, g_normed = gated * inverse_rms, g_out * weight
        if SUMS:
            tl.store(projections_ptr + rows, tl.sum(g_normed * normed, 1, keep_dims=True), mask=rows < T)
        else:
            if projections_ptr is not None:
                projection = tl.load(projections_ptr + rows, mask=rows < T, other=0.0)
            else:
                projection = tl.sum(g_normed * gated, 1, keep_dims=True) * inverse_rms
            g_weight += g_out * normed
            g_gated = (g_normed - normed * (projection / SIZE)) * inverse_rms
            g_y = (g_gated * silu).to(g_y_ptr.dtype.element_ty)
            tl.store(g_y_ptr + group + rows * s_g_y + columns, g_y, mask=inside)
            g_z = (g_gated * y * (gate + silu * (1.0 - gate))).to(g_z_ptr.dtype.element_ty)
            tl.store(g_z_ptr + group + rows * s_g_z + columns, g_z, mask=inside)
    if not SUMS:
        g_weight_E = tl.sum(g_weight, 0, keep_dims=True)
        tl.store(partials_ptr + tl.program_id(1).to(tl.int64) * E + group + columns, g_weight_E, mask=columns < LOCAL)


def _configured(tunable: Tunable, y: Tensor, group_size: int) -> tuple[tuple[int, int], Meta]:
    """The grid, and what else a launch takes."""
    tokens, channels = y.shape
    local = min(group_size, channels)
    groups, block = channels // max(local, 1), next_power_of_2(local)
    meta = dict(tunable(y.dtype, block, groups))
    programs = min(cdiv(tokens, meta["BLOCK_T"]), meta.pop("PROGRAMS"))
    return (groups, programs), meta | {"BLOCK_E": block}


def forward_into(
    y: Tensor, z: Tensor, weight: Tensor, out: Tensor | None, squares: Tensor | None, group_size: int, eps: float
) -> None:
    """Write the norm of [T, E] into `out` [T, E], with the sums of squares [T] of spread groups where they are given.

    Without `out`, write into them the part of the sums that is here instead.
    """
    grid, meta = _configured(FORWARD, y, group_size)
    strides = (0 if t is None else t.stride(0) for t in (y, z, out))
    launch(
        _gated_norm_kernel, grid, y, z, weight, out, squares, *y.shape, min(group_size, y.shape[1]), group_size, *strides,
        float(eps), SUMS=out is None, **meta,
    )  # fmt: skip


def backward_into(
    y: Tensor, z: Tensor, weight: Tensor, g_out: Tensor, g_y: Tensor | None, g_z: Tensor | None, g_weight: Tensor | None,
    squares: Tensor | None, projections: Tensor | None, group_size: int, eps: float,
) -> None:  # fmt: skip
    """Write the gradients of y and z [T, E] and of weight [E]; spread groups take both their sums [T].

    Without the gradients, write into `projections` the part of the second sum that is here instead.
    """
    grid, meta = _configured(BACKWARD, y, group_size)
    partials = None if g_weight is None else torch.empty(grid[1], y.shape[1], dtype=torch.float32, device=y.device)
    strides = (0 if t is None else t.stride(0) for t in (y, z, g_out, g_y, g_z))
    launch(
        _gated_norm_backward_kernel, grid, y, z, weight, g_out, g_y, g_z, partials, squares, projections,
        *y.shape, min(group_size, y.shape[1]), group_size, *strides, eps, SUMS=g_weight is None, **meta,
    )  # fmt: skip
    if partials is not None and g_weight is not None:
        sum_rows_into(partials, g_weight)


def _like(t: Tensor) -> Tensor:
    return torch.empty(t.shape, dtype=t.dtype, device=t.device)


def _a_row(y: Tensor) -> Tensor:
    """A number for each row of y."""
    return torch.empty(y.shape[:-1].numel(), dtype=torch.float32, device=y.device)


def _forward(y: Tensor, z: Tensor, weight: Tensor, squares: Tensor | None, group_size: int, eps: float) -> Tensor:
    out = _like(y)
    forward_into(as_rows(y), as_rows(z), weight.contiguous(), as_rows(out), squares, group_size, eps)
    return out


def _squares(y: Tensor, z: Tensor, weight: Tensor, group_size: int, eps: float) -> Tensor:
    squares = _a_row(y)
    forward_into(as_rows(y), as_rows(z), weight, None, squares, group_size, eps)
    return squares


def _backward(
    y: Tensor, z: Tensor, weight: Tensor, g_out: Tensor, squares: Tensor | None, projections: Tensor | None,
    group_size: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    g_y, g_z, g_weight = _like(y), _like(z), _like(weight)
    tensors = (as_rows(y), as_rows(z), weight.contiguous(), as_rows(g_out))
    backward_into(*tensors, as_rows(g_y), as_rows(g_z), g_weight, squares, projections, group_size, eps)
    return g_y, g_z, g_weight


def _projections(
    y: Tensor, z: Tensor, weight: Tensor, g_out: Tensor, squares: Tensor, group_size: int, eps: float
) -> Tensor:
    projections = _a_row(y)
    tensors = (as_rows(y), as_rows(z), weight.contiguous(), as_rows(g_out))
    backward_into(*tensors, None, None, None, squares, projections, group_size, eps)
    return projections


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, z, weight, _, ctx.group_size, ctx.eps = inputs
    ctx.save_for_backward(y, z, weight)


def _whole_gradients(ctx: Any, g_out: Tensor) -> tuple[Tensor | None, ...]:
    return *_gradients(*ctx.saved_tensors, g_out, None, None, ctx.group_size, ctx.eps), None, None, None


_own_squares = register(
    "gated_norm_squares", "(Tensor y, Tensor z, Tensor weight, int group_size, float eps) -> Tensor", _squares,
    lambda y, *rest: _a_row(y),
)  # fmt: skip
_own_projections = register(
    "gated_norm_projections",
    "(Tensor y, Tensor z, Tensor weight, Tensor g_out, Tensor squares, int group_size, float eps) -> Tensor", _projections,
    lambda y, *rest: _a_row(y),
)  # fmt: skip
_gradients = register(
    "gated_norm_backward",
    "(Tensor y, Tensor z, Tensor weight, Tensor g_out, Tensor? squares, Tensor? projections, int group_size, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    _backward, lambda y, z, weight, *rest: (_like(y), _like(z), _like(weight)),
)  # fmt: skip
_normed = register(
    "gated_norm", "(Tensor y, Tensor z, Tensor weight, Tensor? squares, int group_size, float eps) -> Tensor",
    _forward, lambda y, *rest: _like(y), setup_context=_save, backward=_whole_gradients,
)  # fmt: skip


class _SpreadGroup(torch.autograd.Function):
    """A part of a group: the sum over the parts is a Python function, which no operator can hold."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, z: Tensor, weight: Tensor, group_size: int, eps: float, sum_parts: Callable[[Tensor], Tensor]
    ) -> Tensor:
        squares = sum_parts(_own_squares(y, z, weight, group_size, eps)).contiguous()
        ctx.save_for_backward(y, z, weight, squares)
        ctx.group_size, ctx.eps, ctx.sum_parts = group_size, eps, sum_parts
        out: Tensor = _normed(y, z, weight, squares, group_size, eps)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_out: Tensor) -> tuple[Tensor | None, ...]:
        y, z, weight, squares = ctx.saved_tensors
        options = ctx.group_size, ctx.eps
        projections = ctx.sum_parts(_own_projections(y, z, weight, g_out, squares, *options)).contiguous()
        return *_gradients(y, z, weight, g_out, squares, projections, *options), None, None, None


def gated_norm(
    y: Tensor, z: Tensor, weight: Tensor, group_size: int, eps: float, sum_parts: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """`mamba_kernels.gated_norm` on checked arguments."""
    if sum_parts is None:
        out: Tensor = _normed(y, z, weight, None, group_size, eps)
        return out
    return _SpreadGroup.apply(y, z, weight, group_size, eps, sum_parts)
