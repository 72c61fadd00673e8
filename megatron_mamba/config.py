"""Every setting of a run: frozen dataclasses with types, defaults and checks.

A configuration is a tree of the dataclasses below. :func:`from_dict` builds it from plain data (what Hydra composed, or
the ``config.yaml`` saved with a run) and refuses unknown keys, wrong types and impossible combinations with a
:class:`ConfigError` that names the field, its value and the remedy, before any device memory is taken.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

from megatron_mamba.layout import ParallelConfig, RecomputeConfig, SplitUnits
from megatron_mamba.schema import ConfigError, from_dict, require, require_positive, to_dict  # noqa: F401 (part of this module's interface)

MIXER_KINDS = {"M": "mamba2", "m": "mamba", "*": "attention", "-": "mlp"}
"""The pattern's alphabet: letter -> mixer. ``|`` marks a pipeline-stage border and is no layer."""


# ---------------------------------------------------------------------------------------------------------- model


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
        vocabulary = SplitUnits("model.vocab_size", self.vocab_size, self.vocab_size, "the vocabulary")
        return [vocabulary, *(units for kind in of_kind if kind in self.layers for units in of_kind[kind])]


# ----------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class DataConfig:
    """What the model reads. Exactly one of `path` and `blend` for indexed data."""

    kind: Literal["indexed", "synthetic"] = "indexed"
    path: str | None = None
    """Prefix of PREFIX.bin and PREFIX.idx (Megatron-LM's indexed format)."""
    blend: dict[str, float] | None = None
    """Prefix -> weight, for several corpora."""
    split: tuple[float, float, float] = (969.0, 30.0, 1.0)
    """Shares of the tokens for train, validation and test, cut at document borders in file order."""
    tokenizer: str | None = None
    """SentencePiece .model, or a folder / tokenizer.json of a Hugging Face tokenizer; default: the one recorded with the data."""
    seq_length: int = 4096
    document_reset: bool = False
    """Reset conv, SSM state and attention at document starts."""
    mask_document_ends: bool = False
    """Leave out of the loss the prediction of a new document's first token."""
    seed: int = 1234
    cache_dir: str | None = None
    """Where sample indices are cached; default: beside the data."""
    prefetch: int = 2
    """Micro-batches read ahead by the loader's thread."""

    def validate(self) -> None:
        require_positive(self, "data", "seq_length", "prefetch")
        require(min(self.split) >= 0 and self.split[0] > 0, "data.split", self.split,
                "needs three numbers >= 0 with a positive share for training", "For example data.split=[969,30,1]")
        if self.kind == "synthetic":
            return
        require((self.path is None) != (self.blend is None), "data.path", self.path,
                "give exactly one of data.path and data.blend",
                "Pass data.path=PREFIX (the files PREFIX.bin and PREFIX.idx, written by tools/prepare_data.py)")
        if self.blend is not None:
            require(bool(self.blend) and all(w > 0 for w in self.blend.values()), "data.blend", self.blend,
                    "needs at least one prefix and positive weights", "For example data.blend={a:0.7,b:0.3}")


