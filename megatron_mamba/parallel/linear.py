"""Column- and row-parallel linear layers as functions on local tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_mamba.parallel import collectives
from megatron_mamba.parallel.context import ParallelContext


def column_parallel(x: Tensor, weights: Sequence[Tensor], context: ParallelContext) -> Tensor:
    """``x @ concat(weights).T``: several projections of one input as one matrix product.

    x: `[..., D]`, the same on every tp rank; weights: `[rows_i, D]`, this rank's rows; returns `[..., sum(rows_i)]`.
    The gradient of x is summed over tp.
    """
    x = collectives.copy(x, context.group("tp"))
    return F.linear(x, weights[0] if len(weights) == 1 else torch.cat(list(weights)))


def row_parallel(x: Tensor, weight: Tensor, context: ParallelContext) -> Tensor:
    """``x @ weight.T`` with the contracted dimension split over tp: one sum over tp.

    x: `[..., e]`; weight: `[D, e]`; returns `[..., D]`, the same on every tp rank.
    """
    return collectives.all_reduce(F.linear(x, weight), context.group("tp"))
