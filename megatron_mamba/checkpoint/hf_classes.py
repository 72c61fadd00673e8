"""The Hugging Face classes a model can leave as: one table that says, for each, what it holds and what its tensors are made of.

Export and import both read this table and nothing else, so a tensor's meaning is stated once. A row gives the class's
config.json keys (as fields of ModelConfig, or as constants), its tensor names, and the recipe of each tensor from ours.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_mamba.config import ModelConfig
from megatron_mamba.model.parameters import parameter_table


class HFExportError(ValueError):
    """A model or tokenizer that the Hugging Face format cannot hold, or a folder that cannot be written."""


class HFImportError(ValueError):
    """A Hugging Face folder that holds something no layer here computes, or that is incomplete."""


def needed(module: str, fail: type[ValueError] = HFExportError, package: str | None = None) -> Any:
    """A module of the extra `hf`. Raises `fail` naming the package if it is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise fail(f"{package or module} is not installed: pip install 'megatron-mamba[hf]'") from error


# ------------------------------------------------------------------------------------------------ tensors and recipes


@dataclass(frozen=True)
class Recipe:
    """How one Hugging Face tensor is made of ours: `parts` are names relative to the mixer, joined by `layout`.

    ``rows`` one after the other along dimension 0 · ``conv`` the same with a singleton middle dimension `[C, 1, W]` ·
    ``heads`` head by head, one head of each part in turn · ``zeros`` a bias of zeros as long as the part has rows.
    """

    layout: Literal["rows", "conv", "heads", "zeros"]
    parts: tuple[str, ...]


def _rows(*parts: str) -> Recipe:
    return Recipe("rows", parts)


def _conv(*parts: str) -> Recipe:
    return Recipe("conv", parts)


@dataclass(frozen=True)
class HFTensor:
    """One tensor of the Hugging Face file: its key, the full names and shapes of our parts, and how they are joined."""

    key: str
    parts: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    layout: Literal["rows", "conv", "heads", "zeros"]
    fp32: bool
    """Kept fp32 in the file whatever the export's dtype (A_log, D, dt_bias, norm weights)."""
    heads: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the file."""
        rows, rest = sum(shape[0] for shape in self.shapes), self.shapes[0][1:]
        return {"zeros": (rows,), "conv": (rows, 1, *rest)}.get(self.layout, (rows, *rest))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def pack(self, parts: Sequence[Tensor]) -> Tensor:
        """The file's tensor from ours (none are needed for ``zeros``)."""
        if self.layout == "zeros":
            return torch.zeros(self.shape)
        if self.layout == "heads":
            return torch.stack([part.unflatten(0, (self.heads, -1)) for part in parts], 1).flatten(0, 2)
        joined = torch.cat(tuple(parts)) if len(parts) > 1 else parts[0]
        return joined.unsqueeze(1) if self.layout == "conv" else joined

    def unpack(self, tensor: Tensor) -> dict[str, Tensor]:
        """Our tensors, by full name, from the file's; the inverse of :meth:`pack`.

        Raises :class:`HFImportError` for a tensor of another shape, or a bias that is not zero.
        """
        if tuple(tensor.shape) != self.shape:
            raise HFImportError(f"{self.key} has shape {tuple(tensor.shape)}, but config.json describes {self.shape}")
        if self.layout == "zeros":
            if tensor.any():
                raise HFImportError(f"{self.key} is not zero: linear layers have no bias here. Only a model without biases fits")
            return {}
        if self.layout == "heads":
            pieces = [piece.flatten(0, 1) for piece in tensor.unflatten(0, (self.heads, len(self.parts), -1)).unbind(1)]
        else:
            joined = tensor.squeeze(1) if self.layout == "conv" else tensor
            pieces = list(joined.split([shape[0] for shape in self.shapes]))
        return dict(zip(self.parts, pieces, strict=True))