# ---------------------------------------------------------------------------------------------------------- optim


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over consumed samples. Each length may be given in samples or in tokens, not both."""

    kind: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    warmup_samples: int | None = None
    warmup_tokens: int | None = None
    decay_samples: int | None = None
    """Where the decay ends (cosine, linear) or how long it lasts (wsd); default: the run's end, or a tenth of it (wsd)."""
    decay_tokens: int | None = None

    def validate(self) -> None:
        for name in ("warmup", "decay"):
            samples, tokens = getattr(self, f"{name}_samples"), getattr(self, f"{name}_tokens")
            require(samples is None or tokens is None, f"optim.schedule.{name}_tokens", tokens,
                    f"optim.schedule.{name}_samples = {samples} is set too", "Give one of the two")
            value = samples if samples is not None else tokens
            require(value is None or value >= 0, f"optim.schedule.{name}", value, "must not be negative", "Use 0 or more")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with decay on matrices only."""

    lr: float = 1e-4
    min_lr: float = 1e-5
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 = no clipping."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def validate(self) -> None:
        require_positive(self, "optim", "lr", "eps")
        require(0 <= self.min_lr <= self.lr, "optim.min_lr", self.min_lr, f"must lie in [0, optim.lr = {self.lr}]",
                "Lower it, for example to a tenth of optim.lr")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optim.{name}", value, "must lie in [0, 1)", "Usual: 0.9 and 0.95")
        for name in ("weight_decay", "clip_grad"):
            require(getattr(self, name) >= 0, f"optim.{name}", getattr(self, name), "must not be negative", "Use 0 to turn it off")
        self.schedule.validate()


# -------------------------------------------------------------------------------------------------------- trainer


@dataclass(frozen=True)
class BatchRampConfig:
    """Global batch grows from `start` to trainer.global_batch_size by `increment` over the first `samples` samples."""

    start: int
    increment: int
    samples: int

    def validate(self) -> None:
        require_positive(self, "trainer.batch_ramp", "start", "increment", "samples")


@dataclass(frozen=True)
class TrainerConfig:
    """How long, in what batches, in what precision, and what happens on trouble."""

    train_samples: int | None = None
    train_tokens: int | None = None
    global_batch_size: int = 256
    """Sequences per optimizer step."""
    micro_batch_size: int = 1
    """Sequences per forward pass on one data-parallel rank."""
    batch_ramp: BatchRampConfig | None = None
    precision: Literal["bf16", "fp32", "fp64"] = "bf16"
    """Compute dtype; master weights, gradients and optimizer states are fp32 (fp64 with fp64)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool = False
    """Bit-equal results run to run on the same hardware."""
    kernels: Literal["fused", "reference"] = "fused"
    """What computes on GPUs: Triton kernels, or, to look for the cause of trouble, the plain-torch reference of each."""
    loss_chunk_tokens: int = 0
    """Tokens whose logits exist at one time; 0 = as many as have logits of 1 GiB on a rank."""
    max_skipped_steps: int = 10
    """Steps in a row with a non-finite loss or gradient after which the run stops with a checkpoint."""
    watchdog_seconds: float | None = 900.0
    """Without progress of a rank, after which all write their stacks and end; null: no watchdog."""
    heartbeat_seconds: float = 60.0
    """Without a sign of life of a rank for which others wait, after which they end."""
    health_check: bool = True
    """Before training, whether each rank's machine computes rightly, and how fast it computes, copies and sends."""
    replica_check_interval: int = 100
    """Steps between comparisons of weights that several ranks hold, bit for bit; they are compared before every save too."""
    stop_after_samples: int | None = None
    """Checkpoint and stop once this many samples are consumed (schedules still aim at train_samples)."""

    def validate(self) -> None:
        require_positive(self, "trainer", "global_batch_size", "micro_batch_size", "max_skipped_steps", "heartbeat_seconds",
                         "replica_check_interval")
        require(self.watchdog_seconds is None or self.watchdog_seconds > 0.0, "trainer.watchdog_seconds", self.watchdog_seconds,
                "must be positive", "Use null for no watchdog")
        self.check_chunk()
        require((self.train_samples is None) != (self.train_tokens is None), "trainer.train_samples", self.train_samples,
                "give exactly one of trainer.train_samples and trainer.train_tokens",
                "For example trainer.train_samples=100000")
        require((self.train_samples or self.train_tokens or 0) > 0, "trainer.train_samples",
                self.train_samples or self.train_tokens, "must be positive", "Train on at least one sample")
        if self.batch_ramp is not None:
            self.batch_ramp.validate()
            span = self.global_batch_size - self.batch_ramp.start
            require(span >= 0 and span % self.batch_ramp.increment == 0, "trainer.batch_ramp.increment",
                    self.batch_ramp.increment, f"does not lead from {self.batch_ramp.start} to {self.global_batch_size}",
                    f"Choose a divisor of {span}")

    def check_chunk(self) -> None:
        """Raise :class:`ConfigError` for a negative number of tokens."""
        require(self.loss_chunk_tokens >= 0, "trainer.loss_chunk_tokens", self.loss_chunk_tokens, "must not be negative",
                "Use 0 for as many tokens as have logits of 1 GiB")

    def micro_batches(self, field: str, batch_size: int, dp_size: int) -> int:
        """How many micro-batches make up the share of each of `dp_size` ranks in a batch of the setting `field`. Raises
        :class:`ConfigError` for one that they cannot share out evenly."""
        at_once = self.micro_batch_size * dp_size
        require(batch_size % at_once == 0, field, batch_size,
                f"not a multiple of micro_batch_size {self.micro_batch_size} x {dp_size} data-parallel ranks",
                f"Use a multiple of {at_once}, or another trainer.micro_batch_size")
        return batch_size // at_once


