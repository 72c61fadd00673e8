"""Normalisation over the hidden size: RMSNorm, LayerNorm, LayerNorm-1p."""

from __future__ import annotations

import torch
from torch import Tensor

from mamba_kernels import layer_norm, rms_norm
from megatron_mamba.config import ModelConfig
from megatron_mamba.model import parameters
from megatron_mamba.model.module import TableModule
from megatron_mamba.parallel.context import ParallelContext


class Norm(TableModule):
    """``weight * normalise(x) (+ bias)`` over D, in fp32, for x `[T, D]`."""

    def __init__(self, config: ModelConfig, context: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__(parameters.norm(config), context, dtype)
        self.kind, self.eps = config.norm, config.norm_eps

    def forward(self, x_TD: Tensor) -> Tensor:
        weight = self.local("weight")
        if self.kind == "rmsnorm":
            normed = rms_norm(x_TD, weight, eps=self.eps)
        else:
            normed = layer_norm(x_TD, weight, self.local("bias"), eps=self.eps, zero_centered=self.kind == "layernorm1p")
        assert isinstance(normed, Tensor)
        return normed
