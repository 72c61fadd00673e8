"""A checkpoint as a model that computes: weights in the compute dtype, no optimizer, and no sharding but over tp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron_mamba.checkpoint import CheckpointError, load, read_metadata, resolve
from megatron_mamba.config import ModelConfig, from_dict
from megatron_mamba.model import LanguageModel, build
from megatron_mamba.model.lm import DTYPES
from megatron_mamba.model.module import TableModule
from megatron_mamba.parallel.context import ParallelContext
from megatron_mamba.parallel.fsdp import local


def load_model(checkpoint: str | Path, context: ParallelContext, precision: str = "fp32") -> tuple[LanguageModel, dict[str, Any]]:
    """The model of a checkpoint on the context's device, ready to run without gradients, and the checkpoint's metadata.

    `checkpoint` is a step's folder, a folder of checkpoints (the latest), a run's folder or a single file, whatever mesh saved
    it; a rank holds its part of the context's tp, and all data-parallel ranks the same. Weights are kept in
    `precision` ("bf16", "fp32", "fp64"); A_log, D, dt_bias and norm weights in at least fp32. Raises CheckpointError for
    a checkpoint that is missing, damaged or of another model.
    """
    folder = resolve(checkpoint)
    config = from_dict(ModelConfig, read_metadata(folder)["config"]["model"])
    model = build(config, context, precision=precision, device="meta")
    if DTYPES[precision] == torch.bfloat16:
        _narrow(model, torch.bfloat16)
    model.to_empty(device=context.device)
    if config.tie_embeddings:
        model.output.weight = model.embedding.weight
    model.requires_grad_(False).eval()
    return model, load(folder, {"model": dict(model.named_parameters())})


def check_finite(model: LanguageModel, checkpoint: str | Path) -> None:
    """Raise CheckpointError, naming it, for a parameter with values that are no finite numbers: all that follows is none."""
    for name, parameter in model.named_parameters():
        if not all(bool(bound.isfinite()) for bound in local(parameter.detach()).aminmax()):
            raise CheckpointError(
                f"checkpoint {checkpoint}: parameter {name} has values that are not finite numbers (NaN or infinite): its training "
                "had gone wrong. Use an earlier checkpoint"
            )


def _narrow(model: LanguageModel, dtype: torch.dtype) -> None:
    """Declare every parameter that need not stay fp32 in `dtype`: mixed precision would convert them again at every token."""
    for module in model.modules():
        if isinstance(module, TableModule):
            for name, row in module.rows.items():
                if not row.fp32:
                    setattr(module, name, nn.Parameter(getattr(module, name).detach().to(dtype)))
