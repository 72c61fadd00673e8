"""The feed-forward mixer."""

from __future__ import annotations

import torch
from torch import Tensor

from mamba_kernels import gelu, squared_relu, swiglu
from megatron_mamba.config import ModelConfig
from megatron_mamba.model import parameters
from megatron_mamba.model.module import SequenceInfo, TableModule
from megatron_mamba.parallel.context import ParallelContext
from megatron_mamba.parallel.linear import row_parallel, sum_partial


class MLP(TableModule):
    """``down(act(up(x)))``, or ``down(silu(gate(x)) * up(x))`` when gated."""

    def __init__(self, config: ModelConfig, context: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__(parameters.mlp(config), context, dtype)
        self.activation = config.mlp.activation

    def forward(self, x_TD: Tensor, info: SequenceInfo, state: None = None) -> Tensor:
        """x `[T, D]` -> `[T, D]`."""
        names = ["gate_proj", "up_proj"] if self.activation == "swiglu" else ["up_proj"]
        hidden = self.project(x_TD, *names)
        return sum_partial(self.inside(self._mix, hidden), self.context)

    def _mix(self, hidden: Tensor) -> Tensor:
        """From the projected `[T, f]` (`[T, gate + up]`) to this rank's part of the output's sum, `[T, D]`."""
        if self.activation == "swiglu":
            hidden = swiglu(*hidden.chunk(2, dim=-1))
        elif self.activation == "squared_relu":
            hidden = squared_relu(hidden)
        else:
            hidden = gelu(hidden, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        return row_parallel(hidden, self.local("down_proj"), self.context)

    step = forward

    def new_state(self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> None:
        """A feed-forward layer carries nothing from token to token."""
        return None
