"""The local parts of a softmax cross-entropy over a vocabulary that may be split over ranks.

A caller combines the statistics of the shards into log_sum_exp (the reductions over ranks are its own), has the loss
log_sum_exp - target_logit, and asks every shard for its gradient. Nothing here is recorded by autograd: the caller's
autograd function is where the loss and its gradient meet.
"""

from torch import Tensor

from mamba_kernels.backend import use_fused
from mamba_kernels.common import Sizes, check_index, check_tensors
from mamba_kernels.cross_entropy import reference


def softmax_statistics(logits: Tensor, targets: Tensor, vocab_start: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the loss needs of one shard [vocab_start, vocab_start + v) of the logits.

    Shapes: logits [T, v]; targets [T] integer, in the whole vocabulary. Returns, all [T] in float32 (float64 if logits
    are): the largest logit; the sum of exp(logit - largest), 0 in a row of -inf; and the target's logit, 0 where the
    target is not in this shard or is negative. Not differentiable. Raises ValueError for a wrong shape, dtype or device.
    """
    sizes: Sizes = {}
    check_tensors("softmax_statistics", sizes, logits=(logits, "T v"))
    check_index("softmax_statistics", sizes, "targets", targets, "T", logits.device)
    if use_fused(logits):
        from mamba_kernels.cross_entropy import fused

        return fused.softmax_statistics(logits, targets, vocab_start)
    return reference.softmax_statistics(logits, targets, vocab_start)


def softmax_gradient(
    logits: Tensor, targets: Tensor, log_sum_exp: Tensor, scale: Tensor, vocab_start: int, *, out: Tensor | None = None
) -> Tensor:
    """scale (exp(logits - log_sum_exp) - onehot(target)): the gradient of sum(scale * loss) on one shard of the logits.

    Shapes: logits [T, v]; targets [T] integer, in the whole vocabulary, negative for none; log_sum_exp, scale [T].
    Returns [T, v] in the dtype of logits, written into `out` if given (of that dtype, elements of a row next to each other;
    it may be the logits themselves). Not differentiable. Raises ValueError for a wrong shape, dtype, device or layout.
    """
    sizes: Sizes = {}
    check_tensors(
        "softmax_gradient", sizes, logits=(logits, "T v"), log_sum_exp=(log_sum_exp, "T"), scale=(scale, "T"), out=(out, "T v")
    )
    check_index("softmax_gradient", sizes, "targets", targets, "T", logits.device)
    if out is not None and (out.dtype != logits.dtype or (out.stride(1) != 1 and out.shape[1] > 1)):
        raise ValueError(
            f"softmax_gradient: out has dtype {out.dtype} and strides {out.stride()}, wanted {logits.dtype}, the dtype of "
            "logits, and elements of a row next to each other"
        )
    if use_fused(logits):
        from mamba_kernels.cross_entropy import fused

        return fused.softmax_gradient(logits, targets, log_sum_exp, scale, vocab_start, out)
    return reference.softmax_gradient(logits, targets, log_sum_exp, scale, vocab_start, out)


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    """x * factor, in place: a gradient computed in the forward pass by the gradient that then comes from above.

    Shapes: x any, contiguous; factor a scalar tensor. Fused, nothing of x is read where factor is 1, as it is at the end of
    a loss. Returns x. Not differentiable. Raises ValueError for a wrong shape, dtype, device or layout.
    """
    if factor.dim() or factor.device != x.device:
        raise ValueError(f"scale_: factor is {tuple(factor.shape)} on {factor.device}, wanted a scalar on {x.device}")
    if not (x.is_floating_point() and x.is_contiguous()):
        raise ValueError(f"scale_: x has dtype {x.dtype} and strides {x.stride()}, wanted floating-point and contiguous")
    if use_fused(x):
        from mamba_kernels.cross_entropy import fused

        return fused.scale_(x, factor)
    return reference.scale_(x, factor)
