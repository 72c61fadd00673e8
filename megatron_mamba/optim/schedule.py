"""Learning rate and global batch size as pure functions of the samples consumed, so that a resume needs no state."""

from __future__ import annotations

import math
from collections.abc import Callable

from megatron_mamba.config import Config, OptimConfig, ScheduleConfig, TrainerConfig, require


def learning_rate(config: OptimConfig, consumed_samples: float, train_samples: int, seq_length: int) -> float:
    """Learning rate of the optimizer step that starts after `consumed_samples` sequences of `seq_length` tokens.

    It rises linearly from 0 to ``config.lr`` over the warm-up, then follows ``config.schedule.kind``:
    ``cosine`` half a cosine down to ``config.min_lr`` (arXiv 1608.03983 equation 5) and ``linear`` a straight line, both ending
    where the decay ends (default: the run's end); ``wsd`` constant, then a straight line down to ``min_lr`` over the last
    ``decay`` samples of the run (arXiv 2404.06395 section 4; default: a tenth of it); ``constant`` no decay. After the
    decay the rate stays at ``min_lr``. Raises :class:`ConfigError` when warm-up and decay do not fit the run.
    """
    warmup, decay_start, decay_end = _corners(config.schedule, train_samples, seq_length)
    if consumed_samples < warmup:
        return config.lr * consumed_samples / warmup
    if consumed_samples <= decay_start:
        return config.lr
    if consumed_samples >= decay_end:
        return config.min_lr
    fraction = (consumed_samples - decay_start) / (decay_end - decay_start)
    remaining = 0.5 * (1 + math.cos(math.pi * fraction)) if config.schedule.kind == "cosine" else 1 - fraction
    return config.min_lr + (config.lr - config.min_lr) * remaining


def schedule_position(config: Config, consumed_samples: int, consumed_tokens: int) -> float:
    """Where on its schedule a run is, in sequences of data.seq_length: by the tokens of a run measured in trainer.train_tokens,
    whose earlier sequences may have had another length."""
    return consumed_samples if config.trainer.train_tokens is None else consumed_tokens / config.data.seq_length


def last_sample(config: Config, consumed_samples: int, consumed_tokens: int) -> int:
    """Samples that a run will have consumed at its end: trainer.train_samples, or as many more as trainer.train_tokens leaves."""
    if config.trainer.train_tokens is None:
        return config.train_samples
    return consumed_samples + max(0, math.ceil((config.trainer.train_tokens - consumed_tokens) / config.data.seq_length))


def global_batch_size(trainer: TrainerConfig, consumed_samples: int) -> int:
    """Sequences in the step that starts after `consumed_samples`: Megatron-LM's ramp, from ``batch_ramp.start`` by
    ``increment`` each time another equal share of ``batch_ramp.samples`` is consumed, to ``trainer.global_batch_size``."""
    ramp = trainer.batch_ramp
    if ramp is None:
        return trainer.global_batch_size
    increments = (trainer.global_batch_size - ramp.start) // ramp.increment
    return ramp.start + ramp.increment * min(increments, consumed_samples * increments // ramp.samples)


def _corners(schedule: ScheduleConfig, train_samples: int, seq_length: int) -> tuple[float, float, float]:
    """Samples (fractional where tokens do not fill a sequence) at which warm-up ends, decay begins and decay ends."""
    warmup, check_warmup = _length(schedule, "warmup", seq_length)
    decay, check_decay = _length(schedule, "decay", seq_length)
    warmup = warmup or 0.0
    run = f"the run of {train_samples:,} samples"
    longer = f"the warm-up of {warmup:,.0f} samples is longer than {run}"
    check_warmup(warmup <= train_samples, longer, "Shorten it, or raise trainer.train_samples")
    if schedule.kind == "constant":
        check_decay(decay is None, "a constant schedule has no decay", "Remove it, or choose optim.schedule.kind=wsd")
        return warmup, math.inf, math.inf
    if schedule.kind == "wsd":
        decay = train_samples / 10 if decay is None else decay
        both = f"warm-up ({warmup:,.0f}) and decay ({decay:,.0f}) together are longer than {run}"
        check_decay(warmup + decay <= train_samples, both, "Shorten one of the two")
        return warmup, train_samples - decay, train_samples
    end = train_samples if decay is None else decay
    early = f"the decay ends at {end:,.0f} samples, the warm-up not before {warmup:,.0f}"
    check_decay(warmup < end, early, "Shorten the warm-up, or let the decay end later")
    return warmup, warmup, end


def _length(schedule: ScheduleConfig, name: str, seq_length: int) -> tuple[float | None, Callable[[bool, str, str], None]]:
    """A length in samples (None: not given), and `require` bound to the field that sets it."""
    samples, tokens = getattr(schedule, f"{name}_samples"), getattr(schedule, f"{name}_tokens")
    unit, value = ("samples", samples) if tokens is None else ("tokens", tokens)

    def check(condition: bool, problem: str, remedy: str) -> None:
        require(condition, f"optim.schedule.{name}_{unit}", value, problem, remedy)

    return (samples if tokens is None else tokens / seq_length), check
