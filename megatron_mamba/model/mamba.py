"""The Mamba (S6) mixer (arXiv 2312.00752 section 3.4, figure 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_kernels import causal_conv1d, causal_conv1d_step, selective_scan, selective_scan_step, swiglu
from megatron_mamba.config import ModelConfig
from megatron_mamba.model import parameters
from megatron_mamba.model.module import RecurrentState, SequenceInfo, TableModule
from megatron_mamba.parallel.context import ParallelContext
from megatron_mamba.parallel.linear import row_parallel, shared_sum, sum_partial
from megatron_mamba.parallel.sequence import sequence_ranks, with_halo


class Mamba(TableModule):
    """``out_proj(scan(conv(x), dt, B, C) * silu(z))``, where dt, B and C are projections of the convolved x.

    B, C and the low-rank dt come from all inner channels, so there is a second reduction a layer, of R + 2N values a token.
    """

    def __init__(self, config: ModelConfig, context: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__(parameters.mamba(config), context, dtype)
        c = config.mamba
        self.parts = [c.dt_rank, c.state_size, c.state_size]
        self.state_size, self.conv_width = c.state_size, c.conv_width

    def forward(self, x_TD: Tensor, info: SequenceInfo, state: RecurrentState | None = None) -> Tensor:
        """x `[T, D]` -> `[T, D]`; with `state`, starts from it and leaves the final one in it."""
        return sum_partial(self.inside(self._mix, self._project(x_TD), info, state), self.context)

    def _mix(self, packed_TC: Tensor, info: SequenceInfo, state: RecurrentState | None) -> Tensor:
        """From the projected `[T, x + z]` to this rank's part of the output's sum, `[T, D]`."""
        x, z = packed_TC.chunk(2, dim=-1)
        x, before = with_halo(x.unflatten(0, (info.batch, info.length)), self.conv_width - 1, info.document_start, self.context)
        x, conv_state = causal_conv1d(
            x,
            self.local("conv_weight"),
            self.local("conv_bias"),
            activation="silu",
            initial_state=state.conv if state else before,
            document_start=info.document_start,
            return_final_state=True,
        )
        dt, B, C = self._select(x)
        y, ssm_state = selective_scan(
            x,
            dt,
            -self.local("A_log").exp(),
            B,
            C,
            D=self.local("D"),
            dt_bias=self.local("dt_bias"),
            dt_softplus=True,
            initial_state=state.ssm if state else None,
            document_start=info.document_start,
            return_final_state=True,
            ranks=sequence_ranks(self.context),
        )
        if state is not None:
            state.conv, state.ssm = conv_state, ssm_state
        return row_parallel(swiglu(z, y.flatten(0, 1)), self.local("out_proj"), self.context)

    def step(self, x_BD: Tensor, info: SequenceInfo, state: RecurrentState) -> Tensor:
        """One token of every row: x `[B, D]` -> `[B, D]`, `state` updated in place."""
        x, z = self._project(x_BD).chunk(2, dim=-1)
        x = causal_conv1d_step(state.conv, x, self.local("conv_weight"), self.local("conv_bias"), activation="silu")
        dt, B, C = self._select(x)
        A, D, dt_bias = -self.local("A_log").exp(), self.local("D"), self.local("dt_bias")
        y = selective_scan_step(state.ssm, x, dt, A, B, C, D=D, dt_bias=dt_bias, dt_softplus=True)
        return sum_partial(row_parallel(swiglu(z, y), self.local("out_proj"), self.context), self.context)

    def new_state(self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> RecurrentState:
        """Zero state for `batch` rows; its size does not depend on `capacity`."""
        channels = self.local_units("D")
        wide = torch.promote_types(dtype, torch.float32)
        return RecurrentState(
            conv=torch.zeros(batch, self.conv_width - 1, channels, device=device, dtype=dtype),
            ssm=torch.zeros(batch, channels, self.state_size, device=device, dtype=wide),
        )

    def _project(self, x: Tensor) -> Tensor:
        return self.project(x, "in_proj_x", "in_proj_z")

    def _select(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dt `[..., e]`, B and C `[..., N]` from the convolved x `[..., e]`."""
        dt_R, B, C = shared_sum(F.linear(x, self.local("x_proj")), self.context).split(self.parts, dim=-1)
        return F.linear(dt_R, self.local("dt_proj")), B, C
