"""The feed-forward mixer."""

from __future__ import annotations

import torch
from torch import Tensor

from mamba_kernels import gelu, squared_relu, swiglu
from megatron_mamba.config import ModelConfig
from megatron_mamba.model import parameters
from megatron_mamba.model.module import SequenceInfo, TableModule
from megatron_mamba.parallel.context import ParallelContext
from megatron_mamba.parallel.linear import column_parallel, row_parallel


class MLP(TableModule):
    """``down(act(up(x)))``, or ``down(silu(gate(x)) * up(x))`` when gated."""

    def __init__(self, config: ModelConfig, context: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__(parameters.mlp(config), context, dtype)
        self.activation = config.mlp.activation

    def forward(self, x_TD: Tensor, info: SequenceInfo, state: None = None) -> Tensor:
        """x `[T, D]` -> `[T, D]`."""
        if self.activation == "swiglu":
            weights = [self.local("gate_proj"), self.local("up_proj")]
            hidden = swiglu(*column_parallel(x_TD, weights, self.context).chunk(2, dim=-1))
        else:
            hidden = column_parallel(x_TD, [self.local("up_proj")], self.context)
            if self.activation == "squared_relu":
                hidden = squared_relu(hidden)
            else:
                hidden = gelu(hidden, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        return row_parallel(hidden, self.local("down_proj"), self.context)

    step = forward

    def new_state(self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> None:
        """A feed-forward layer carries nothing from token to token."""
        return None
