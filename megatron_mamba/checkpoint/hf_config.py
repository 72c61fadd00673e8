"""config.json of a Hugging Face folder, both ways, and the model card beside it.

config.json is written by hand rather than through transformers: what `save_pretrained` writes drops keys that other
readers need (a hybrid's pattern) and leaves dangerous defaults in place (tied embeddings, the clamp on dt).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from megatron_mamba.checkpoint.hf_classes import CLASSES, HFClass, HFImportError, needed
from megatron_mamba.config import (
    AttentionConfig,
    ConfigError,
    Mamba2Config,
    MambaConfig,
    MLPConfig,
    ModelConfig,
    convert,
)
from megatron_mamba.files import one_line, read_object
from megatron_mamba.model.parameters import count

_KINDS_OF = ModelConfig(name="", pattern="M", hidden_size=1)
"""Its values say of which type each setting is."""
_MOST_LAYERS = 10_000
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "squared_relu": "relu2", "swiglu": "silu"}


def write_config(
    cls: HFClass, config: ModelConfig, token_ids: Mapping[str, int | None], max_length: int, dtype: str
) -> dict[str, Any]:
    """config.json of `config` as `cls`.

    `token_ids` has bos_token_id, eos_token_id and pad_token_id; `max_length` is the training sequence length (evaluation
    harnesses read it even where the model has no limit); `dtype` is torch's name of the file's dtype.
    """
    pattern = config.pattern.replace("|", "")
    values: dict[str, Any] = {key: attrgetter(path)(config) for key, path in cls.fields.items()}
    if cls.unit is None:
        values |= {"hybrid_override_pattern": pattern, "attention_head_dim": config.attention.head_dim}
    if cls.unit != "*-":
        d_inner = config.mamba.d_inner if cls.unit == "m" else config.mamba2.d_inner
        values["expand"] = max(1, d_inner // config.hidden_size)
    if cls.activation_key is not None and "mlp" in config.layers:
        values[cls.activation_key] = ACTIVATIONS[config.mlp.activation]
    if cls.rope != "none":
        base, fraction = cls.rope_keys
        values[base] = config.attention.rope_base
        if cls.rope == "partial":
            values[fraction] = config.attention.rotary_fraction
    # JSON has no infinity, and an unlimited dt is the class's default.
    fixed = {key: value for key, value in cls.fixed.items() if key != "time_step_limit"}
    return {
        "architectures": [cls.architecture],
        "model_type": cls.model_type,
        "num_hidden_layers": len(pattern) // len(cls.unit or "-"),
        **values,
        **fixed,
        **cls.written,
        "max_position_embeddings": max_length,
        "use_cache": True,
        **token_ids,
        "torch_dtype": dtype,
    }


def read_config(folder: Path) -> tuple[HFClass, ModelConfig]:
    """The class and the ModelConfig of a Hugging Face folder; transformers resolves its config.json, so that missing keys
    take the class's own defaults and every spelling it understands works here too.

    Raises :class:`HFImportError` for a class or a setting that no layer here computes.
    """
    transformers = needed("transformers", HFImportError)
    if not (folder / "config.json").is_file():
        raise HFImportError(f"{folder} has no config.json: not a Hugging Face model folder")
    raw = read_object(folder / "config.json", HFImportError, "Copy the folder again")
    cls = next((c for c in CLASSES if c.model_type == raw.get("model_type")), None)
    if cls is None or (raw.get("architectures") or [cls.architecture]) != [cls.architecture]:
        known = ", ".join(c.architecture for c in CLASSES)
        raise HFImportError(f"{folder}/config.json: architectures = {raw.get('architectures')}, model_type = "
                            f"{raw.get('model_type')!r} cannot be imported. Known: {known}")  # fmt: skip
    hf = _parsed(transformers, folder)
    for key, wanted in cls.fixed.items():
        found = getattr(hf, key, wanted)
        if (tuple(found) if isinstance(found, list) else found) != wanted:
            raise _unsupported(folder, key, found, f"only {wanted!r} can be computed here")
    try:
        config = replace(_model_config(cls, hf, folder), name=folder.resolve().name)
        config.validate()
    except ConfigError as error:
        raise HFImportError(f"{folder}/config.json describes a model that is not possible here: {error}") from error
    return cls, config


def _parsed(transformers: Any, folder: Path) -> Any:
    """config.json as transformers understands it."""
    from huggingface_hub.errors import StrictDataclassError

    # transformers lets a value of the wrong type meet whatever comes first: its own check of types, or arithmetic.
    wrong = (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, IndexError, ArithmeticError, RecursionError)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.CRITICAL)  # What it would print is in the error.
    try:
        return transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except wrong as error:
        problem = f"{type(error).__name__}: {one_line(error)}"
        raise HFImportError(f"{folder}/config.json: transformers refuses it ({problem}). Correct it, or copy it again") from error
    finally:
        transformers.logging.set_verbosity(verbosity)


def _unsupported(folder: Path, key: str, value: Any, problem: str) -> HFImportError:
    return HFImportError(f"{folder}/config.json: {key} = {value!r}: {problem}")


def _model_config(cls: HFClass, hf: Any, folder: Path) -> ModelConfig:
    parts: dict[str, dict[str, Any]] = {"": {}, "mamba": {}, "mamba2": {}, "attention": {}, "mlp": {}}
    for key, path in cls.fields.items():
        group, _, name = path.rpartition(".")
        value = getattr(hf, key, None)
        if value is not None or key not in ("head_dim", "num_key_value_heads"):
            parts[group][name] = convert(type(attrgetter(path)(_KINDS_OF)), value, key)
    pattern = hf.hybrid_override_pattern if cls.unit is None else cls.unit * _layers(hf, folder)
    if "E" in pattern:
        raise _unsupported(folder, "hybrid_override_pattern", pattern, "mixture-of-experts layers (E) have no counterpart here")
    if "n_heads" in parts["mamba2"]:
        parts["mamba2"]["d_inner"] = parts["mamba2"].pop("n_heads") * parts["mamba2"]["head_dim"]
    if cls.activation_key is not None and "-" in pattern:
        parts["mlp"]["activation"] = _activation(cls, getattr(hf, cls.activation_key), folder)
    attention = parts["attention"]
    if attention:
        if attention["n_heads"] < 1:
            raise _unsupported(folder, "num_attention_heads", attention["n_heads"], "must be 1 or more")
        attention.setdefault("n_kv_heads", attention["n_heads"])
        attention.setdefault("head_dim", parts[""]["hidden_size"] // attention["n_heads"])
        attention |= _rope(cls, hf, folder)
    return ModelConfig(
        **parts[""], name="imported", pattern=pattern, norm=cls.norm,
        mamba=MambaConfig(**parts["mamba"]), mamba2=Mamba2Config(**parts["mamba2"]),
        attention=AttentionConfig(**attention), mlp=MLPConfig(**parts["mlp"]),
    )  # fmt: skip


def _layers(hf: Any, folder: Path) -> int:
    layers: int = convert(int, getattr(hf, "num_hidden_layers", None), "num_hidden_layers")
    if not 0 < layers <= _MOST_LAYERS:
        raise _unsupported(folder, "num_hidden_layers", layers, f"must lie in 1 to {_MOST_LAYERS:,}")
    return layers


def _activation(cls: HFClass, name: Any, folder: Path) -> str:
    for ours, theirs in ACTIVATIONS.items():
        if theirs == name and (ours == "swiglu") == cls.gated:
            return ours
    raise _unsupported(folder, str(cls.activation_key), name, f"not an activation of a {'' if cls.gated else 'non-'}gated MLP here")


def _rope(cls: HFClass, hf: Any, folder: Path) -> dict[str, float]:
    if cls.rope == "none":
        return {"rotary_fraction": 0.0}
    rope = hf.rope_parameters
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
        raise _unsupported(folder, "rope_parameters", rope, "only plain RoPE is computed here, without scaling")
    fraction = rope.get("partial_rotary_factor", 1.0) if cls.rope == "partial" else 1.0
    return {
        "rotary_fraction": convert(float, fraction, "partial_rotary_factor"),
        "rope_base": convert(float, rope.get("rope_theta"), "rope_theta"),
    }


# --------------------------------------------------------------------------------------------------------- model card

_KINDS = {"mamba2": "Mamba-2", "mamba": "Mamba (S6)", "attention": "attention", "mlp": "MLP"}


def trained_elsewhere(training: Mapping[str, Any]) -> bool:
    """Whether a checkpoint with this metadata was imported and not trained since: it stands at step 0."""
    return training.get("step") == 0


def model_card(cls: HFClass, config: ModelConfig, training: Mapping[str, Any], shifted_norm: bool) -> str:
    """README.md of the exported folder: what the model is, how it was trained, and how to load it.

    `training` is the checkpoint's metadata (empty, or at step 0: not trained here); only what a reader of the weights needs is
    kept.
    """
    layers = [f"{config.layers.count(kind)} {name}" for kind, name in _KINDS.items() if kind in config.layers]
    rows = {
        "parameters": f"{count(config):,}",
        "layers": f"{' + '.join(layers)}, pattern `{config.pattern.replace('|', '')}`",
        "hidden size": config.hidden_size,
        "vocabulary": config.vocab_size,
        "normalisation": f"{config.norm}, eps {config.norm_eps:g}",
        "embeddings": "tied" if config.tie_embeddings else "untied",
        **{_KINDS[kind]: _describe(getattr(config, kind)) for kind in _KINDS if kind in config.layers},
        **{f"trained: {key}": value for key, value in _training_rows(training).items()},
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    notes = [cls.note] if cls.note else []
    if shifted_norm:
        notes.append(f"The norm weights were shifted by one to this class's convention (trained as {config.norm}).")
    return _CARD.format(
        name=config.name, model_type=cls.model_type, architecture=cls.architecture, since=cls.since, table=table,
        start=_IMPORTED if trained_elsewhere(training) else _DOCUMENTS,
        notes="".join(f"\n- {note}" for note in notes),
    )  # fmt: skip


def _describe(part: Any) -> str:
    return ", ".join(f"{key} {value}" for key, value in vars(part).items())


def _training_rows(training: Mapping[str, Any]) -> dict[str, Any]:
    if not training.get("step"):
        return {}
    chosen = {
        "sequence length": ("data", "seq_length"),
        "global batch (sequences)": ("trainer", "global_batch_size"),
        "precision": ("trainer", "precision"),
        "peak learning rate": ("optim", "lr"),
        "weight decay": ("optim", "weight_decay"),
        "seed": ("run", "seed"),
    }
    progress = {"steps": f"{training['step']:,}", "tokens": f"{training['consumed_tokens']:,}"}
    return progress | {name: training["config"][group][key] for name, (group, key) in chosen.items()}


_DOCUMENTS = (
    "A document starts after the token that ended the one before: that token is bos as well as eos, and an empty text starts "
    "from it. No special token is added to a prompt, as in training."
)
_IMPORTED = "Tokenizer and special tokens are those of the model that was imported."

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [{model_type}]
---
# {name}

A language model trained with Megatron-Mamba, as `{architecture}`.

| | |
|---|---|
{table}

## Use

Needs `transformers>={since}`.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

- {start}
- Load with `dtype=torch.float32` for logits equal to training's; A_log, D, dt_bias and norm weights are fp32 in the file.{notes}
"""
