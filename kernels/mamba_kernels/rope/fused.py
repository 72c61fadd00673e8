"""Rotary embedding as Triton kernels: one pass over x each way, and the backward is the rotation by the opposite angles.

`g_` before a name is the gradient of the loss with respect to it. A row is a head of a token; x may be a slice of a projection.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamba_kernels.backend import Meta, Tunable, launch, register
from mamba_kernels.common import cdiv, next_power_of_2, unit_stride


def _candidates(dtype: torch.dtype, half: int) -> list[Meta]:
    """For a number of rotated pairs, rounded up to a power of two."""
    return [
        {"ROWS": max(pairs // half, 1), "num_warps": warps}
        for pairs, warps in ((2048, 4), (1024, 4), (4096, 8), (1024, 2), (2048, 8), (4096, 4), (512, 1))
    ]


ROTATE = Tunable("rope", _candidates)


@triton.jit
def _row(rows, S, H, s_B, s_S, s_H):
    """Where rows of [B, S, H, P] begin."""
    tokens = rows // H
    return (tokens // S).to(tl.int64) * s_B + (tokens % S).to(tl.int64) * s_S + (rows % H).to(tl.int64) * s_H


@triton.jit
def _rope_kernel(
    x_ptr, cos_ptr, sin_ptr, out_ptr, N, S, H, P, HALF, s_x_B, s_x_S, s_x_H, s_out_B, s_out_S, s_out_H,
    s_cos_B, s_cos_S, s_sin_B, s_sin_S,
    BACKWARD: tl.constexpr, ROWS: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    rows, pairs = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_HALF)[None, :]
    x_ptr, out_ptr = x_ptr + _row(rows, S, H, s_x_B, s_x_S, s_x_H), out_ptr + _row(rows, S, H, s_out_B, s_out_S, s_out_H)
    inside = (rows < N) & (pairs < HALF)
    first = tl.load(x_ptr + pairs, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + HALF + pairs, mask=inside, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + _row(rows, S, H, s_cos_B, s_cos_S, 0) + pairs, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + _row(rows, S, H, s_sin_B, s_sin_S, 0) + pairs, mask=inside, other=0.0).to(tl.float32)
    if BACKWARD:
        sin = -sin
    tl.store(out_ptr + pairs, (first * cos - second * sin).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptr + HALF + pairs, (second * cos + first * sin).to(out_ptr.dtype.element_ty), mask=inside)
    if BLOCK_REST > 0:
        rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        inside = (rows < N) & (rest < P)
        tl.store(out_ptr + rest, tl.load(x_ptr + rest, mask=inside, other=0.0).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rope_tables_kernel(
    x_ptr, g_out_ptr, g_cos_ptr, g_sin_ptr, SHARED, S, H, HALF, s_x_B, s_x_S, s_x_H, s_g_B, s_g_S, s_g_H,
    BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """The gradients of one row of contiguous tables, over all its heads, and over SHARED sequences."""
    row, pairs = tl.program_id(0), tl.arange(0, BLOCK_HALF)
    first_batch, token = row // S, (row % S).to(tl.int64)
    g_cos, g_sin = tl.zeros([BLOCK_HALF], tl.float32), tl.zeros([BLOCK_HALF], tl.float32)
    for i in range(SHARED * H):
        batch, head = (first_batch + i // H).to(tl.int64), i % H
        x, g = x_ptr + batch * s_x_B + token * s_x_S + head * s_x_H, g_out_ptr + batch * s_g_B + token * s_g_S + head * s_g_H
        first = tl.load(x + pairs, mask=pairs < HALF, other=0.0).to(tl.float32)
        second = tl.load(x + HALF + pairs, mask=pairs < HALF, other=0.0).to(tl.float32)
        g_first = tl.load(g + pairs, mask=pairs < HALF, other=0.0).to(tl.float32)
        g_second = tl.load(g + HALF + pairs, mask=pairs < HALF, other=0.0).to(tl.float32)
        g_cos += g_first * first + g_second * second
        g_sin += g_second * first - g_first * second
    row = row.to(tl.int64) * HALF
    tl.store(g_cos_ptr + row + pairs, g_cos.to(g_cos_ptr.dtype.element_ty), mask=pairs < HALF)
    tl.store(g_sin_ptr + row + pairs, g_sin.to(g_sin_ptr.dtype.element_ty), mask=pairs < HALF)


def rotate_into(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, backward: bool) -> None:
    """Write x [B, S, H, P] turned by the angles of cos and sin [S, half] or [B, S, half], or turned back, into `out`."""
    (batch, length, heads, dim), half = x.shape, cos.shape[-1]
    rows, block, rest = batch * length * heads, next_power_of_2(half), dim - 2 * half
    meta = ROTATE(x.dtype, block)
    table_strides = (stride for t in (cos, sin) for stride in (0 if t.dim() == 2 else t.stride(0), t.stride(-2)))
    launch(
        _rope_kernel, (cdiv(rows, meta["ROWS"]),), x, cos, sin, out, rows, length, heads, dim, half,
        *x.stride()[:3], *out.stride()[:3], *table_strides,
        BACKWARD=backward, BLOCK_HALF=block, BLOCK_REST=next_power_of_2(rest) if rest else 0, **meta,
    )  # fmt: skip


def tables_into(x: Tensor, g_out: Tensor, g_cos: Tensor, g_sin: Tensor) -> None:
    """Write the gradients of contiguous tables [S, half] or [B, S, half]."""
    batch, length, heads, _ = x.shape
    rows, half = g_cos.numel() // g_cos.shape[-1], g_cos.shape[-1]
    launch(
        _rope_tables_kernel, (rows,), x, g_out, g_cos, g_sin, batch if g_cos.dim() == 2 else 1, length, heads, half,
        *x.stride()[:3], *g_out.stride()[:3], BLOCK_HALF=next_power_of_2(half), num_warps=1,
    )  # fmt: skip


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rotate_into(unit_stride(x), unit_stride(cos), unit_stride(sin), out, backward)
    return out


def _forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _rotated(x, cos, sin, False)


def _backward(g_out: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _rotated(g_out, cos, sin, True)


def _fake(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _tables(x: Tensor, cos: Tensor, sin: Tensor, g_out: Tensor) -> tuple[Tensor, Tensor]:
    g_cos, g_sin = _tables_fake(x, cos, sin, g_out)
    tables_into(unit_stride(x), unit_stride(g_out), g_cos, g_sin)
    return g_cos, g_sin


def _tables_fake(x: Tensor, cos: Tensor, sin: Tensor, g_out: Tensor) -> tuple[Tensor, Tensor]:
    g_cos, g_sin = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (cos, sin))
    return g_cos, g_sin


_gradient = register("rope_backward", "(Tensor g_out, Tensor cos, Tensor sin) -> Tensor", _backward, _fake)
_table_gradients = register(
    "rope_tables_backward", "(Tensor x, Tensor cos, Tensor sin, Tensor g_out) -> (Tensor, Tensor)", _tables, _tables_fake
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, cos, sin = inputs
    ctx.of_tables = cos.requires_grad or sin.requires_grad
    ctx.save_for_backward(x if ctx.of_tables else None, cos, sin)


def _gradients(ctx: Any, g_out: Tensor) -> tuple[Tensor | None, ...]:
    x, cos, sin = ctx.saved_tensors
    g_cos, g_sin = _table_gradients(x, cos, sin, g_out) if ctx.of_tables else (None, None)
    return _gradient(g_out, cos, sin), g_cos, g_sin


rope = register(
    "rope", "(Tensor x, Tensor cos, Tensor sin) -> Tensor", _forward, _fake, setup_context=_save, backward=_gradients
)
"""`mamba_kernels.rope` on checked arguments."""
