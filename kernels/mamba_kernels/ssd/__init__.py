"""State-space duality: the Mamba-2 scan, with a scalar decay per head and B, C shared by the heads of a group."""

from torch import Tensor

from mamba_kernels.backend import use_fused
from mamba_kernels.common import (
    SequenceRanks,
    Sizes,
    accumulate_dtype,
    check_document_start,
    check_groups,
    check_tensors,
    positive_dt,
    spread_ranks,
)
from mamba_kernels.ssd import reference


def ssd(
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
    chunk_size: int | None = None,
    return_final_state: bool = False,
    ranks: SequenceRanks | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan a sequence with the SSD recurrence (Mamba-2, arXiv 2405.21060, equations 1 and 16; by chunks, section 6).

    With dt' = dt + dt_bias, or softplus(dt + dt_bias) if `dt_softplus`, and g = h // (H // G) the group of head h:
        state_t = exp(dt'_t A) state_{t-1} + dt'_t x_t B_t^T        y_t = state_t C_t + D x_t

    Shapes: x [B, S, H, P]; dt [B, S, H]; A, D, dt_bias [H] (A negative); B, C [B, S, G, N] with G a divisor of H;
    initial_state [B, H, P, N], zero if None; document_start [B, S] bool, True at the first token of a document, which
    the state before it (the initial state too) does not reach. `chunk_size` is any number of tokens; it changes speed
    and memory of the reference only, and None picks it: the fused kernels have their own.

    Returns y [B, S, H, P] in the dtype of x, and with `return_final_state` also the state after the last token,
    [B, H, P, N] in float32 (float64 if x is). Differentiable in every floating-point argument, also through the final
    state. Computes in the dtype of the state; the fused kernels' matrix products have operands in the dtype of x (the states
    that they keep between chunks too) and float32 sums.

    `ranks` are those over which the sequence is spread (section 8.2): S is the length of this rank's piece, and y, final
    state and gradients of the piece are what the whole sequence gives; the gradients of A, D and dt_bias are this rank's
    share, for the caller to sum. Only a document_start begins a document: the first token of a piece alone does not.
    Forward and backward exchange B * H * (P * N + 1) numbers a rank each, in the dtype of the state and for any S, in one
    gather for each half of the heads, which overlaps the work on the other half. A group of one rank exchanges nothing.

    Raises ValueError for a wrong shape, dtype, device or chunk size, and for an initial_state with several ranks.
    """
    sizes: Sizes = {}
    check_tensors(
        "ssd", sizes, x=(x, "B S H P"), dt=(dt, "B S H"), A=(A, "H"), B=(B, "B S G N"), C=(C, "B S G N"), D=(D, "H"),
        dt_bias=(dt_bias, "H"), initial_state=(initial_state, "B H P N"),
    )  # fmt: skip
    check_groups("ssd", sizes)
    check_document_start("ssd", sizes, document_start, x.device)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"ssd: chunk_size is {chunk_size}, wanted a positive number of tokens or None")
    ranks = spread_ranks("ssd", ranks, initial_state)
    if use_fused(x) and x.numel() > 0:
        from mamba_kernels.ssd import operators

        y, final_state = operators.ssd(x, dt, A, B, C, D, dt_bias, dt_softplus, initial_state, document_start, ranks)
        return (y, final_state) if return_final_state else y
    dt = positive_dt(dt, dt_bias, dt_softplus, accumulate_dtype(x.dtype))
    y, final_state = reference.ssd(x, dt, A, B, C, D, initial_state, document_start, chunk_size, ranks)
    return (y, final_state) if return_final_state else y
