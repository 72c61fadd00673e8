"""The Mamba-2 mixer (arXiv 2405.21060 section 7, figure 6)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from mamba_kernels import causal_conv1d_step, gated_norm, mamba2_mixer, ssd_step
from megatron_mamba.config import ModelConfig
from megatron_mamba.model import parameters
from megatron_mamba.model.module import RecurrentState, SequenceInfo, TableModule
from megatron_mamba.parallel.context import ParallelContext
from megatron_mamba.parallel.linear import group_sum, row_parallel, sum_partial
from megatron_mamba.parallel.sequence import sequence_ranks, with_halo


class Mamba2(TableModule):
    """``out_proj(group_norm(SSD(conv(x, B, C), dt) * silu(z)))``; z, x, B, C and dt are projections of the input.

    Everything between the two projections is local to the heads of this rank: one reduction a layer. Where ranks share a
    group (tp > n_groups) they hold the same B and C, and sum one number a token for its norm.
    """

    def __init__(self, config: ModelConfig, context: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__(parameters.mamba2(config), context, dtype)
        c = config.mamba2
        self.head_dim, self.state_size, self.conv_width, self.eps = c.head_dim, c.state_size, c.conv_width, config.norm_eps
        self.group_size = c.group_size
        heads, groups = self.local_units("A_log"), self.local_units("in_proj_B")
        self.inner, self.group_channels = heads * c.head_dim, groups * c.state_size
        self.heads = heads
        # With fewer groups than ranks, a rank holds a part of one group.
        self.sum_parts = partial(group_sum, groups=c.n_groups, context=context) if self.inner < self.group_size else None

    def forward(self, x_TD: Tensor, info: SequenceInfo, state: RecurrentState | None = None) -> Tensor:
        """x `[T, D]` -> `[T, D]`; with `state`, starts from it and leaves the final one in it."""
        return sum_partial(self.inside(self._mix, self._project(x_TD), info, state), self.context)

    def _mix(self, packed_TC: Tensor, info: SequenceInfo, state: RecurrentState | None) -> Tensor:
        """From the projected `[T, z + x + B + C + dt]` to this rank's part of the output's sum, `[T, D]`."""
        channels = slice(self.inner, 2 * self.inner + 2 * self.group_channels)
        packed, width = packed_TC.unflatten(0, (info.batch, info.length)), self.conv_width - 1
        packed, before = with_halo(packed, width, info.document_start, self.context, channels)
        out, conv_state, ssm_state = mamba2_mixer(
            packed,
            *self._conv(),
            -self.local("A_log").exp(),
            self.local("D"),
            self.local("dt_bias"),
            self.local("norm_weight"),
            state_size=self.state_size,
            group_size=self.group_size,
            eps=self.eps,
            conv_state=state.conv if state else before,
            ssm_state=state.ssm if state else None,
            document_start=info.document_start,
            ranks=sequence_ranks(self.context),
            sum_parts=self.sum_parts,
        )
        if state is not None:
            state.conv, state.ssm = conv_state, ssm_state
        return row_parallel(out.flatten(0, 1), self.local("out_proj"), self.context)

    def step(self, x_BD: Tensor, info: SequenceInfo, state: RecurrentState) -> Tensor:
        """One token of every row: x `[B, D]` -> `[B, D]`, `state` updated in place."""
        z, conv_in, dt = self._project(x_BD).split([self.inner, self.inner + 2 * self.group_channels, self.heads], dim=-1)
        convolved = causal_conv1d_step(state.conv, conv_in, *self._conv(), activation="silu")
        x, B, C = convolved.split([self.inner, self.group_channels, self.group_channels], dim=-1)
        x, B, C = x.unflatten(-1, (-1, self.head_dim)), *(t.unflatten(-1, (-1, self.state_size)) for t in (B, C))
        A, D, dt_bias = -self.local("A_log").exp(), self.local("D"), self.local("dt_bias")
        y = ssd_step(state.ssm, x, dt, A, B, C, D=D, dt_bias=dt_bias, dt_softplus=True)
        norm_weight, sum_parts = self.local("norm_weight"), self.sum_parts
        y = gated_norm(y.flatten(-2), z, norm_weight, group_size=self.group_size, eps=self.eps, sum_parts=sum_parts)
        return sum_partial(row_parallel(y, self.local("out_proj"), self.context), self.context)

    def new_state(self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> RecurrentState:
        """Zero state for `batch` rows; its size does not depend on `capacity`."""
        wide = torch.promote_types(dtype, torch.float32)
        return RecurrentState(
            conv=torch.zeros(batch, self.conv_width - 1, self.inner + 2 * self.group_channels, device=device, dtype=dtype),
            ssm=torch.zeros(batch, self.heads, self.head_dim, self.state_size, device=device, dtype=wide),
        )

    def _project(self, x: Tensor) -> Tensor:
        return self.project(x, *(f"in_proj_{part}" for part in ("z", "x", "B", "C", "dt")))

    def _conv(self) -> tuple[Tensor, Tensor]:
        weight = torch.cat([self.local(f"conv_{part}_weight") for part in ("x", "B", "C")])
        return weight, torch.cat([self.local(f"conv_{part}_bias") for part in ("x", "B", "C")])
