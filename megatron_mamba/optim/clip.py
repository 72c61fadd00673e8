"""Global gradient norm and clipping; neither waits for the device."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from megatron_mamba.parallel.context import ParallelContext
from megatron_mamba.parallel.fsdp import local
from megatron_mamba.parallel.norms import squared_norm


def global_grad_norm(parameters: Iterable[Tensor], context: ParallelContext) -> Tensor:
    """The 2-norm of all gradients of the model, a scalar on the device, equal on every rank.

    Call it when gradients are summed over data-parallel ranks. Every element of the global gradient counts once,
    however it is sharded or replicated, over all pipeline stages; accumulation is in fp32 (fp64 for fp64 gradients).
    """
    return squared_norm(parameters, across=[context.group("pp")], device=context.device).sqrt_()


@torch.no_grad()
def clip_(parameters: Iterable[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale the gradients in place by min(1, max_norm / norm); 0 = no clipping. `norm` is :func:`global_grad_norm`'s."""
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    if max_norm > 0 and gradients:
        torch._foreach_mul_(gradients, (max_norm / norm).clamp_(max=1.0))
