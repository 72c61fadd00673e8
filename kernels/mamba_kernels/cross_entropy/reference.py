"""Softmax statistics and gradient in plain torch, some rows at a time: no [T, v] is made beside the result."""

import torch
from torch import Tensor

from mamba_kernels.common import accumulate_dtype, row_blocks


@torch.no_grad()
def softmax_statistics(logits: Tensor, targets: Tensor, vocab_start: int) -> tuple[Tensor, Tensor, Tensor]:
    """`mamba_kernels.softmax_statistics` on checked arguments."""
    dtype = accumulate_dtype(logits.dtype)
    largest = logits.amax(1).to(dtype)
    shift = largest.masked_fill(largest == -torch.inf, 0.0).unsqueeze(1)
    sum_exp = torch.empty_like(largest)
    for rows in row_blocks(logits):
        torch.sum((logits[rows] - shift[rows]).exp_(), 1, out=sum_exp[rows])
    column, inside = _local_targets(logits, targets, vocab_start)
    target_logit = logits.gather(1, column.unsqueeze(1)).squeeze(1).to(dtype)
    return largest, sum_exp, target_logit.masked_fill_(~inside, 0.0)


@torch.no_grad()
def softmax_gradient(
    logits: Tensor, targets: Tensor, log_sum_exp: Tensor, scale: Tensor, vocab_start: int, out: Tensor | None = None
) -> Tensor:
    """`mamba_kernels.softmax_gradient` on checked arguments."""
    dtype = accumulate_dtype(logits.dtype)
    column, inside = _local_targets(logits, targets, vocab_start)
    log_sum_exp, scale = log_sum_exp.to(dtype).unsqueeze(1), scale.to(dtype).unsqueeze(1)
    onehot = inside.to(dtype).neg_().unsqueeze(1)
    gradient = logits.new_empty(logits.shape) if out is None else out
    for rows in row_blocks(logits):
        block = (logits[rows] - log_sum_exp[rows]).exp_()
        block.scatter_add_(1, column[rows].unsqueeze(1), onehot[rows])
        torch.mul(block, scale[rows], out=gradient[rows])
    return gradient


@torch.no_grad()
def scale_(x: Tensor, factor: Tensor) -> Tensor:
    """`mamba_kernels.cross_entropy.scale_` on checked arguments."""
    return x.mul_(factor)


def _local_targets(logits: Tensor, targets: Tensor, vocab_start: int) -> tuple[Tensor, Tensor]:
    """The target's column in this shard, 0 where it has none, and where it has one; both [T]."""
    column = targets.to(torch.int64) - vocab_start
    inside = (column >= 0) & (column < logits.shape[1])
    return column.masked_fill_(~inside, 0), inside