_MAMBA = {
    "mixer.in_proj.weight": _rows("in_proj_x", "in_proj_z"),
    "mixer.conv1d.weight": _conv("conv_weight"),
    "mixer.conv1d.bias": _rows("conv_bias"),
    "mixer.x_proj.weight": _rows("x_proj"),
    "mixer.dt_proj.weight": _rows("dt_proj"),
    "mixer.dt_proj.bias": _rows("dt_bias"),
    "mixer.A_log": _rows("A_log"),
    "mixer.D": _rows("D"),
    "mixer.out_proj.weight": _rows("out_proj"),
}
_MAMBA2 = {
    "mixer.in_proj.weight": _rows("in_proj_z", "in_proj_x", "in_proj_B", "in_proj_C", "in_proj_dt"),
    "mixer.conv1d.weight": _conv("conv_x_weight", "conv_B_weight", "conv_C_weight"),
    "mixer.conv1d.bias": _rows("conv_x_bias", "conv_B_bias", "conv_C_bias"),
    "mixer.dt_bias": _rows("dt_bias"),
    "mixer.A_log": _rows("A_log"),
    "mixer.D": _rows("D"),
    "mixer.norm.weight": _rows("norm_weight"),
    "mixer.out_proj.weight": _rows("out_proj"),
}


def _attention(prefix: str) -> dict[str, Recipe]:
    names = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "o_proj": "out_proj"}
    return {f"{prefix}.{theirs}.weight": _rows(ours) for theirs, ours in names.items()}


def _mlp(prefix: str, up: str = "up_proj", down: str = "down_proj") -> dict[str, Recipe]:
    return {f"{prefix}.{up}.weight": _rows("up_proj"), f"{prefix}.{down}.weight": _rows("down_proj")}


_TRANSFORMER = {"attention": _attention("self_attn"), "mlp": _mlp("mlp")}
_GATED = {"attention": _attention("self_attn"), "mlp": {"mlp.gate_proj.weight": _rows("gate_proj"), **_mlp("mlp")}}

_NORM_KEYS = {"attention": "input_layernorm", "mlp": "post_attention_layernorm"}

# -------------------------------------------------------------------------------------------------------- the classes


@dataclass(frozen=True)
class HFClass:
    """One causal language model class of transformers."""

    architecture: str
    model_type: str
    since: str
    """Lowest transformers version known to compute this class's logits rightly on every path."""
    unit: str | None
    """Our pattern of one Hugging Face layer; None: the class takes any pattern of `mixers`, a layer a letter."""
    mixers: Mapping[str, Mapping[str, Recipe]]
    norm: Literal["rmsnorm", "layernorm", "layernorm1p"]
    fields: Mapping[str, str]
    """config.json key -> field of ModelConfig."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """config.json keys on which the function depends and which ModelConfig does not vary; demanded on import."""
    written: Mapping[str, Any] = field(default_factory=dict)
    """config.json keys written on export that do not change the function (or repair a default that would)."""
    activation_key: str | None = None
    gated: bool = False
    rope: Literal["none", "full", "partial"] = "none"
    rope_keys: tuple[str, str] = ("rope_theta", "partial_rotary_factor")
    head_dim: Literal["free", "divides", "exact"] = "free"
    """What the class asks of the heads: nothing, heads dividing hidden_size, or heads * head_dim = hidden_size."""
    root: str = "model."
    embedding: str = "embed_tokens"
    final_norm: str = "norm"
    head: str = "lm_head.weight"
    ties: bool = True
    """Whether the class can share embedding and output; else a tied model's embedding is written under both keys."""
    norm_keys: Mapping[str, str] = field(default_factory=lambda: _NORM_KEYS)
    aliases: tuple[tuple[str, str], ...] = ()
    """(prefix found in some files, the prefix of this table)."""
    note: str = ""
    """A limit of the class that its user should know, for the model card."""

    def tensors(self, config: ModelConfig) -> Iterator[HFTensor]:
        """Every tensor of the file, in the model's order; raises KeyError if `config` is not of this class's kind."""
        table = parameter_table(config)

        def tensor(key: str, recipe: Recipe, prefix: str) -> HFTensor:
            parts = tuple(f"{prefix}.{part}" for part in recipe.parts)
            rows = [table[part] for part in parts]
            return HFTensor(
                key, parts, tuple(row.shape for row in rows), recipe.layout, all(row.fp32 for row in rows), config.attention.n_heads
            )

        def norm(key: str, prefix: str) -> Iterator[HFTensor]:
            for part in ("weight",) if self.norm == "rmsnorm" else ("weight", "bias"):
                yield tensor(f"{key}.{part}", _rows(part), prefix)

        yield tensor(f"{self.root}{self.embedding}.weight", _rows("weight"), "embedding")
        per_layer = len(self.unit or "-")
        for i, kind in enumerate(config.layers):
            layer = f"{self.root}layers.{i // per_layer}."
            yield from norm(layer + self.norm_keys[kind], f"layers.{i}.norm")
            for key, recipe in self.mixers[kind].items():
                yield tensor(layer + key, recipe, f"layers.{i}.mixer")
        yield from norm(self.root + self.final_norm, "final_norm")
        if not (config.tie_embeddings and self.ties):
            yield tensor(self.head, _rows("weight"), "embedding" if config.tie_embeddings else "output")


