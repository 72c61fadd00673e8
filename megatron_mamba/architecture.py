"""The settings of a model: its pattern of layers and what each kind of mixer needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_mamba.layout import SplitUnits
from megatron_mamba.schema import require, require_positive

MIXER_KINDS = {"M": "mamba2", "m": "mamba", "*": "attention", "-": "mlp"}
"""The pattern's alphabet: letter -> mixer. ``|`` marks a pipeline-stage border and is no layer."""


@dataclass(frozen=True)
class MambaConfig:
    """The Mamba (S6) mixer, arXiv 2312.00752 section 3.4."""

    d_inner: int = 8192
    state_size: int = 128
    dt_rank: int = 256
    conv_width: int = 4

    def validate(self) -> None:
        require_positive(self, "model.mamba", "d_inner", "state_size", "dt_rank", "conv_width")


@dataclass(frozen=True)
class Mamba2Config:
    """The Mamba-2 (SSD) mixer, arXiv 2405.21060 section 7. Heads share the (B, C) pair of their group: n_groups = 1
    is the multi-value pattern (MVA), n_groups = number of heads is multi-head (MHA), between them grouped-value (GVA)."""

    d_inner: int = 8192
    head_dim: int = 64
    state_size: int = 128
    n_groups: int = 8
    conv_width: int = 4

    @property
    def n_heads(self) -> int:
        return self.d_inner // self.head_dim

    @property
    def group_size(self) -> int:
        """Channels that the gated norm normalises together."""
        return self.d_inner // self.n_groups

    def validate(self) -> None:
        prefix = "model.mamba2"
        require_positive(self, prefix, "d_inner", "head_dim", "state_size", "n_groups", "conv_width")
        require(
            self.d_inner % self.head_dim == 0, f"{prefix}.head_dim", self.head_dim,
            f"d_inner = {self.d_inner} is not a multiple of it", f"Choose a divisor of {self.d_inner}",
        )
        require(
            self.n_heads % self.n_groups == 0, f"{prefix}.n_groups", self.n_groups,
            f"the {self.n_heads} heads (d_inner / head_dim) cannot be shared out evenly",
            f"Choose a divisor of {self.n_heads}",
        )


@dataclass(frozen=True)
class AttentionConfig:
    """Causal softmax attention: MHA (n_kv_heads = n_heads), GQA or MQA (n_kv_heads = 1)."""

    n_heads: int = 32
    n_kv_heads: int = 8
    head_dim: int = 128
    rotary_fraction: float = 0.0
    """Fraction of head_dim that RoPE rotates; 0 = no position embedding, 1 = all of it."""
    rope_base: float = 10000.0

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.rotary_fraction)

    def validate(self) -> None:
        prefix = "model.attention"
        require_positive(self, prefix, "n_heads", "n_kv_heads", "head_dim", "rope_base")
        require(
            self.n_heads % self.n_kv_heads == 0, f"{prefix}.n_kv_heads", self.n_kv_heads,
            f"the {self.n_heads} query heads cannot be shared out evenly", f"Choose a divisor of {self.n_heads}",
        )
        require(
            0.0 <= self.rotary_fraction <= 1.0 and self.rotary_dim % 2 == 0,
            f"{prefix}.rotary_fraction", self.rotary_fraction,
            f"it must lie in [0, 1] and rotate an even number of the {self.head_dim} dimensions",
            "Use 0 (no position embedding), 0.5 or 1.0",
        )


@dataclass(frozen=True)
class MLPConfig:
    """The feed-forward mixer: down(act(up(x))), or down(silu(gate(x)) * up(x)) for swiglu."""

    ffn_size: int = 16384
    activation: Literal["gelu", "gelu_tanh", "squared_relu", "swiglu"] = "gelu"

    def validate(self) -> None:
        require_positive(self, "model.mlp", "ffn_size")


