"""What a Mamba-2 layer computes between its two projections: convolution, scan and gated norm, from one packed tensor."""

from collections.abc import Callable

from torch import Tensor

from mamba_kernels.backend import use_fused
from mamba_kernels.common import (
    SequenceRanks,
    Sizes,
    check_document_start,
    check_group_size,
    check_groups,
    check_tensors,
    spread_ranks,
)
from mamba_kernels.mamba2_mixer import reference


def mamba2_mixer(
    packed: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    *,
    state_size: int,
    group_size: int,
    eps: float,
    conv_state: Tensor | None = None,
    ssm_state: Tensor | None = None,
    document_start: Tensor | None = None,
    ranks: SequenceRanks | None = None,
    sum_parts: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """From the input projection's output to the output projection's input (Mamba-2, arXiv 2405.21060, section 7).

        z, xBC, dt = packed        x, B, C = causal_conv1d(xBC, silu)        out = gated_norm(ssd(x, dt, A, B, C, D), z)

    Shapes: packed [B, S, E + K + H] with K = E + 2 G N; conv_weight [K, W]; conv_bias [K]; A, D, dt_bias [H]; norm_weight [E];
    conv_state [B, W-1, K] and ssm_state [B, H, P, N], those before the first token, zero if None, with P = E / H and N
    `state_size`; document_start [B, S] bool. The rest is as for `causal_conv1d`, `ssd` and `gated_norm`, which say what they do.

    Returns out [B, S, E] in the dtype of packed, and the states after the last token, [B, W-1, K] and [B, H, P, N]. Differentiable
    in every floating-point argument, also through the states. Fused, the gradients of z, x, B, C and dt are written where they lie
    in that of `packed`; the backward keeps packed, the convolution's and the scan's outputs, and what `ssd` keeps.

    Raises ValueError for a wrong shape, dtype, device or size, and for an ssm_state with several ranks.
    """
    sizes: Sizes = {}
    check_tensors(
        "mamba2_mixer", sizes, norm_weight=(norm_weight, "E"), A=(A, "H"), D=(D, "H"), dt_bias=(dt_bias, "H"),
        conv_weight=(conv_weight, "K W"), conv_bias=(conv_bias, "K"), packed=(packed, "B S F"), conv_state=(conv_state, "B W-1 K"),
    )  # fmt: skip
    inner, heads, channels = sizes["E"], sizes["H"], sizes["K"]
    if sizes["F"] != inner + channels + heads:
        raise ValueError(
            f"mamba2_mixer: packed has {sizes['F']} channels, wanted {inner + channels + heads}: {inner} of z as norm_weight has,"
            f" {channels} of x, B and C as conv_weight has, {heads} of dt as A has"
        )
    if heads == 0 or inner % heads:
        raise ValueError(f"mamba2_mixer: norm_weight has {inner} channels, wanted a multiple of the {heads} heads of A")
    if state_size < 1 or channels <= inner or (channels - inner) % (2 * state_size):
        raise ValueError(
            f"mamba2_mixer: state_size is {state_size}, wanted one that divides the {channels - inner} / 2 channels of B and of C"
        )
    sizes |= {"P": inner // heads, "N": state_size, "G": (channels - inner) // (2 * state_size)}
    check_groups("mamba2_mixer", sizes)
    check_tensors("mamba2_mixer", sizes, packed=(packed, "B S F"), ssm_state=(ssm_state, "B H P N"))
    check_document_start("mamba2_mixer", sizes, document_start, packed.device)
    check_group_size("mamba2_mixer", inner, group_size, spread=sum_parts is not None)
    ranks = spread_ranks("mamba2_mixer", ranks, ssm_state)
    arguments = (
        packed, conv_weight, conv_bias, A, D, dt_bias, norm_weight, conv_state, ssm_state, document_start, state_size, group_size,
        eps, ranks, sum_parts,
    )  # fmt: skip
    # A filter of width 1 is a product, for which there is no kernel.
    if use_fused(packed) and packed.numel() > 0 and sizes["W"] > 1:
        from mamba_kernels.mamba2_mixer import operators

        return operators.mamba2_mixer(*arguments)
    return reference.mamba2_mixer(*arguments)