_MODEL_FIELDS = {"vocab_size": "vocab_size", "hidden_size": "hidden_size", "tie_word_embeddings": "tie_embeddings"}
_ATTENTION_FIELDS = {
    **_MODEL_FIELDS,
    "num_attention_heads": "attention.n_heads",
    "num_key_value_heads": "attention.n_kv_heads",
    "head_dim": "attention.head_dim",
    "intermediate_size": "mlp.ffn_size",
}
_BACKBONE: dict[str, Any] = {
    "root": "backbone.",
    "embedding": "embeddings",
    "final_norm": "norm_f",
    "norm_keys": dict.fromkeys(("mamba", "mamba2", "attention", "mlp"), "norm"),
}
_SSM_FIXED = {"use_bias": False, "use_conv_bias": True}
_NO_BIAS = {"attention_bias": False, "mlp_bias": False}


def _transformer(architecture: str, model_type: str, eps: str, **settings: Any) -> HFClass:
    fields = {**_ATTENTION_FIELDS, eps: "norm_eps"}
    if settings.get("head_dim") == "exact":
        del fields["head_dim"]
    gated = settings.get("gated", False)
    settings = {"mixers": _GATED if gated else _TRANSFORMER, "fields": fields, "activation_key": "hidden_act", **settings}
    return HFClass(f"{architecture}ForCausalLM", model_type, unit="*-", **settings)


