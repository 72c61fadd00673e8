"""Causal depthwise convolution over the sequence, channels last."""

from torch import Tensor

from mamba_kernels.backend import use_fused
from mamba_kernels.common import Sizes, check_choice, check_document_start, check_tensors
from mamba_kernels.conv1d import reference


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    document_start: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve every channel with its own causal filter of width W, then SiLU if `activation` is "silu".

        y_t[c] = activation(bias[c] + sum_{k=0}^{W-1} weight[c, k] x_{t-(W-1)+k}[c])

    Shapes: x [B, S, C]; weight [C, W]; bias [C]; initial_state [B, W-1, C], the inputs just before x, oldest first,
    zero if None; document_start [B, S] bool, True at the first token of a document, for which and after which all
    inputs before it count as zero.

    Returns y [B, S, C] in the dtype of x, and with `return_final_state` also the initial state of a call on the tokens
    that follow, [B, W-1, C] in the dtype of x, where inputs before the last document start are zero. Differentiable in
    every floating-point argument, also through the final state. Computes in float32 (float64 if x is). Raises
    ValueError for a wrong shape, dtype, device or activation.
    """
    sizes: Sizes = {}
    check_tensors(
        "causal_conv1d", sizes, x=(x, "B S C"), weight=(weight, "C W"), bias=(bias, "C"),
        initial_state=(initial_state, "B W-1 C"),
    )  # fmt: skip
    check_document_start("causal_conv1d", sizes, document_start, x.device)
    check_choice("causal_conv1d", "activation", activation, (None, "silu"))
    # A filter of width 1 is a product, with no state and no documents: the kernels slide over the inputs before a token.
    if use_fused(x) and sizes["W"] > 1:
        from mamba_kernels.conv1d import fused

        y, final_state = fused.causal_conv1d(x, weight, bias, initial_state, document_start, activation == "silu")
    else:
        y, final_state = reference.causal_conv1d(x, weight, bias, activation == "silu", initial_state, document_start)
    return (y, final_state) if return_final_state else y
