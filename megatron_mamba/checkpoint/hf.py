"""Models to and from Hugging Face folders, a tensor at a time.

:func:`export` asks for one parameter after the other, in a fixed order, and holds one tensor at a time, so its source may
be a module, a checkpoint on disk or a mesh of ranks that gathers each tensor as it is asked for. :func:`import_` is the same
table (hf_classes.py) read the other way; export followed by import returns every tensor bit for bit, except norm weights
of a model that only fits a class with the other convention (weight or weight - 1).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mamba.checkpoint.hf_classes import HFClass, HFExportError, HFImportError, HFTensor, choose
from megatron_mamba.checkpoint.hf_config import model_card, read_config, trained_elsewhere, write_config
from megatron_mamba.checkpoint.hf_tokenizer import check_tokenizer, write_tokenizer
from megatron_mamba.checkpoint.storage import Entry, write_safetensors
from megatron_mamba.config import ModelConfig
from megatron_mamba.files import is_plain_name, one_line, read_object

__all__ = [
    "HFExportError", "HFImportError", "choose", "export", "hf_tensors", "import_", "new_folder", "parse_size", "trained_elsewhere",
]  # fmt: skip

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_BUFFERS = re.compile(r"rotary_emb\.inv_freq$|\.attention\.(masked_)?bias$")
"""Constants that old files carry beside the parameters."""


def export(
    config: ModelConfig,
    get: Callable[[str], Tensor],
    output: Path | str,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: int = 5 * 10**9,
    tokenizer: Path | str | None = None,
    max_length: int = 4096,
    training: Mapping[str, Any] | None = None,
    architecture: str | None = None,
) -> HFClass:
    """Write the model as a Hugging Face folder and return the class it became.

    `get` returns the global tensor of a parameter by its full name; each is asked for once (a tied embedding twice where
    the class cannot tie). `dtype` is float32 or bfloat16 (A_log, D, dt_bias and norm weights stay float32),
    `max_shard_size` is in bytes, `max_length` in tokens; `tokenizer` is a SentencePiece .model, a tokenizer.json, or a
    folder of either; `training` is the checkpoint's metadata, for the model card. The folder appears under its name only
    when complete.

    Raises :class:`HFExportError` for a model that no class (or not `architecture`) holds, a tokenizer that does not
    convert exactly or has more ids than the vocabulary, or an `output` that is not empty or cannot be written.
    """
    output = Path(output)
    cls = choose(config, architecture)
    if dtype not in (torch.float32, torch.bfloat16):
        raise HFExportError(f"dtype = {dtype}: files are written in torch.float32 or torch.bfloat16")
    with new_folder(output) as partial:
        token_ids: dict[str, int | None] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        own_bos = trained_elsewhere(training or {})
        if tokenizer is not None:
            token_ids |= write_tokenizer(tokenizer, partial, max_length, config.vocab_size, own_bos=own_bos)
        _write_json(partial / "generation_config.json", {**token_ids, "do_sample": False, "use_cache": True})
        if token_ids["pad_token_id"] == token_ids["eos_token_id"]:
            # transformers trains no embedding of config.json's pad token, and every document ends with this one.
            token_ids["pad_token_id"] = None
        _write_json(partial / "config.json", write_config(cls, config, token_ids, max_length, str(dtype).removeprefix("torch.")))
        if tokenizer is not None:
            check_tokenizer(tokenizer, partial, config.vocab_size, own_bos=own_bos)
        (partial / "README.md").write_text(model_card(cls, config, training or {}, cls.norm != config.norm), encoding="utf-8")
        _write_shards(partial, cls, config, get, dtype, max_shard_size)
    return cls


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder to fill: it becomes `output` when the block ends, and is gone if the block fails.

    Raises :class:`HFExportError` for an `output` that is not empty.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise HFExportError(f"output = {output}: exists and is not empty. Choose another folder, or remove it first")
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        if output.exists():
            output.rmdir()
        partial.rename(output)
    except OSError as error:
        raise HFExportError(f"output = {output} cannot be written: {error}. Free space, or choose another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def hf_tensors(
    cls: HFClass, config: ModelConfig, specs: Iterable[HFTensor], get: Callable[[str], Tensor], dtype: torch.dtype
) -> Iterator[Tensor]:
    """The file's tensors one by one, on the CPU and in the file's dtype."""
    shift = {("layernorm", "layernorm1p"): -1.0, ("layernorm1p", "layernorm"): 1.0}.get((config.norm, cls.norm), 0.0)
    for spec in specs:
        parts = []
        for name, shape in zip(spec.parts, spec.shapes, strict=True):
            if spec.layout == "zeros":
                continue
            part = get(name).detach().cpu()
            if tuple(part.shape) != shape:
                raise HFExportError(f"parameter {name} has shape {tuple(part.shape)}, but the model's configuration says {shape}")
            if shift and name.endswith("norm.weight"):
                part = part + shift
            parts.append(part)
        yield spec.pack(parts).to(_stored(spec, dtype)).contiguous()


def _stored(spec: HFTensor, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if spec.fp32 else dtype


def _write_shards(
    folder: Path, cls: HFClass, config: ModelConfig, get: Callable[[str], Tensor], dtype: torch.dtype, max_shard_size: int
) -> None:
    shards: list[list[HFTensor]] = [[]]
    total = filled = 0
    for spec in cls.tensors(config):
        size = spec.numel * _stored(spec, dtype).itemsize
        if filled and filled + size > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled, total = filled + size, total + size
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))] if shards[1:] else [_SINGLE]
    for name, shard in zip(names, shards, strict=True):
        # The widest dtype first, as the writer wants it.
        shard.sort(key=lambda spec: -_stored(spec, dtype).itemsize)
        entries = [Entry(spec.key, _stored(spec, dtype), spec.shape) for spec in shard]
        write_safetensors(folder / name, entries, hf_tensors(cls, config, shard, get, dtype))
    if shards[1:]:
        weight_map = {spec.key: name for name, shard in zip(names, shards, strict=True) for spec in shard}
        _write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def import_(folder: Path | str) -> tuple[ModelConfig, Iterator[tuple[str, Tensor]]]:
    """The ModelConfig of a Hugging Face folder, and its parameters as (full name, global tensor) in the file's dtype.

    Reads config.json and safetensors files, also as transformers' own save_pretrained writes them. The configuration and
    the list of tensors are checked at once, each tensor's shape as it is read; both raise :class:`HFImportError`.
    """
    folder = Path(folder)
    cls, config = read_config(folder)
    files = {_standard_key(cls, key): (file, key) for key, file in _files(folder).items() if not _BUFFERS.search(key)}

    def read(key: str) -> Tensor:
        file, stored = files[key]
        with _opened(folder / file) as handle:
            tensor: Tensor = handle.get_tensor(stored)
        if not tensor.is_floating_point():
            raise HFImportError(f"{folder / file}: {stored} is {tensor.dtype}. Only weights that are not quantised are read")
        return tensor

    config = _resolve_tying(cls, config, files, read)
    specs = [spec for spec in cls.tensors(config) if not (config.tie_embeddings and spec.key == cls.head)]
    missing, unknown = sorted({spec.key for spec in specs} - files.keys()), sorted(files.keys() - {spec.key for spec in specs})
    if config.tie_embeddings and cls.head in unknown:
        unknown.remove(cls.head)
    if missing or unknown:
        raise HFImportError(f"{folder}: the tensors are not those of {cls.architecture} with this config.json; "
                            f"missing {missing[:4] or 'none'}, unknown {unknown[:4] or 'none'}")  # fmt: skip

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for spec in specs:
            yield from spec.unpack(read(spec.key)).items()

    return config, tensors()


def _resolve_tying(cls: HFClass, config: ModelConfig, files: Mapping[str, Any], read: Callable[[str], Tensor]) -> ModelConfig:
    """What transformers does: a config.json that says tied beside an output of its own keeps the two apart."""
    embedding = f"{cls.root}{cls.embedding}.weight"
    if not config.tie_embeddings or cls.head not in files or torch.equal(read(embedding), read(cls.head)):
        return config
    return replace(config, tie_embeddings=False)


def _standard_key(cls: HFClass, key: str) -> str:
    for prefix, standard in cls.aliases:
        if key.startswith(prefix):
            return standard + key.removeprefix(prefix)
    return key


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A safetensors file; what the library finds wrong with it, also later, is one :class:`HFImportError`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise HFImportError(f"{file}: cannot be read as safetensors ({one_line(error)}). Copy it again") from error


def _files(folder: Path) -> dict[str, str]:
    """Key -> file name, from the index or from the one file's header."""
    if (folder / _INDEX).is_file():
        weight_map: Any = read_object(folder / _INDEX, HFImportError, "Copy the folder again").get("weight_map")
        if not isinstance(weight_map, dict):
            raise HFImportError(f"{folder / _INDEX}: weight_map = {weight_map!r} names no files. Copy the folder again")
        for key, file in weight_map.items():
            if not is_plain_name(file):
                raise HFImportError(f"{folder / _INDEX}: weight_map[{key!r}] = {file!r} is not the name of a file in the folder")
        absent = sorted({file for file in weight_map.values() if not (folder / file).is_file()})
        if absent:
            raise HFImportError(f"{folder}: {', '.join(absent)} named by {_INDEX} is not there. Copy the folder again, whole")
        return dict(weight_map)
    if not (folder / _SINGLE).is_file():
        raise HFImportError(f"{folder} has neither {_INDEX} nor {_SINGLE}: only safetensors files are read")
    with _opened(folder / _SINGLE) as handle:
        return dict.fromkeys(handle.keys(), _SINGLE)


def parse_size(text: str) -> int:
    """Bytes from ``5GB``, ``200MB``, ``100KB`` or a plain number (decimal units); ValueError otherwise."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", text, re.IGNORECASE)
    size = int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if size <= 0:
        raise ValueError(f"{text!r} is not a size. Write for example 5GB or 500MB")
    return size


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