# fmt: off
CLASSES = (
    HFClass(
        "MambaForCausalLM", "mamba", "4.57.6", "m", {"mamba": _MAMBA}, "rmsnorm",
        {**_MODEL_FIELDS, "intermediate_size": "mamba.d_inner", "state_size": "mamba.state_size",
         "time_step_rank": "mamba.dt_rank", "conv_kernel": "mamba.conv_width", "layer_norm_epsilon": "norm_eps"},
        fixed={**_SSM_FIXED, "hidden_act": "silu"},
        written={"residual_in_fp32": False},
        aliases=(("backbone.embedding.", "backbone.embeddings."),),
        note="Feed a cached state one token at a time: given several, the pure-torch path restarts from a zero state.",
        **_BACKBONE,
    ),
    HFClass(
        "Mamba2ForCausalLM", "mamba2", "5.23.0", "M", {"mamba2": _MAMBA2}, "rmsnorm",
        {**_MODEL_FIELDS, "num_heads": "mamba2.n_heads", "head_dim": "mamba2.head_dim", "state_size": "mamba2.state_size",
         "n_groups": "mamba2.n_groups", "conv_kernel": "mamba2.conv_width", "layer_norm_epsilon": "norm_eps"},
        fixed={**_SSM_FIXED, "hidden_act": "silu", "time_step_limit": (0.0, math.inf)},
        written={"chunk_size": 128, "residual_in_fp32": False},
        note="Before transformers 5.23.0 the gated norm ignored n_groups: wrong logits for n_groups > 1, with no warning.",
        **_BACKBONE,
    ),
    HFClass(
        "NemotronHForCausalLM", "nemotron_h", "5.15.1", None,
        {"mamba2": _MAMBA2, "attention": _attention("mixer"), "mlp": _mlp("mixer")}, "rmsnorm",
        {**_ATTENTION_FIELDS, "mamba_num_heads": "mamba2.n_heads", "mamba_head_dim": "mamba2.head_dim",
         "ssm_state_size": "mamba2.state_size", "n_groups": "mamba2.n_groups", "conv_kernel": "mamba2.conv_width",
         "layer_norm_epsilon": "norm_eps"},
        fixed={**_SSM_FIXED, **_NO_BIAS, "mamba_hidden_act": "silu", "sliding_window": None, "num_nextn_predict_layers": 0,
               "time_step_limit": (0.0, math.inf)},
        # time_step_min clamps dt in the class's prefill (default 1e-3), which no layer here does; 0 would not load.
        written={"chunk_size": 128, "residual_in_fp32": False, "time_step_min": 1e-30, "mamba_proj_bias": False},
        activation_key="mlp_hidden_act",
        ties=False,
        aliases=(("model.", "backbone."),),
        note="transformers 5.3 to 5.14 compute this class wrongly on CPU beyond chunk_size tokens. "
             "vLLM ignores mlp_hidden_act here and always applies squared ReLU.",
        **_BACKBONE,
    ),
    _transformer("Llama", "llama", "rms_norm_eps", since="4.57.6", norm="rmsnorm", gated=True, rope="full", fixed=_NO_BIAS,
                 head_dim="divides"),
    _transformer("Phi3", "phi3", "rms_norm_eps", since="5.23.0", norm="rmsnorm", gated=True, rope="partial",
                 fixed={"sliding_window": None},
                 mixers={"attention": {"self_attn.qkv_proj.weight": _rows("q_proj", "k_proj", "v_proj"),
                                       "self_attn.o_proj.weight": _rows("out_proj")},
                         "mlp": {"mlp.gate_up_proj.weight": _rows("gate_proj", "up_proj"),
                                 "mlp.down_proj.weight": _rows("down_proj")}}),
    _transformer("Arcee", "arcee", "rms_norm_eps", since="4.57.6", norm="rmsnorm", rope="full", fixed=_NO_BIAS, head_dim="divides"),
    _transformer("StableLm", "stablelm", "layer_norm_eps", since="4.57.6", norm="layernorm", gated=True, rope="partial",
                 fixed={"use_qkv_bias": False, "qk_layernorm": False, "use_parallel_residual": False}, head_dim="exact"),
    _transformer("Starcoder2", "starcoder2", "norm_epsilon", since="4.57.6", norm="layernorm", rope="full",
                 fixed={"use_bias": False, "sliding_window": None},
                 mixers={"attention": _attention("self_attn"), "mlp": _mlp("mlp", "c_fc", "c_proj")}),
    _transformer("Jais2", "jais2", "layer_norm_eps", since="5.23.0", norm="layernorm", rope="full", fixed=_NO_BIAS,
                 head_dim="divides"),
    _transformer("GPTNeoX", "gpt_neox", "layer_norm_eps", since="5.23.0", norm="layernorm", rope="partial",
                 rope_keys=("rotary_emb_base", "rotary_pct"), head_dim="exact",
                 fields={**_MODEL_FIELDS, "num_attention_heads": "attention.n_heads", "intermediate_size": "mlp.ffn_size",
                         "layer_norm_eps": "norm_eps"},
                 fixed={"attention_bias": False, "use_parallel_residual": False},
                 mixers={"attention": {"attention.query_key_value.weight": Recipe("heads", ("q_proj", "k_proj", "v_proj")),
                                       "attention.dense.weight": _rows("out_proj")},
                         "mlp": {**_mlp("mlp", "dense_h_to_4h", "dense_4h_to_h"),
                                 "mlp.dense_h_to_4h.bias": Recipe("zeros", ("up_proj",)),
                                 "mlp.dense_4h_to_h.bias": Recipe("zeros", ("down_proj",))}},
                 root="gpt_neox.", embedding="embed_in", final_norm="final_layer_norm", head="embed_out.weight",
                 aliases=(("lm_head.", "embed_out."),)),
    _transformer("Nemotron", "nemotron", "norm_eps", since="4.57.6", norm="layernorm1p", rope="partial", fixed=_NO_BIAS),
)
# fmt: on
"""In order of preference where several hold a model exactly."""