# ---------------------------------------------------------------------------------- checkpoint, logging, eval, run


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, what to keep, what to start from."""

    dir: str | None = None
    """Folder of the run's checkpoints; default: run.dir/checkpoints. A run resumes from the latest one in it."""
    interval: int = 1000
    """Steps between checkpoints; one is always written at the end."""
    async_save: bool = True
    keep_last: int = 2
    keep_every: int = 0
    """Checkpoints whose step is a multiple of it are never deleted; 0 = none."""
    init_from: str | None = None
    """Checkpoint (or file of tools/consolidate.py) whose weights a new run starts from, with fresh optimizer and schedule."""
    on_damage: Literal["error", "previous"] = "error"
    """A damaged latest checkpoint stops the run, or falls back to the newest whole one before it."""

    def validate(self) -> None:
        require_positive(self, "checkpoint", "interval", "keep_last")
        require(self.keep_every >= 0, "checkpoint.keep_every", self.keep_every, "must not be negative", "Use 0 for none")


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases: offline writes to run.dir/wandb for a later ``wandb sync``."""

    mode: Literal["disabled", "offline", "online"] = "offline"
    project: str = "megatron-mamba"
    entity: str | None = None


@dataclass(frozen=True)
class LoggingConfig:
    """Where metrics go besides run.dir/metrics.jsonl, which is always written."""

    interval: int = 10
    """Steps between log lines."""
    console: bool = True
    tensorboard: bool = True
    wandb: WandbConfig = field(default_factory=WandbConfig)
    peak_tflops: float | None = None
    """bf16 dense peak of one device for MFU; default: known for A100, H100, H200, B200, otherwise MFU is left out."""

    def validate(self) -> None:
        require_positive(self, "logging", "interval")


@dataclass(frozen=True)
class EvalConfig:
    """Periodic loss on the validation split (and on the test split at the end of training)."""

    interval: int = 1000
    """Steps between evaluations; 0 = only at the end."""
    samples: int = 256
    """Sequences per evaluation, always the same ones."""

    def validate(self) -> None:
        for name in ("interval", "samples"):
            require(getattr(self, name) >= 0, f"eval.{name}", getattr(self, name), "must not be negative", "Use 0 to turn it off")


@dataclass(frozen=True)
class RunConfig:
    """Where the run lives, what it is called, and the seed of its weights (data.seed orders the samples)."""

    dir: str = "runs/default"
    name: str = "default"
    seed: int = 1234


@dataclass(frozen=True)
class Config:
    """A whole run; its saved form (run.dir/config.yaml) is enough to repeat it."""

    model: ModelConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def train_samples(self) -> int:
        """Length of the run in sequences (tokens are rounded up to whole sequences)."""
        if self.trainer.train_samples is not None:
            return self.trainer.train_samples
        return math.ceil((self.trainer.train_tokens or 0) / self.data.seq_length)

    @property
    def checkpoint_dir(self) -> str:
        return self.checkpoint.dir or f"{self.run.dir}/checkpoints"

    def validate(self) -> Config:
        """Check every field and combination that needs no device and no file; returns self."""
        for part in dataclasses.fields(self):
            check = getattr(getattr(self, part.name), "validate", None)
            if check is not None:
                check()
        self.check_layout()
        sizes = [self.trainer.global_batch_size]
        if self.trainer.batch_ramp is not None:
            sizes += [self.trainer.batch_ramp.start, self.trainer.batch_ramp.increment]
        for size in sizes:
            require(size % self.trainer.micro_batch_size == 0, "trainer.micro_batch_size", self.trainer.micro_batch_size,
                    f"a global batch of {size} is not a multiple of it", f"Choose a divisor of {size}")
        return self

    def check_layout(self) -> None:
        """Refuse a layout that cannot share out the model, whatever the number of ranks."""
        self.parallel.check_split(
            self.model.split_units(), self.trainer.micro_batch_size, self.data.seq_length, self.model.halo
        )
        require(not self.model.tie_embeddings or self.parallel.pp == 1, "model.tie_embeddings", True,
                f"over parallel.pp = {self.parallel.pp} embedding and output lie on different ranks, each with a copy of the one "
                "weight: its gradients would have to be summed over them, and counted once in the gradient norm",
                "Set model.tie_embeddings=false, or parallel.pp=1")