@dataclass(frozen=True)
class InitConfig:
    """Initialisation of the weights, as in the 8B runs of arXiv 2406.07887; A_log, D and dt_bias follow the Mamba papers."""

    std: float = 0.02
    depth: int | None = None
    """Number of layers in the residual rescaling 1/sqrt(depth) and 1/sqrt(2 depth); default: letters of the pattern."""
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    dt_floor: float = 1e-4
    A_min: float = 1.0
    A_max: float = 16.0

    def validate(self) -> None:
        require_positive(self, "model.init", "std", "dt_min", "dt_floor", "A_min")
        for low, high in (("dt_min", "dt_max"), ("A_min", "A_max")):
            require(getattr(self, low) < getattr(self, high), f"model.init.{high}", getattr(self, high),
                    f"not above model.init.{low} = {getattr(self, low)}", "Swap or widen the range")


@dataclass(frozen=True)
class ModelConfig:
    """A language model as a pattern of mixers: each layer is ``x + mixer(norm(x))``."""

    name: str
    pattern: str
    """Letters `M` Mamba-2, `m` Mamba (S6), `*` attention, `-` MLP; `|` is a pipeline-stage border."""
    hidden_size: int
    vocab_size: int = 256000
    norm: Literal["rmsnorm", "layernorm", "layernorm1p"] = "rmsnorm"
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    mamba: MambaConfig = field(default_factory=MambaConfig)
    mamba2: Mamba2Config = field(default_factory=Mamba2Config)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    mlp: MLPConfig = field(default_factory=MLPConfig)
    init: InitConfig = field(default_factory=InitConfig)

    @property
    def layers(self) -> tuple[str, ...]:
        """Mixer kind of each layer, in order (``"mamba2"``, ``"mamba"``, ``"attention"``, ``"mlp"``)."""
        return tuple(MIXER_KINDS[letter] for letter in self.pattern if letter != "|")

    def validate(self) -> None:
        unknown = sorted(set(self.pattern) - set(MIXER_KINDS) - {"|"})
        require(
            not unknown, "model.pattern", self.pattern, f"unknown letter {', '.join(map(repr, unknown))}",
            "Use M (Mamba-2), m (Mamba), * (attention), - (MLP) and | (pipeline-stage border)",
        )
        require(bool(self.pattern.strip("|")), "model.pattern", self.pattern, "names no layer", "Write at least one letter")
        require_positive(self, "model", "hidden_size", "vocab_size", "norm_eps")
        for kind in sorted({*self.layers}):
            getattr(self, kind).validate()
        self.init.validate()

    @property
    def halo(self) -> int:
        """Tokens before a piece of a sequence that the widest convolution sees."""
        widths = {"mamba": self.mamba.conv_width, "mamba2": self.mamba2.conv_width}
        return max((widths.get(kind, 1) - 1 for kind in self.layers), default=0)

    def split_units(self) -> list[SplitUnits]:
        """What tensor parallelism shares out, of the mixers that the pattern uses.

        Restates, with the names of settings, the split dimensions of the parameter table (model/parameters.py): on purpose,
        as reading a configuration must not load torch. tests/unit/test_layout.py holds the two together.
        """
        m, m2, a, mlp = self.mamba, self.mamba2, self.attention, self.mlp
        of_kind = {
            "mamba": [SplitUnits("model.mamba.d_inner", m.d_inner, m.d_inner, "Mamba's inner channels")],
            "mamba2": [
                SplitUnits("model.mamba2.d_inner", m2.d_inner, m2.n_heads, f"{m2.n_heads} Mamba-2 heads"),
                SplitUnits("model.mamba2.n_groups", m2.n_groups, m2.n_groups, "Mamba-2's B/C groups", shared=True),
            ],
            "attention": [
                SplitUnits("model.attention.n_heads", a.n_heads, a.n_heads, "attention heads"),
                SplitUnits("model.attention.n_kv_heads", a.n_kv_heads, a.n_kv_heads, "key/value heads", shared=True),
            ],
            "mlp": [SplitUnits("model.mlp.ffn_size", mlp.ffn_size, mlp.ffn_size, "the feed-forward size")],
        }
        vocabulary = SplitUnits("model.vocab_size", self.vocab_size, self.vocab_size, "the vocabulary", pads=True)
        return [vocabulary, *(units for kind in of_kind if kind in self.layers for units in of_kind[kind])]
