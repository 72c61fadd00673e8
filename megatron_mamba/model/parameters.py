"""The one table of parameters: name, global shape, split, initialisation, decay and precision of every tensor.

Construction, initialisation, sharding, optimizer groups, checkpoints, Hugging Face conversion and parameter counts all
read what is declared here. A parameter's *global* tensor has one meaning on every mesh, and its initial value is drawn
from a generator seeded by the run's seed and the parameter's name, so step-0 weights are bit-equal on every mesh.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from megatron_mamba.config import ModelConfig

_BLOCK = 1 << 20
"""Elements drawn from one generator: a rank draws only the blocks that its slice touches."""


DRAWN = ("normal", "uniform", "constant")
"""Kinds of initial values that are drawn and no more: no logarithm or exponential is taken of them."""


@dataclass(frozen=True)
class Init:
    """How a tensor starts: ``normal`` (std a), ``uniform`` (in ±a), ``constant`` (a), ``log_uniform`` (A_log = log U(a, b)),
    ``log_range`` (A_log[e, n] = log(n + 1)) or ``dt_bias`` (softplus^-1 of log-uniform [a, b], floored at c)."""

    kind: str
    a: float = 0.0
    b: float = 0.0
    c: float = 0.0


@dataclass(frozen=True)
class ParameterSpec:
    """One row of the table.

    `dims` holds a letter per dimension (CONTRIBUTING.md); a lower-case letter is split over tp, in whole `units`
    (heads, groups): with fewer units than ranks the tensor is replicated and a rank uses the unit it shares.
    """

    name: str
    shape: tuple[int, ...]
    dims: str
    init: Init
    units: int = 1
    decay: bool = True
    fp32: bool = False
    """Stays fp32 in compute too."""

    @property
    def split_dim(self) -> int | None:
        """The dimension split over tensor-parallel ranks, if any."""
        return next((i for i, letter in enumerate(self.dims) if letter.islower()), None)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def _matrix(name: str, shape: tuple[int, ...], dims: str, init: Init, units: int) -> ParameterSpec:
    return ParameterSpec(name, shape, dims, init, units)


def _vector(name: str, shape: tuple[int, ...], dims: str, init: Init, units: int = 1, fp32: bool = True) -> ParameterSpec:
    return ParameterSpec(name, shape, dims, init, units, decay=False, fp32=fp32)


def _kaiming(fan_in: int) -> Init:
    """Kaiming-uniform with a = sqrt(5), the default of torch's linear and convolution layers: U(±1/sqrt(fan_in))."""
    return Init("uniform", 1 / math.sqrt(fan_in))


def _residual(config: ModelConfig, factor: int) -> Init:
    depth = config.init.depth or len(config.layers)
    return Init("normal", config.init.std / math.sqrt(factor * depth))


def _dt_bias(config: ModelConfig) -> Init:
    return Init("dt_bias", config.init.dt_min, config.init.dt_max, config.init.dt_floor)


def mamba2(config: ModelConfig) -> list[ParameterSpec]:
    """Rows of a Mamba-2 mixer (arXiv 2405.21060 section 7): z, x, B, C, dt are parallel projections of the input."""
    c, D = config.mamba2, config.hidden_size
    E, H, G, GN, W = c.d_inner, c.n_heads, c.n_groups, c.n_groups * c.state_size, c.conv_width
    one = Init("constant", 1.0)
    return [
        _matrix("in_proj_z", (E, D), "eD", _kaiming(D), H),
        _matrix("in_proj_x", (E, D), "eD", _kaiming(D), H),
        _matrix("in_proj_B", (GN, D), "gD", _kaiming(D), G),
        _matrix("in_proj_C", (GN, D), "gD", _kaiming(D), G),
        _matrix("in_proj_dt", (H, D), "hD", _kaiming(D), H),
        _matrix("conv_x_weight", (E, W), "eW", _kaiming(W), H),
        _matrix("conv_B_weight", (GN, W), "gW", _kaiming(W), G),
        _matrix("conv_C_weight", (GN, W), "gW", _kaiming(W), G),
        _vector("conv_x_bias", (E,), "e", _kaiming(W), H, fp32=False),
        _vector("conv_B_bias", (GN,), "g", _kaiming(W), G, fp32=False),
        _vector("conv_C_bias", (GN,), "g", _kaiming(W), G, fp32=False),
        _vector("A_log", (H,), "h", Init("log_uniform", config.init.A_min, config.init.A_max), H),
        _vector("D", (H,), "h", one, H),
        _vector("dt_bias", (H,), "h", _dt_bias(config), H),
        _vector("norm_weight", (E,), "e", one, H),
        _matrix("out_proj", (D, E), "De", _residual(config, 1), H),
    ]


def mamba(config: ModelConfig) -> list[ParameterSpec]:
    """Rows of a Mamba (S6) mixer (arXiv 2312.00752 section 3.4); x_proj's rows are dt, B, C."""
    c, D = config.mamba, config.hidden_size
    E, N, R, W = c.d_inner, c.state_size, c.dt_rank, c.conv_width
    return [
        _matrix("in_proj_x", (E, D), "eD", _kaiming(D), E),
        _matrix("in_proj_z", (E, D), "eD", _kaiming(D), E),
        _matrix("conv_weight", (E, W), "eW", _kaiming(W), E),
        _vector("conv_bias", (E,), "e", _kaiming(W), E, fp32=False),
        _matrix("x_proj", (R + 2 * N, E), "Re", _kaiming(E), E),
        _matrix("dt_proj", (E, R), "eR", Init("uniform", R**-0.5), E),
        _vector("dt_bias", (E,), "e", _dt_bias(config), E),
        _vector("A_log", (E, N), "eN", Init("log_range"), E),
        _vector("D", (E,), "e", Init("constant", 1.0), E),
        _matrix("out_proj", (D, E), "De", _residual(config, 1), E),
    ]


