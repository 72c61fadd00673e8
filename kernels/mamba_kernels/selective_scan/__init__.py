"""Selective scan: the Mamba (S6) recurrence, with a decay per channel and state dimension."""

from torch import Tensor

from mamba_kernels.backend import use_fused
from mamba_kernels.common import (
    SequenceRanks,
    Sizes,
    accumulate_dtype,
    check_document_start,
    check_tensors,
    positive_dt,
    spread_ranks,
)
from mamba_kernels.selective_scan import reference


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    document_start: Tensor | None = None,
    return_final_state: bool = False,
    ranks: SequenceRanks | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan a sequence with the S6 recurrence (Mamba, arXiv 2312.00752, equation 2 and algorithm 2).

    With dt' = dt + dt_bias, or softplus(dt + dt_bias) if `dt_softplus`, for channel e and state dimension n:
        state_t[e, n] = exp(dt'_t[e] A[e, n]) state_{t-1}[e, n] + dt'_t[e] B_t[n] x_t[e]
        y_t[e] = sum_n C_t[n] state_t[e, n] + D[e] x_t[e]

    Shapes: x, dt [B, S, E]; A [E, N] (negative); B, C [B, S, N]; D, dt_bias [E]; initial_state [B, E, N], zero if None;
    document_start [B, S] bool, True at the first token of a document, which the state before it (the initial state too)
    does not reach.

    Returns y [B, S, E] in the dtype of x, and with `return_final_state` also the state after the last token, [B, E, N]
    in float32 (float64 if x is). Differentiable in every floating-point argument, also through the final state. No
    tensor of S * E * N elements exists, forward or backward.

    `ranks` are those over which the sequence is spread (as for SSD: Mamba-2, arXiv 2405.21060, section 8.2): S is the
    length of this rank's piece, and y, final state and gradients of the piece are what the whole sequence gives; the
    gradients of A, D and dt_bias are this rank's share, for the caller to sum. Only a document_start begins a document:
    the first token of a piece alone does not. Forward and backward exchange B * E * (N + 1) numbers a rank each, in the
    dtype of the state and for any S, in one gather for each half of the channels, which overlaps the work on the other
    half. A group of one rank exchanges nothing.

    Raises ValueError for a wrong shape, dtype or device, and for an initial_state with several ranks.
    """
    sizes: Sizes = {}
    check_tensors(
        "selective_scan", sizes, x=(x, "B S E"), dt=(dt, "B S E"), A=(A, "E N"), B=(B, "B S N"), C=(C, "B S N"),
        D=(D, "E"), dt_bias=(dt_bias, "E"), initial_state=(initial_state, "B E N"),
    )  # fmt: skip
    check_document_start("selective_scan", sizes, document_start, x.device)
    ranks = spread_ranks("selective_scan", ranks, initial_state)
    if use_fused(x) and x.numel() > 0 and B.numel() > 0:
        from mamba_kernels.selective_scan import operators

        y, final_state = operators.selective_scan(x, dt, A, B, C, D, dt_bias, dt_softplus, initial_state, document_start, ranks)
        return (y, final_state) if return_final_state else y
    dt = positive_dt(dt, dt_bias, dt_softplus, accumulate_dtype(x.dtype))
    y, final_state = reference.selective_scan(x, dt, A, B, C, D, initial_state, document_start, ranks)
    return (y, final_state) if return_final_state else y
