"""The mixer as its three operators, one after the other."""

from collections.abc import Callable

from torch import Tensor

from mamba_kernels.common import SequenceRanks
from mamba_kernels.conv1d import causal_conv1d
from mamba_kernels.gated_norm import gated_norm
from mamba_kernels.ssd import ssd


def mamba2_mixer(
    packed: Tensor, conv_weight: Tensor, conv_bias: Tensor, A: Tensor, D: Tensor, dt_bias: Tensor, norm_weight: Tensor,
    conv_state: Tensor | None, ssm_state: Tensor | None, document_start: Tensor | None, state_size: int, group_size: int,
    eps: float, ranks: SequenceRanks | None, sum_parts: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`mamba_kernels.mamba2_mixer` on checked arguments."""
    z, conv_in, dt = split_packed(packed, conv_weight, A)
    conv_out, conv_state = causal_conv1d(
        conv_in, conv_weight, conv_bias, activation="silu", initial_state=conv_state, document_start=document_start,
        return_final_state=True,
    )  # fmt: skip
    x, B, C = split_convolved(conv_out, norm_weight, A, state_size)
    y, ssm_state = ssd(
        x, dt, A, B, C, D=D, dt_bias=dt_bias, dt_softplus=True, initial_state=ssm_state, document_start=document_start,
        return_final_state=True, ranks=ranks,
    )  # fmt: skip
    out = gated_norm(y.flatten(2), z, norm_weight, group_size=group_size, eps=eps, sum_parts=sum_parts)
    return out, conv_state, ssm_state


def split_packed(packed: Tensor, conv_weight: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """z [B, S, E], the convolution's input [B, S, K] and dt [B, S, H], views of packed."""
    channels, heads = conv_weight.shape[0], A.shape[0]
    z, conv_in, dt = packed.split_with_sizes([packed.shape[2] - channels - heads, channels, heads], 2)
    return z, conv_in, dt


def split_convolved(convolved: Tensor, norm_weight: Tensor, A: Tensor, state_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, S, H, P], B and C [B, S, G, N], views of [B, S, K]."""
    (batch, length, channels), inner, heads = convolved.shape, norm_weight.shape[0], A.shape[0]
    of_group = (channels - inner) // 2
    x, B, C = convolved.split_with_sizes([inner, of_group, of_group], 2)
    groups = (batch, length, of_group // state_size, state_size)
    return x.view(batch, length, heads, inner // heads), B.view(groups), C.view(groups)