def choose(config: ModelConfig, architecture: str | None = None) -> HFClass:
    """The class that holds the model (the one named `architecture`, if given).

    A class that stores the norm's weight as it is here comes before one that needs it shifted by one. Raises
    :class:`HFExportError` saying what each nearest class would need instead.
    """
    if architecture is not None:
        named = [cls for cls in CLASSES if cls.architecture == architecture]
        if not named:
            known = ", ".join(cls.architecture for cls in CLASSES)
            raise HFExportError(f"architecture = {architecture!r}: not a class this exporter knows. Choose from {known}")
        candidates = named
    else:
        candidates = _candidates(config)
    needs = {cls.architecture: _needs(cls, config) for cls in candidates}
    fitting = [cls for cls in candidates if not needs[cls.architecture]]
    if fitting:
        return min(fitting, key=lambda cls: cls.norm != config.norm)
    fewest = min(len(unmet) for unmet in needs.values())
    nearest = "; ".join(f"{name} would need {' and '.join(unmet)}" for name, unmet in needs.items() if len(unmet) == fewest)
    raise HFExportError(f"no Hugging Face class holds the model {config.name!r} (pattern {config.pattern}). {nearest}")


def _candidates(config: ModelConfig) -> list[HFClass]:
    """The classes whose kind of pattern this is, so that a refusal names those it could reasonably become."""
    letters = set(config.pattern) - {"|"}
    if "m" in letters and len(letters) > 1:
        raise HFExportError(
            f"model.pattern = {config.pattern!r}: no Hugging Face class mixes Mamba (S6, `m`) layers with others. "
            "`m` alone fits MambaForCausalLM; with Mamba-2 (`M`) instead of `m`, Mamba2ForCausalLM or NemotronHForCausalLM may fit"
        )
    wanted = {"m": ("mamba",), "M": ("mamba2",)}.get("".join(letters), ("nemotron_h",))
    transformers = [cls for cls in CLASSES if cls.unit == "*-" and _pattern_fits(cls, config)]
    return transformers + [cls for cls in CLASSES if cls.model_type in wanted]


def _pattern_fits(cls: HFClass, config: ModelConfig) -> bool:
    pattern = config.pattern.replace("|", "")
    if cls.unit is None:
        return "m" not in pattern and "*" in pattern
    return pattern == cls.unit * (len(pattern) // len(cls.unit))


def _needs(cls: HFClass, config: ModelConfig) -> list[str]:
    """What would have to change in `config` for `cls` to hold it, as settings to make; empty if it fits."""
    attention, mlp, kinds = config.attention, config.mlp, set(config.layers)
    rotary, hidden = attention.rotary_dim if "attention" in kinds else 0, config.hidden_size
    d_inner = {"m": config.mamba.d_inner, "M": config.mamba2.d_inner}.get(cls.unit or "", 0)
    checks = [
        (not _pattern_fits(cls, config),
         "at least one attention layer (`*`) in model.pattern, and no `m`: its cache cannot work otherwise"
         if cls.unit is None else f"model.pattern to repeat {cls.unit!r} and nothing else"),
        ((config.norm == "rmsnorm") != (cls.norm == "rmsnorm"),
         f"model.norm={cls.norm} (it is {config.norm})"),
        (d_inner % hidden != 0, f"d_inner to be a multiple of model.hidden_size = {hidden} (it is {d_inner})"),
    ]  # fmt: skip
    if "mlp" in kinds and "mlp" in cls.mixers:
        gated = mlp.activation == "swiglu"
        checks.append(
            (
                gated != cls.gated,
                f"{'model.mlp.activation=swiglu' if cls.gated else 'an ungated model.mlp.activation'} (it is {mlp.activation})",
            )
        )
    if "attention" in kinds and "attention" in cls.mixers:
        fraction = f"(it is {attention.rotary_fraction})"
        size = f"(heads x head_dim is {attention.n_heads} x {attention.head_dim}, hidden_size {hidden})"
        checks += [
            (cls.rope == "none" and rotary != 0, f"model.attention.rotary_fraction=0 {fraction}"),
            (cls.rope == "full" and rotary != attention.head_dim, f"model.attention.rotary_fraction=1.0 {fraction}"),
            (cls.rope == "partial" and rotary == 0, f"model.attention.rotary_fraction above 0 {fraction}"),
            (cls.head_dim == "divides" and hidden % attention.n_heads != 0, f"a hidden_size divisible by the heads {size}"),
            (cls.head_dim == "exact" and attention.n_heads * attention.head_dim != hidden,
             f"heads x head_dim = hidden_size {size}"),
            ("num_key_value_heads" not in cls.fields and attention.n_kv_heads != attention.n_heads,
             f"model.attention.n_kv_heads={attention.n_heads} (it is {attention.n_kv_heads})"),
        ]  # fmt: skip
    return [need for unmet, need in checks if unmet]
