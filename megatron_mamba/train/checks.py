"""What a run must satisfy before it starts, and what it may change from one start to the next."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_mamba.config import MIXER_KINDS, Config, ConfigError, require, to_dict
from megatron_mamba.files import reason
from megatron_mamba.optim import global_batch_size
from megatron_mamba.parallel import health
from megatron_mamba.parallel.context import ParallelContext, unjoined
from megatron_mamba.train.resilience import TrainingError

log = logging.getLogger(__name__)

_NOT_COMPARED = {
    "data": {"path", "blend", "on_change", "cache_dir", "prefetch"},
    "trainer": {
        "watchdog_seconds", "heartbeat_seconds", "health_check", "health_interval", "replica_check_interval", "stop_after_samples",
    },
}  # fmt: skip
"""Settings that do not change the training, or that data/standing.py compares."""


def check_start(config: Config, context: ParallelContext) -> None:
    """What must hold before anything is built (a collective)."""
    problem = unjoined()
    require(not problem, "command line", "megatron_mamba.train", problem,
            "Start ranks with launch/torchrun.sh, once on each node")  # fmt: skip
    check_folders(config, context)


def check_folders(config: Config, context: ParallelContext) -> None:
    """Make the folders that the run writes to (a collective). Raises ConfigError on all ranks if one cannot be written."""
    for field, folder in (("run.dir", config.run.dir), ("checkpoint.dir", config.checkpoint_dir)):
        problem = _cannot_write(Path(folder)) if context.global_rank == 0 else ""
        if problem := context.gather(problem)[0]:
            raise ConfigError(field, folder, problem, "Choose a folder that can be made and written to")


def _cannot_write(folder: Path) -> str:
    """Why nothing can be written to a folder; "" if it can."""
    probe = folder / f".{os.getpid()}.writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except FileExistsError:
        return "is a file"
    except NotADirectoryError:
        return "lies below a file"
    except OSError as error:
        return f"cannot be written: {reason(error)}"
    return ""


def check_batches(config: Config, context: ParallelContext, consumed_samples: int = 0) -> None:
    """Every batch after `consumed_samples` must share out evenly over data-parallel ranks and micro-batches, and a new run must
    hold one."""
    settings = {"trainer.global_batch_size": config.trainer.global_batch_size}
    sizes = list(settings.values())
    now = global_batch_size(config.trainer, consumed_samples)
    if (ramp := config.trainer.batch_ramp) is not None and now < config.trainer.global_batch_size:
        settings |= {"trainer.batch_ramp.start": ramp.start} if now == ramp.start else {}
        settings |= {"trainer.batch_ramp.increment": ramp.increment}
        sizes += range(now, config.trainer.global_batch_size, ramp.increment)
    for field, value in settings.items():
        config.trainer.micro_batches(field, value, context.dp_size)
    for size in sizes:
        field = next((field for field, value in settings.items() if value == size), "trainer.batch_ramp.increment")
        micro_batches = config.trainer.micro_batches(field, size, context.dp_size)
        config.parallel.check_micro_batches(field, settings[field], size, micro_batches)
    first = min(sizes)
    require(
        consumed_samples > 0 or config.train_samples >= first,
        "trainer.train_samples",
        config.train_samples,
        f"shorter than one global batch of {first} samples",
        "Train longer, or lower trainer.global_batch_size",
    )


def examined(config: Config, context: ParallelContext) -> list[health.Reading]:
    """What every rank's machine gives (a collective); slow ones are named. Raises TrainingError for one that computes wrongly."""
    if not config.trainer.health_check:
        return []
    readings = health.examine(context)
    for line in health.slow(readings) if context.global_rank == 0 else []:
        log.warning("slow: %s", line)
    if wrong := health.wrong(readings):
        raise TrainingError(
            f"a matrix product was wrong on {', '.join(wrong)}. Nothing was trained. Take these machines out of service; "
            "trainer.health_check=false does not look"
        )
    return readings


def check_same_model(config: Config, saved: dict[str, Any], path: Path, *, resumes: bool) -> list[str]:
    """A run goes on with its own model (`resumes`), or starts from weights of the same model. Raises ConfigError naming the first
    setting of another model. Returns the settings that differ and may, each as ``name old -> new``."""
    old, new = (_model_settings(model, config.model.layers) for model in (saved["model"], to_dict(config)["model"]))
    differing = [key for key in new if old.get(key) != new[key]]
    for key in differing:
        # A longer context may want another base: the weights fit, and learn the rest.
        if resumes or key != "model.attention.rope_base":
            raise ConfigError(
                key,
                new[key],
                f"the checkpoint {path} is of another model, with {old.get(key)!r}",
                "Give the run another run.dir, or the model it was started with"
                if resumes
                else "Start from weights of this model, or set it as the checkpoint has it",
            )
    return [f"{key} {old.get(key)!r} -> {new[key]!r}" for key in differing]


def _model_settings(model: dict[str, Any], layers: Sequence[str]) -> dict[str, Any]:
    """What tells models apart: not how new weights are drawn, where stages of a pipeline begin, or mixers that are not used."""
    unused = {"name", "init", *set(MIXER_KINDS.values()) - set(layers)}
    kept = {key: value for key, value in model.items() if key not in unused}
    return dict(_leaves(kept | {"pattern": model["pattern"].replace("|", "")}, "model."))


def check_units(config: Config, consumed_samples: int, consumed_tokens: int) -> None:
    """Once sequences have had another length, samples and tokens no longer say the same: a schedule has one unit, the run's."""
    if consumed_tokens == consumed_samples * config.data.seq_length:
        return
    unit, other = ("samples", "tokens") if config.trainer.train_samples is not None else ("tokens", "samples")
    for name in ("warmup", "decay"):
        value = getattr(config.optim.schedule, f"{name}_{other}")
        problem = f"the run is measured in trainer.train_{unit}, and data.seq_length has changed since its first sample"
        require(value is None, f"optim.schedule.{name}_{other}", value, problem, f"Give it as optim.schedule.{name}_{unit}")


def changed_settings(config: Config, saved: dict[str, Any]) -> list[str]:
    """The settings that make another training than the saved one, each as ``name old -> new``."""

    def compared(tree: dict[str, Any], group: str) -> dict[str, Any]:
        return {key: value for key, value in tree.get(group, {}).items() if key not in _NOT_COMPARED.get(group, ())}

    groups = ("data", "optim", "trainer", "parallel", "recompute")
    old, new = (dict(_leaves({g: compared(tree, g) for g in groups})) for tree in (saved, to_dict(config)))
    return [f"{key} {old.get(key)!r} -> {new.get(key)!r}" for key in old | new if old.get(key) != new.get(key)]


def mesh_name(sizes: dict[str, int]) -> str:
    """For example ``dp_shard 2 x tp 2``."""
    return " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one rank"


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
