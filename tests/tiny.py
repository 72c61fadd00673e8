"""Tiny models for tests on a CPU in float64: every architecture, no two sizes equal where a mix-up could hide."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_mamba.config import AttentionConfig, Mamba2Config, MambaConfig, MLPConfig, ModelConfig, ParallelConfig
from megatron_mamba.model import LanguageModel, build
from megatron_mamba.model.lm import initialize
from megatron_mamba.parallel import fsdp
from megatron_mamba.parallel.context import ParallelContext

BASE = ModelConfig(
    name="tiny",
    pattern="M",
    hidden_size=24,
    vocab_size=61,
    mamba=MambaConfig(d_inner=40, state_size=5, dt_rank=3),
    mamba2=Mamba2Config(d_inner=48, head_dim=8, state_size=10, n_groups=2),
    attention=AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=8, rotary_fraction=0.5, rope_base=100.0),
    mlp=MLPConfig(ffn_size=40),
)


def tiny(pattern: str, **changes: Any) -> ModelConfig:
    """BASE with another pattern; `changes` of groups are given as dicts, of single settings as values."""
    groups = {k: replace(getattr(BASE, k), **v) if isinstance(v, dict) else v for k, v in changes.items()}
    config = replace(BASE, pattern=pattern, **groups)
    config.validate()
    return config


ARCHITECTURES = {
    "mamba": tiny("mm"),
    "mamba2": tiny("MM"),
    "mamba2 one group, width 2": tiny("MM", mamba2={"n_groups": 1, "conv_width": 2}),
    "mamba2 a group a head": tiny("M", mamba2={"n_groups": 6}),
    "transformer": tiny("*-*-", norm="layernorm1p", attention={"n_kv_heads": 4}, mlp={"activation": "squared_relu"}),
    "llama": tiny("*-*-", tie_embeddings=True, attention={"rotary_fraction": 1.0}, mlp={"activation": "swiglu"}),
    "multi-query, layernorm": tiny("*-", norm="layernorm", attention={"n_kv_heads": 1}, mlp={"activation": "gelu_tanh"}),
    "mlp only": tiny("--"),
    "hybrid": tiny("M-M*-M", attention={"rotary_fraction": 0.0}),
    "everything": tiny("m-*M", tie_embeddings=True, init={"depth": 2}),
}


@contextmanager
def one_process() -> Iterator[ParallelContext]:
    """A context of one rank; leaves a process group that was there before alone."""
    ours = not dist.is_initialized()
    context = ParallelContext.create(ParallelConfig(), "cpu")
    try:
        yield context
    finally:
        if ours:
            context.close()


def random_model(
    config: ModelConfig, context: ParallelContext, *, seed: int = 0, precision: str = "fp64", sharded: bool = True
) -> LanguageModel:
    """The model with weights under which every parameter matters: initial ones and zeros would hide mistakes.

    Not `sharded`: without FSDP, whose hooks cost more than the layers of a tiny model.
    """
    model = build(config, context, precision=precision, device=None if sharded else "meta")
    if not sharded:
        model.to_empty(device="cpu").eval()
        if config.tie_embeddings:
            model.output.weight = model.embedding.weight
        initialize(model, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter, row in model.table_parameters():
        local = fsdp.local(parameter.detach())
        noise = torch.randn(local.shape, generator=generator, dtype=torch.float64)
        if row.decay:
            local.copy_(noise * (3.0 if "conv" in name else 1.5) / local.shape[-1] ** 0.5)
        else:
            local.add_(0.2 * noise)
    return model


def random_tokens(*shape: int, seed: int = 0, vocab_size: int = BASE.vocab_size) -> torch.Tensor:
    """Token ids, int64."""
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def gradients(model: LanguageModel) -> dict[str, torch.Tensor]:
    """A copy of every parameter's gradient by name, as a plain tensor; the model's are cleared."""
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        found[name] = fsdp.local(parameter.grad).clone()
        parameter.grad = None
    return found


def assert_equal(found: torch.Tensor, expected: torch.Tensor, what: str, tolerance: float = 1e-10) -> None:
    """Largest difference at most `tolerance` of the largest expected value."""
    assert found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    scale = max(expected.abs().max().item(), 1e-12)
    error = (found - expected).abs().max().item() / scale
    assert error <= tolerance, f"{what}: relative difference {error:.2e}"
