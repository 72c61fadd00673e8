"""A checkpoint's model as one safetensors file: whole tensors under their full names, what the trainer knew in the header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_mamba.checkpoint.hf_source import checkpoint_tensors, no_parameter
from megatron_mamba.checkpoint.loading import read_metadata, tokenizer_path
from megatron_mamba.checkpoint.reading import read_index
from megatron_mamba.checkpoint.storage import CheckpointError, Entry, sync_folder, write_safetensors
from megatron_mamba.config import Config, from_dict
from megatron_mamba.data.tokenizer import save_tokenizer, saved_name, tokenizer_sha256
from megatron_mamba.model.parameters import parameter_table


def consolidate(checkpoint: Path, output: Path, dtype: torch.dtype | None = None) -> list[Entry]:
    """Write the parameters of `checkpoint`, whatever mesh saved it, to the file `output`; returns what is in it.

    `dtype`: of the file (A_log, D, dt_bias and norm weights are fp32 then); default: as saved. One tensor is held at a time.
    The header's metadata has the checkpoint's own, each value as JSON (``config``, ``step``, ...). Its tokenizer is copied into a
    folder beside the file, NAME.tokenizer, so that both can be moved together. The file appears under its name when complete.
    Raises :class:`CheckpointError` for a damaged checkpoint or an `output` that exists, is not called ``*.safetensors`` or cannot
    be written.
    """
    if output.suffix != ".safetensors" or output.exists():
        problem = "exists" if output.exists() else "is not called *.safetensors"
        raise CheckpointError(f"output = {output}: {problem}. Choose another name")
    metadata = read_metadata(checkpoint)
    tokenizer, folder = tokenizer_path(checkpoint, metadata), output.with_suffix(".tokenizer")
    if tokenizer is not None:
        metadata |= {"tokenizer": f"{folder.name}/{saved_name(tokenizer)}", "tokenizer_sha256": tokenizer_sha256(tokenizer)}
    table = parameter_table(from_dict(Config, metadata["config"]).model)
    get, saved = checkpoint_tensors(checkpoint), read_index(checkpoint).state_dict_metadata
    entries = []
    for name, row in table.items():
        if (found := saved.get(f"model.{name}")) is None:
            raise no_parameter(checkpoint, name)
        own = cast(TensorStorageMetadata, found).properties.dtype
        entries.append(Entry(name, own if dtype is None else torch.float32 if row.fp32 else dtype, row.shape))
    entries.sort(key=lambda entry: -entry.dtype.itemsize)
    partial = output.with_name(f".{output.name}.partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)
        tensors = (get(entry.name).to(entry.dtype) for entry in entries)
        write_safetensors(partial, entries, tensors, {key: json.dumps(value) for key, value in metadata.items()})
        if tokenizer is not None:
            save_tokenizer(tokenizer, folder)
        partial.rename(output)
        sync_folder(output.parent)
    except OSError as error:
        raise CheckpointError(f"output = {output} cannot be written: {error}. Free space, or choose another folder") from error
    finally:
        partial.unlink(missing_ok=True)
    return entries
