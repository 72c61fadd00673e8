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

from megatron_mamba.architecture import (  # noqa: F401 (part of this module's interface)
    MIXER_KINDS,
    AttentionConfig,
    InitConfig,
    Mamba2Config,
    MambaConfig,
    MLPConfig,
    ModelConfig,
)
from megatron_mamba.layout import ParallelConfig, RecomputeConfig
from megatron_mamba.schema import (  # noqa: F401
    ConfigError,
    PathText,
    Weights,
    check_names,
    convert,
    from_dict,
    require,
    require_positive,
    to_dict,
    to_yaml,
)

# ----------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class DataConfig:
    """What the model reads. Exactly one of `path` and `blend` for indexed data."""

    kind: Literal["indexed", "synthetic"] = "indexed"
    path: PathText | None = None
    """Prefix of PREFIX.bin and PREFIX.idx (Megatron-LM's indexed format)."""
    blend: Weights | None = None
    """Prefix -> weight, for several corpora; also as a list, of weight and prefix in turn or of {path: PREFIX, weight: WEIGHT}."""
    split: tuple[float, float, float] = (969.0, 30.0, 1.0)
    """Shares of the tokens for train, validation and test, cut in file order: at document borders where all get a sequence."""
    tokenizer: PathText | None = None
    """SentencePiece .model, or a folder / tokenizer.json of a Hugging Face tokenizer; default: the one recorded with the data."""
    seq_length: int = 4096
    document_reset: bool = False
    """Reset conv, SSM state and attention at document starts."""
    mask_document_ends: bool = False
    """Leave out of the loss the prediction of a new document's first token."""
    seed: int = 1234
    cache_dir: PathText | None = None
    """Where sample indices are cached; default: beside the data."""
    on_change: Literal["error", "restart"] = "error"
    """What a resume does if a corpus was replaced or would be read otherwise than before (split, seq_length, seed): stop, as
    samples would repeat and validation text be trained on, or begin that corpus anew. A changed blend just goes on."""
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
class SpikeConfig:
    """What happens at a step whose loss or gradient norm is far above that of the steps before."""

    policy: Literal["off", "report", "skip", "rewind"] = "report"
    """After its passes, run again, gave the same: take the step as it is; change no weight; or that, and go back to the last
    checkpoint, on to samples not yet seen."""
    window: int = 128
    """Steps that it is compared with; fewer have no spikes."""
    sigmas: float = 6.0
    """Standard deviations above their mean from which a step is a spike."""
    patience: int = 1
    """Spikes in a row after which the policy "rewind" goes back."""
    max_rewinds: int = 3
    """How often it may, before the run ends."""

    def validate(self) -> None:
        require_positive(self, "trainer.spike", "sigmas", "patience", "max_rewinds")
        require(self.window > 1, "trainer.spike.window", self.window, "has no standard deviation", "Set it to 2 or more")


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
    """Steps in a row, not finite or spikes, that change no weight, after which the run stops with a checkpoint."""
    spike: SpikeConfig = field(default_factory=SpikeConfig)
    watchdog_seconds: float | None = 900.0
    """Without progress of a rank, after which all write their stacks and end; null: no watchdog."""
    heartbeat_seconds: float = 60.0
    """Without a sign of life of a rank for which others wait, after which they end."""
    health_check: bool = True
    """Before training, whether each rank's machine and the fused kernels that the model uses compute rightly, and how fast the
    machine computes, copies and sends."""
    health_interval: int = 1000
    """Steps between later looks at it: whether each rank still computes rightly and as fast, and where its time goes."""
    replica_check_interval: int = 100
    """Steps between comparisons of weights that several ranks hold, bit for bit; they are compared before every save too."""
    stop_after_samples: int | None = None
    """Checkpoint and stop once this many samples are consumed (schedules still aim at train_samples)."""

    def validate(self) -> None:
        require_positive(self, "trainer", "global_batch_size", "micro_batch_size", "max_skipped_steps", "heartbeat_seconds",
                         "health_interval", "replica_check_interval")
        self.spike.validate()
        require(self.spike.policy != "rewind" or self.spike.patience < self.max_skipped_steps, "trainer.spike.patience",
                self.spike.patience, f"the run ends after trainer.max_skipped_steps = {self.max_skipped_steps} such steps",
                "Lower it")
        require(self.watchdog_seconds is None or self.watchdog_seconds > 0.0, "trainer.watchdog_seconds", self.watchdog_seconds,
                "must be positive", "Use null for no watchdog")
        self.check_chunk()
        require(self.stop_after_samples is None or self.stop_after_samples > 0, "trainer.stop_after_samples",
                self.stop_after_samples, "must be positive", "Use null to train to the end")
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

    dir: PathText | None = None
    """Folder of the run's checkpoints; default: run.dir/checkpoints. A run resumes from the latest one in it."""
    interval: int = 1000
    """Steps between checkpoints; one is always written at the end."""
    async_save: bool = True
    keep_last: int = 2
    keep_every: int = 0
    """The first checkpoint at or after each multiple of so many steps is never deleted; 0 = none."""
    init_from: PathText | None = None
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

    dir: PathText = "runs/default"
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
        size = self.trainer.global_batch_size
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
