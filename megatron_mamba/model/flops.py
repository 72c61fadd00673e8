"""FLOPs per token, counted exactly from the layer definitions (no rule of thumb such as 6 x parameters)."""

from __future__ import annotations

from collections import Counter

from megatron_mamba.config import Config, ModelConfig
from megatron_mamba.layout import Recompute
from megatron_mamba.model.parameters import MIXER_ROWS

SSD_CHUNK = 128
"""Chunk length Q at which the SSD algorithm's work is counted; the kernels are free to use another."""


def layer_flops(config: ModelConfig, kind: str, seq_length: int, chunk: int = SSD_CHUNK) -> float:
    """Forward FLOPs per token of one mixer of `kind` in documents of `seq_length` tokens (a multiply-add counts two)."""
    D = config.hidden_size
    if kind == "mamba2":
        c = config.mamba2
        E, H, P, N, GN = c.d_inner, c.n_heads, c.head_dim, c.state_size, c.n_groups * c.state_size
        projections = 2 * D * (2 * E + 2 * GN + H) + 2 * E * D
        ssd = 2 * chunk * GN + 2 * H * P * (chunk + 2 * N)
        return projections + ssd + 2 * c.conv_width * (E + 2 * GN)
    if kind == "mamba":
        m = config.mamba
        E, N, R = m.d_inner, m.state_size, m.dt_rank
        projections = 2 * D * 2 * E + 2 * E * (R + 2 * N) + 2 * R * E + 2 * E * D
        return projections + 2 * m.conv_width * E + 9 * E * N
    if kind == "attention":
        a = config.attention
        Q, K = a.n_heads * a.head_dim, a.n_kv_heads * a.head_dim
        return 2 * D * (Q + 2 * K) + 2 * Q * D + 2 * Q * seq_length
    gated = config.mlp.activation == "swiglu"
    return (6 if gated else 4) * D * config.mlp.ffn_size


def flops_per_token(config: ModelConfig, seq_length: int, chunk: int = SSD_CHUNK) -> float:
    """Forward FLOPs per token of the whole model; a training step costs three times as much."""
    layers = sum(layer_flops(config, kind, seq_length, chunk) for kind in config.layers)
    return layers + output_flops(config)


def output_flops(config: ModelConfig) -> float:
    """Forward FLOPs per token of the output projection; looking up the embedding counts none."""
    return 2.0 * config.hidden_size * config.vocab_size


def recomputed_flops(config: Config, kind: str) -> float:
    """Forward FLOPs per token that the backward pass of one layer of `kind` does again."""
    how: Recompute = getattr(config.recompute, kind)
    whole = layer_flops(config.model, kind, config.data.seq_length)
    # The last product is never repeated: nothing needs its result.
    last = sum(2 * row.numel for row in MIXER_ROWS[kind](config.model) if row.dims.startswith("D") and len(row.dims) == 2)
    return {"none": 0.0, "selective": whole - projection_flops(config.model, kind), "full": whole - last}[how]


def projection_flops(config: ModelConfig, kind: str) -> float:
    """FLOPs per token of the products with a layer's first and last weights, in the forward pass or for their gradients."""
    return float(sum(2 * row.numel for row in MIXER_ROWS[kind](config) if "D" in row.dims and len(row.dims) == 2))


def training_flops(config: Config) -> float:
    """FLOPs per token of forward, backward and what is computed again."""
    layers = Counter(config.model.layers)
    again = sum(count * recomputed_flops(config, kind) for kind, count in layers.items())
    return 3 * flops_per_token(config.model, config.data.seq_length) + again
