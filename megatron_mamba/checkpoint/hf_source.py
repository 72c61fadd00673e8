"""Checkpoints as the source of an export and the target of an import, a tensor at a time, without building a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mamba.checkpoint.loading import read_tensors, shared_damage
from megatron_mamba.checkpoint.reading import read_index
from megatron_mamba.checkpoint.sharded import CheckpointManager
from megatron_mamba.checkpoint.storage import CheckpointError
from megatron_mamba.config import Config, ModelConfig, to_dict
from megatron_mamba.data.tokenizer import tokenizer_sha256


def checkpoint_tensors(path: Path) -> Callable[[str], Tensor]:
    """``get(name)`` that reads one global parameter of the checkpoint `path` onto the CPU, whatever mesh wrote it.

    Checks the parameters' checksums first. Raises :class:`CheckpointError` for damage, or a name that the checkpoint does not hold.
    """
    damage = shared_damage(path, None, groups={"model"})
    if damage:
        raise CheckpointError(f"checkpoint {path} is damaged: {'; '.join(damage)}. Export another one")
    index = read_index(path)

    def get(name: str) -> Tensor:
        entry: Any = index.state_dict_metadata.get(f"model.{name}")
        if entry is None:
            raise no_parameter(path, name)
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        read_tensors(path, index, {f"model.{name}": tensor})
        return tensor

    return get


def no_parameter(path: Path, name: str) -> CheckpointError:
    """The error of a checkpoint that does not hold one of its configuration's parameters."""
    return CheckpointError(f"checkpoint {path} has no parameter {name}: it is of another model than its configuration says")


def write_checkpoint(directory: Path, config: ModelConfig, tensors: Iterable[tuple[str, Tensor]], tokenizer: Path | None) -> Path:
    """A checkpoint of step 0 with these weights in fp32: to generate from, or for ``checkpoint.init_from`` of a run.

    `tokenizer` is a file in `directory`, which may be moved as a whole. Returns the checkpoint's path. Raises
    :class:`CheckpointError` if it cannot be written.
    """
    metadata = {
        "step": 0,
        "consumed_samples": 0,
        "consumed_tokens": 0,
        "skipped_steps": 0,
        "skipped_in_a_row": 0,
        "config": to_dict(Config(model=config)),
        "tokenizer": str(tokenizer.relative_to(directory)) if tokenizer else None,
        "tokenizer_sha256": tokenizer_sha256(tokenizer) if tokenizer else None,
    }
    manager = CheckpointManager(directory, keep_last=1, keep_every=0, async_save=False, on_damage="error")
    manager.save(0, {"model": {name: tensor.float() for name, tensor in tensors}}, metadata)
    manager.close()
    return manager.path(0)
