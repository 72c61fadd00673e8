"""The Mamba-2 mixer (arXiv 2405.21060 section 7, figure 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from mamba_kernels import causal_conv1d, causal_conv1d_step, gated_norm, ssd, ssd_step
from megatron_mamba.config import ModelConfig
from megatron_mamba.model import parameters
from megatron_mamba.model.module import RecurrentState, SequenceInfo, TableModule
from megatron_mamba.parallel.context import ParallelContext
from megatron_mamba.parallel.linear import column_parallel, row_parallel


class Mamba2(TableModule):
    """``out_proj(group_norm(SSD(conv(x, B, C), dt) * silu(z)))``; z, x, B, C and dt are projections of the input.

    Everything between the two projections is local to the heads of this rank: one reduction a layer.
    """

    def __init__(self, config: ModelConfig, context: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__(parameters.mamba2(config), context, dtype)
        c = config.mamba2
        self.head_dim, self.state_size, self.conv_width, self.eps = c.head_dim, c.state_size, c.conv_width, config.norm_eps
        self.group_size = c.d_inner // c.n_groups

    def forward(self, x_TD: Tensor, info: SequenceInfo, state: RecurrentState | None = None) -> Tensor:
        """x `[T, D]` -> `[T, D]`; with `state`, starts from it and leaves the final one in it."""
        z, conv_in, dt = (part.unflatten(0, (info.batch, info.length)) for part in self._project(x_TD))
        weight, bias = self._conv()
        conv_out, conv_state = causal_conv1d(
            conv_in,
            weight,
            bias,
            activation="silu",
            initial_state=state.conv if state else None,
            document_start=info.document_start,
            return_final_state=True,
        )
        x, B, C = self._split(conv_out)
        y, ssm_state = ssd(
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
        )
        if state is not None:
            state.conv, state.ssm = conv_state, ssm_state
        return self._output(y.flatten(-2).flatten(0, 1), z.flatten(0, 1))

    def step(self, x_BD: Tensor, info: SequenceInfo, state: RecurrentState) -> Tensor:
        """One token of every row: x `[B, D]` -> `[B, D]`, `state` updated in place."""
        z, conv_in, dt = self._project(x_BD)
        weight, bias = self._conv()
        x, B, C = self._split(causal_conv1d_step(state.conv, conv_in, weight, bias, activation="silu"))
        A, D, dt_bias = -self.local("A_log").exp(), self.local("D"), self.local("dt_bias")
        y = ssd_step(state.ssm, x, dt, A, B, C, D=D, dt_bias=dt_bias, dt_softplus=True)
        return self._output(y.flatten(-2), z)

    def new_state(self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> RecurrentState:
        """Zero state for `batch` rows; its size does not depend on `capacity`."""
        heads, channels = self.local("A_log").shape[0], self._conv()[0].shape[0]
        wide = torch.promote_types(dtype, torch.float32)
        return RecurrentState(
            conv=torch.zeros(batch, self.conv_width - 1, channels, device=device, dtype=dtype),
            ssm=torch.zeros(batch, heads, self.head_dim, self.state_size, device=device, dtype=wide),
        )

    def _project(self, x: Tensor) -> list[Tensor]:
        weights = [self.local(f"in_proj_{part}") for part in ("z", "x", "B", "C", "dt")]
        e, _, n, _, h = (w.shape[0] for w in weights)
        return list(column_parallel(x, weights, self.context).split([e, e + 2 * n, h], dim=-1))

    def _conv(self) -> tuple[Tensor, Tensor]:
        weight = torch.cat([self.local(f"conv_{part}_weight") for part in ("x", "B", "C")])
        return weight, torch.cat([self.local(f"conv_{part}_bias") for part in ("x", "B", "C")])

    def _split(self, conv_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        e, n = self.local("D").shape[0] * self.head_dim, self.local("conv_B_bias").shape[0]
        x, B, C = conv_out.split([e, n, n], dim=-1)
        return x.unflatten(-1, (-1, self.head_dim)), *(t.unflatten(-1, (-1, self.state_size)) for t in (B, C))

    def _output(self, y: Tensor, z: Tensor) -> Tensor:
        y = gated_norm(y, z, self.local("norm_weight"), group_size=self.group_size, eps=self.eps)
        return row_parallel(y, self.local("out_proj"), self.context)
