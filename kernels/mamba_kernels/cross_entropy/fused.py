"""Softmax statistics and gradient as Triton kernels: one pass over the logits each, in float32 inside.

Rows of logits [T, v] lie anywhere and are v elements next to each other. Where they begin at multiples of 16 elements, every
access but those of a last, partial block is 16 bytes wide, whatever v is.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamba_kernels.backend import Meta, Tunable, launch, register
from mamba_kernels.common import cdiv, unit_stride

PACK = tl.constexpr(8)  # Elements that a thread loads at once and folds into one maximum and one sum.
SCALING_PROGRAMS = 1024
"""As many as fill any GPU, and few enough that they end at once where there is nothing to scale."""


def _candidates(*shapes: tuple[int, int]) -> list[Meta]:
    return [{"BLOCK": block, "num_warps": warps} for block, warps in shapes]


STATISTICS = Tunable(
    "softmax_statistics",
    lambda dtype: _candidates((4096, 8), (8192, 16), (16384, 16), (4096, 4), (8192, 8)),
)
GRADIENT = Tunable("softmax_gradient", lambda dtype: _candidates((2048, 4), (1024, 4), (1024, 2), (4096, 8), (4096, 4), (8192, 8)))
SCALING = Tunable("scaling", lambda dtype: _candidates((8192, 4), (8192, 8), (4096, 4)))


@triton.jit
def _exp_below(x, largest):
    """exp(x - largest), 0 where both are -inf."""
    return tl.exp(x - tl.where(largest == float("-inf"), 0.0, largest))


@triton.jit
def _fold(largest, total, x):
    """Take x [n, PACK] into the running maximum and sum of exp(x - maximum), [n] each: each sum is rescaled once a row of x."""
    higher = tl.maximum(largest, tl.max(x, 1))
    return higher, total * _exp_below(largest, higher) + tl.sum(_exp_below(x, higher[:, None]), 1)


@triton.jit
def _statistics_kernel(
    logits_ptr, targets_ptr, largest_ptr, total_ptr, target_logit_ptr, v, vocab_start, s_logits, s_targets,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * s_logits
    offsets = tl.arange(0, BLOCK // PACK)[:, None] * PACK + tl.arange(0, PACK)[None, :]
    largest = tl.full([BLOCK // PACK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK // PACK], tl.float32)
    whole = v // BLOCK * BLOCK
    for begin in range(0, whole, BLOCK):
        largest, total = _fold(largest, total, tl.load(row_ptr + begin + offsets).to(tl.float32))
    if whole < v:
        # Apart, because masks of elements make loads of elements.
        columns = whole + offsets
        x = tl.load(row_ptr + columns, mask=columns < v, other=float("-inf")).to(tl.float32)
        largest, total = _fold(largest, total, x)
    row_largest = tl.max(largest, 0)
    tl.store(largest_ptr + row, row_largest)
    tl.store(total_ptr + row, tl.sum(total * _exp_below(largest, row_largest), 0))
    column = tl.load(targets_ptr + row * s_targets).to(tl.int64) - vocab_start
    inside = (column >= 0) & (column < v)
    target_logit = tl.load(row_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(target_logit_ptr + row, target_logit)


@triton.jit
def _gradient_kernel(
    logits_ptr, targets_ptr, log_sum_exp_ptr, scale_ptr, gradient_ptr, v, vocab_start, s_logits, s_targets, s_log_sum_exp,
    s_scale, s_gradient, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(v, BLOCK)
    row, begin = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BLOCK
    log_sum_exp = tl.load(log_sum_exp_ptr + row * s_log_sum_exp).to(tl.float32)
    scale = tl.load(scale_ptr + row * s_scale).to(tl.float32)
    column = tl.load(targets_ptr + row * s_targets).to(tl.int64) - vocab_start
    here = tl.where((column >= begin) & (column < begin + BLOCK), column - begin, -1).to(tl.int32)
    offsets = tl.arange(0, BLOCK)
    from_ptr, to_ptr = logits_ptr + row * s_logits + begin, gradient_ptr + row * s_gradient + begin
    onehot = tl.where(offsets == here, 1.0, 0.0)
    if begin + BLOCK <= v:
        x = tl.load(from_ptr + offsets).to(tl.float32)
        gradient = scale * (tl.exp(x - log_sum_exp) - onehot)
        tl.store(to_ptr + offsets, gradient.to(gradient_ptr.dtype.element_ty))
    else:
        inside = offsets < v - begin
        x = tl.load(from_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        gradient = scale * (tl.exp(x - log_sum_exp) - onehot)
        tl.store(to_ptr + offsets, gradient.to(gradient_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _scaling_kernel(x_ptr, factor_ptr, elements, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        size = tl.full([], BLOCK, tl.int64)
        for block in range(tl.program_id(0), tl.cdiv(elements, BLOCK), tl.num_programs(0)):
            positions = block * size + tl.arange(0, BLOCK)
            inside = positions < elements
            x = tl.load(x_ptr + positions, mask=inside, other=0.0).to(tl.float32)
            tl.store(x_ptr + positions, (x * factor).to(x_ptr.dtype.element_ty), mask=inside)


def statistics_into(
    logits: Tensor, targets: Tensor, vocab_start: int, largest: Tensor, total: Tensor, target_logit: Tensor
) -> None:
    """Write the statistics of the rows of [T, v], float32 [T] each."""
    logits = unit_stride(logits)
    rows, v = logits.shape
    launch(
        _statistics_kernel, (rows,), logits, targets, largest, total, target_logit, v, vocab_start, logits.stride(0),
        targets.stride(0), **STATISTICS(logits.dtype),
    )  # fmt: skip


def gradient_into(logits: Tensor, targets: Tensor, log_sum_exp: Tensor, scale: Tensor, vocab_start: int, gradient: Tensor) -> None:
    """Write the gradient of logits [T, v] into `gradient` [T, v], which may be the logits themselves."""
    logits = unit_stride(logits)
    rows, v = logits.shape
    meta = GRADIENT(logits.dtype)
    strides = (t.stride(0) for t in (logits, targets, log_sum_exp, scale, gradient))
    grid = (rows * cdiv(v, meta["BLOCK"]),)
    launch(_gradient_kernel, grid, logits, targets, log_sum_exp, scale, gradient, v, vocab_start, *strides, **meta)


def _statistics(logits: Tensor, targets: Tensor, vocab_start: int) -> Tensor:
    statistics = torch.empty(3, logits.shape[0], dtype=torch.float32, device=logits.device)
    statistics_into(logits, targets, vocab_start, *statistics.unbind())
    return statistics


def _gradient(gradient: Tensor, logits: Tensor, targets: Tensor, log_sum_exp: Tensor, scale: Tensor, vocab_start: int) -> None:
    gradient_into(logits, targets, log_sum_exp, scale, vocab_start, gradient)


def _scale(x: Tensor, factor: Tensor) -> None:
    meta = SCALING(x.dtype)
    programs = min(cdiv(x.numel(), meta["BLOCK"]), SCALING_PROGRAMS)
    launch(_scaling_kernel, (programs,), x, factor, x.numel(), **meta)


_softmax_statistics = register(
    "softmax_statistics", "(Tensor logits, Tensor targets, int vocab_start) -> Tensor", _statistics,
    lambda logits, targets, vocab_start: logits.new_empty((3, logits.shape[0]), dtype=torch.float32),
)  # fmt: skip
_softmax_gradient = register(
    "softmax_gradient",
    "(Tensor(a!) gradient, Tensor logits, Tensor targets, Tensor log_sum_exp, Tensor scale, int vocab_start) -> ()",
    _gradient, lambda gradient, logits, targets, log_sum_exp, scale, vocab_start: None,
)  # fmt: skip
_scale_in_place = register("scale_", "(Tensor(a!) x, Tensor factor) -> ()", _scale, lambda x, factor: None)


@torch.no_grad()
def softmax_statistics(logits: Tensor, targets: Tensor, vocab_start: int) -> tuple[Tensor, Tensor, Tensor]:
    """`mamba_kernels.softmax_statistics` on checked arguments."""
    largest, total, target_logit = _softmax_statistics(logits, targets, vocab_start).unbind()
    return largest, total, target_logit


@torch.no_grad()
def softmax_gradient(
    logits: Tensor, targets: Tensor, log_sum_exp: Tensor, scale: Tensor, vocab_start: int, out: Tensor | None
) -> Tensor:
    """`mamba_kernels.softmax_gradient` on checked arguments."""
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if out is None else out
    _softmax_gradient(gradient, logits, targets, log_sum_exp, scale, vocab_start)
    return gradient


@torch.no_grad()
def scale_(x: Tensor, factor: Tensor) -> Tensor:
    """`mamba_kernels.cross_entropy.scale_` on checked arguments."""
    _scale_in_place(x, factor)
    return x
