"""Tiny models of every class, with weights under which every parameter matters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_mamba.config import AttentionConfig, Mamba2Config, MambaConfig, MLPConfig, ModelConfig
from megatron_mamba.model import LanguageModel, build
from megatron_mamba.model.parameters import parameter_table
from megatron_mamba.parallel.context import ParallelContext
from megatron_mamba.parallel.fsdp import local

BASE = ModelConfig(
    name="tiny",
    pattern="M",
    hidden_size=48,
    vocab_size=83,
    mamba=MambaConfig(d_inner=96, state_size=5, dt_rank=7),
    mamba2=Mamba2Config(d_inner=96, head_dim=12, state_size=10, n_groups=4),
    attention=AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=12, rotary_fraction=1.0, rope_base=500.0),
    mlp=MLPConfig(ffn_size=56),
)


def tiny(pattern: str, **changes: Any) -> ModelConfig:
    """BASE with another pattern; `changes` of groups are given as dicts, of single settings as values."""
    groups = {k: replace(getattr(BASE, k), **v) if isinstance(v, dict) else v for k, v in changes.items()}
    config = replace(BASE, pattern=pattern, **groups)
    config.validate()
    return config


NO_ROPE, HALF_ROPE = {"rotary_fraction": 0.0, "rope_base": 10000.0}, {"rotary_fraction": 0.5}
MHA, HALF_MHA = {"n_kv_heads": 4}, {"n_kv_heads": 4, "rotary_fraction": 0.5}
SQUARED_RELU, SWIGLU = {"activation": "squared_relu"}, {"activation": "swiglu"}

CASES: dict[str, tuple[str, ModelConfig]] = {
    "mamba": ("Mamba", tiny("m|m")),
    "mamba, tied, 3x": ("Mamba", tiny("mm", tie_embeddings=True, mamba={"d_inner": 144, "conv_width": 3})),
    "mamba2, 4 groups": ("Mamba2", tiny("MM")),
    "mamba2, 1 group": ("Mamba2", tiny("MM", mamba2={"n_groups": 1})),
    "hybrid, gelu, GQA": ("NemotronH", tiny("M*-M-", attention=NO_ROPE)),
    "hybrid, squared relu, MHA": (
        "NemotronH",
        tiny(
            "MM*--M",
            attention={**NO_ROPE, "n_kv_heads": 4, "head_dim": 10},
            mlp=SQUARED_RELU,
            mamba2={"d_inner": 60, "n_groups": 1},
        ),
    ),
    "hybrid, tanh gelu, tied": ("NemotronH", tiny("*M-", attention=NO_ROPE, mlp={"activation": "gelu_tanh"}, tie_embeddings=True)),
    "hybrid without MLP": ("NemotronH", tiny("MM*", attention=NO_ROPE, mlp=SWIGLU)),
    "transformer without position": ("NemotronH", tiny("*-*-", attention=NO_ROPE)),
    "nemotron, MHA": ("Nemotron", tiny("*-*-", norm="layernorm1p", attention=HALF_MHA, mlp=SQUARED_RELU)),
    "nemotron, GQA, wide heads": (
        "Nemotron",
        tiny("*-*-", norm="layernorm1p", attention={**HALF_ROPE, "head_dim": 20}, mlp=SQUARED_RELU),
    ),
    "nemotron, plain weights": ("Nemotron", tiny("*-*-", norm="layernorm", attention=HALF_ROPE)),
    "stablelm, half rope": ("StableLm", tiny("*-*-", norm="layernorm", attention=HALF_ROPE, mlp=SWIGLU)),
    "stablelm, zero-centred weights": ("StableLm", tiny("*-*-", norm="layernorm1p", attention=MHA, mlp=SWIGLU)),
    "llama": ("Llama", tiny("*-*-", mlp=SWIGLU)),
    "llama, tied, MHA, narrow heads": ("Llama", tiny("*-", mlp=SWIGLU, tie_embeddings=True, attention={**MHA, "head_dim": 8})),
    "phi3": ("Phi3", tiny("*-*-", mlp=SWIGLU, attention=HALF_ROPE)),
    "phi3, wide heads": ("Phi3", tiny("*-", mlp=SWIGLU, attention={**HALF_ROPE, "head_dim": 16})),
    "arcee, squared relu": ("Arcee", tiny("*-*-", mlp=SQUARED_RELU)),
    "arcee, gelu": ("Arcee", tiny("*-", norm_eps=1e-6)),
    "starcoder2": ("Starcoder2", tiny("*-*-", norm="layernorm", mlp={"activation": "gelu_tanh"})),
    "jais2": ("Jais2", tiny("*-*-", norm="layernorm", mlp=SQUARED_RELU)),
    "gpt-neox": ("GPTNeoX", tiny("*-*-", norm="layernorm", attention=HALF_MHA)),
}
"""Class (without its ForCausalLM) and model; every class of the table at least once."""


def weights(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """Random global tensors: initial values and zeros would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name, row in parameter_table(config).items():
        noise = torch.randn(row.shape, generator=generator)
        if row.decay:
            values[name] = noise * (2.0 if "conv" in name else 1.0) / row.shape[-1] ** 0.5
        elif row.init.kind == "constant":
            values[name] = row.init.a + 0.3 * noise
        else:
            values[name] = 0.5 * noise
        if name.endswith("dt_bias"):
            # Time steps of 0.1, and of 1e-4 in every third head: below the smallest that some classes allow by default.
            values[name] -= 2.0
            values[name][::3] -= 7.0
    return values


def load(config: ModelConfig, values: dict[str, Tensor], context: ParallelContext) -> LanguageModel:
    """Our model, in fp32, with these weights."""
    model = build(config, context)
    for name, parameter in model.named_parameters():
        local(parameter.detach()).copy_(values[name])
    return model.eval()
