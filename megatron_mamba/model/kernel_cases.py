"""Which kernels a model uses on a rank, and in which shapes: what is to be checked on its GPU before it trains."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mamba_kernels.checking import Case
from megatron_mamba.config import Config
from megatron_mamba.parallel import tensor
from megatron_mamba.parallel.context import ParallelContext

LONGEST = 4096
"""Tokens of a sequence that are checked, of longer ones too: they are more of the same chunks."""

MOST_TOKENS = 8192
"""Of all sequences together: in float64 a mixer of the 8B models takes 10 GiB for so many."""

ROWS = 512
"""Rows of operators that take each by itself. Logits of a large vocabulary have a GiB in float64."""


def kernel_cases(config: Config, context: ParallelContext) -> list[Case]:
    """The operators that the model's layers and its loss run on this rank, each once, at the sizes they have there (sequences are
    cut to `LONGEST` tokens, and to fewer of them). None in float64, which has no fused kernels."""
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}.get(config.trainer.precision)
    return [] if dtype is None else list(dict.fromkeys(_cases(config, context, dtype)))


def _cases(config: Config, context: ParallelContext, dtype: torch.dtype) -> Iterator[Case]:
    model, documents = config.model, config.data.document_reset
    S = min(config.data.seq_length // context.size("cp"), LONGEST)
    B = max(min(config.trainer.micro_batch_size, MOST_TOKENS // S), 1)
    T = min(B * S, ROWS)

    def local(units: int) -> int:
        return tensor.local_units(0, units, context)

    if "mamba2" in model.layers:
        m2 = model.mamba2
        sizes = {"H": local(m2.n_heads), "P": m2.head_dim, "G": local(m2.n_groups), "N": m2.state_size}
        group = min(m2.group_size, sizes["H"] * m2.head_dim)
        yield Case.of("mamba2_mixer", dtype, B=B, S=S, **sizes, W=m2.conv_width, documents=documents, group_size=group)
        if context.size("cp") > 1 and sizes["H"] > 1:  # Worked in two parts, whose exchanges overlap.
            halves = sizes | {"H": sizes["H"] // 2, "G": max(sizes["G"] // 2, 1)}
            yield Case.of("ssd", dtype, B=B, S=S, **halves, documents=documents, state=True)
    if "mamba" in model.layers:
        m, E = model.mamba, local(model.mamba.d_inner)
        if m.conv_width > 1:
            yield Case.of("causal_conv1d", dtype, B=B, S=S, C=E, W=m.conv_width, documents=documents, layout="packed")
        yield Case.of("selective_scan", dtype, B=1, S=min(S, 1024), E=E, N=m.state_size, documents=documents, layout="packed")
        yield Case.of("swiglu", dtype, T=T, F=E, layout="packed")
    if "attention" in model.layers and model.attention.rotary_dim:
        a = model.attention
        for heads in (a.n_heads, a.n_kv_heads):
            yield Case.of("rope", dtype, B=1, S=T, H=local(heads), P=a.head_dim, rotary=a.rotary_dim, layout="packed")
    if "mlp" in model.layers:
        kind, F = model.mlp.activation, local(model.mlp.ffn_size)
        if kind.startswith("gelu"):
            yield Case.of("gelu", dtype, T=T, F=F, approximate="tanh" if kind == "gelu_tanh" else "none")
        else:
            yield Case.of(kind, dtype, T=T, F=F, layout="packed" if kind == "swiglu" else "")
    norm = "rms_norm" if model.norm == "rmsnorm" else "layer_norm"
    yield Case.of(norm, dtype, T=T, D=model.hidden_size, eps=model.norm_eps)
    V = local(model.vocab_size)
    yield Case.of("loss", dtype, T=T, V=V, start=V * context.rank("tp"))