def attention(config: ModelConfig) -> list[ParameterSpec]:
    """Rows of causal attention with `n_kv_heads` key/value heads."""
    c, D = config.attention, config.hidden_size
    Q, K = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    normal = Init("normal", config.init.std)
    return [
        _matrix("q_proj", (Q, D), "hD", normal, c.n_heads),
        _matrix("k_proj", (K, D), "kD", normal, c.n_kv_heads),
        _matrix("v_proj", (K, D), "kD", normal, c.n_kv_heads),
        _matrix("out_proj", (D, Q), "Dh", _residual(config, 2), c.n_heads),
    ]


def mlp(config: ModelConfig) -> list[ParameterSpec]:
    """Rows of the feed-forward mixer; gate_proj only where the activation is gated."""
    F, D = config.mlp.ffn_size, config.hidden_size
    normal = Init("normal", config.init.std)
    gate = [_matrix("gate_proj", (F, D), "fD", normal, F)] if config.mlp.activation == "swiglu" else []
    return [
        _matrix("up_proj", (F, D), "fD", normal, F),
        *gate,
        _matrix("down_proj", (D, F), "Df", _residual(config, 2), F),
    ]


def norm(config: ModelConfig) -> list[ParameterSpec]:
    """Rows of a normalisation over the hidden size; LayerNorm-1p stores weight - 1."""
    D = (config.hidden_size,)
    weight = _vector("weight", D, "D", Init("constant", 0.0 if config.norm == "layernorm1p" else 1.0))
    return [weight] if config.norm == "rmsnorm" else [weight, _vector("bias", D, "D", Init("constant", 0.0))]


def vocabulary(config: ModelConfig) -> list[ParameterSpec]:
    """The row of the embedding, or of the output projection."""
    V = config.vocab_size
    return [_matrix("weight", (V, config.hidden_size), "vD", Init("normal", config.init.std), V)]


MIXER_ROWS = {"mamba2": mamba2, "mamba": mamba, "attention": attention, "mlp": mlp}


@cache
def parameter_table(config: ModelConfig) -> Mapping[str, ParameterSpec]:
    """Every parameter of the model by its full name, in order of use. Rows carry the full name."""
    groups = [("embedding", vocabulary(config))]
    for i, kind in enumerate(config.layers):
        groups += [(f"layers.{i}.norm", norm(config)), (f"layers.{i}.mixer", MIXER_ROWS[kind](config))]
    groups.append(("final_norm", norm(config)))
    if not config.tie_embeddings:
        groups.append(("output", vocabulary(config)))
    rows = [replace(row, name=f"{prefix}.{row.name}") for prefix, specs in groups for row in specs]
    return {row.name: row for row in rows}


def count(config: ModelConfig) -> int:
    """Number of parameters."""
    return sum(row.numel for row in parameter_table(config).values())


# ------------------------------------------------------------------------------------------------- initial values


def initial_values(spec: ParameterSpec, seed: int, index: tuple[slice, ...], dtype: torch.dtype) -> Tensor:
    """The slice `index` of the parameter's initial global tensor, on the CPU.

    Values are drawn in fp32 in blocks of whole leading rows, each from a generator of its own keyed by (seed, name,
    block), so a slice costs about its share of the tensor and never depends on who asks. `index` has one slice of step
    1 per dimension; `spec.name` must be the full name.
    """
    bounds = [range(size)[part] for size, part in zip(spec.shape, index, strict=True)]
    out = torch.empty([len(b) for b in bounds], dtype=dtype)
    if out.numel() == 0:
        return out
    row = math.prod(spec.shape[1:])
    rows_per_block = max(_BLOCK // row, 1)
    for block in range(bounds[0].start // rows_per_block, (bounds[0].stop - 1) // rows_per_block + 1):
        first = block * rows_per_block
        last = min(first + rows_per_block, spec.shape[0])
        values = _draw(spec, seed, block, (last - first, *spec.shape[1:]))
        low, high = max(first, bounds[0].start), min(last, bounds[0].stop)
        inside = values[(slice(low - first, high - first), *index[1:])]
        out[low - bounds[0].start : high - bounds[0].start] = inside.to(dtype)
    return out


def _draw(spec: ParameterSpec, seed: int, block: int, shape: tuple[int, ...]) -> Tensor:
    key = hashlib.blake2b(f"{seed}/{spec.name}/{block}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
    values, init = torch.empty(shape), spec.init
    if init.kind == "normal":
        return values.normal_(0.0, init.a, generator=generator)
    if init.kind == "uniform":
        return values.uniform_(-init.a, init.a, generator=generator)
    if init.kind == "constant":
        return values.fill_(init.a)
    if init.kind == "log_uniform":
        return values.uniform_(init.a, init.b, generator=generator).log_()
    if init.kind == "log_range":
        return values.copy_(torch.arange(1, shape[-1] + 1, dtype=torch.float64).log().expand(shape))
    if init.kind == "dt_bias":
        dt = values.uniform_(math.log(init.a), math.log(init.b), generator=generator).exp_().clamp_(min=init.c)
        return dt + torch.log(-torch.expm1(-dt))
    raise ValueError(f"parameter {spec.name}: unknown initialisation {init.kind!r}; see Init for the known ones")
