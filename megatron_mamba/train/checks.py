"""What a run must satisfy before it starts, and what it may change from one start to the next."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_mamba.config import MIXER_KINDS, Config, ConfigError, require, to_dict
from megatron_mamba.parallel.context import ParallelContext


def check_start(config: Config, context: ParallelContext) -> None:
    """What must hold before anything is built (a collective)."""
    check_batches(config, context)
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
        return f"cannot be written: {error.strerror or error}"
    return ""


def check_batches(config: Config, context: ParallelContext) -> None:
    """Every batch must share out evenly over data-parallel ranks and micro-batches, and the run must hold one."""
    settings = {"trainer.global_batch_size": config.trainer.global_batch_size}
    sizes = list(settings.values())
    if (ramp := config.trainer.batch_ramp) is not None:
        settings |= {"trainer.batch_ramp.start": ramp.start, "trainer.batch_ramp.increment": ramp.increment}
        sizes += range(ramp.start, config.trainer.global_batch_size, ramp.increment)
    for field, value in settings.items():
        config.trainer.micro_batches(field, value, context.dp_size)
    for size in sizes:
        field = next((field for field, value in settings.items() if value == size), "trainer.batch_ramp.increment")
        micro_batches = config.trainer.micro_batches(field, size, context.dp_size)
        config.parallel.check_micro_batches(field, settings[field], size, micro_batches)
    first = min(sizes)
    require(
        config.train_samples >= first,
        "trainer.train_samples",
        config.train_samples,
        f"shorter than one global batch of {first} samples",
        "Train longer, or lower trainer.global_batch_size",
    )


def check_same_model(config: Config, saved: dict[str, Any], path: Path) -> None:
    """A run goes on with its own model. Raises ConfigError naming the first setting of another one."""
    ours = to_dict(config)
    # Settings of mixers that the pattern does not use make no difference.
    unused = {"name", *set(MIXER_KINDS.values()) - set(config.model.layers)}
    old = dict(_leaves({k: v for k, v in saved["model"].items() if k not in unused}, "model"))
    new = dict(_leaves({k: v for k, v in ours["model"].items() if k not in unused}, "model"))
    for key, value in new.items():
        if old.get(key) != value:
            raise ConfigError(
                key,
                value,
                f"the checkpoint {path} is of another model, with {old.get(key)!r}",
                "Give the run another run.dir, or the model it was started with",
            )


def changed_settings(config: Config, saved: dict[str, Any]) -> list[str]:
    """Names of the settings that make another training than the saved one."""
    ours, groups = to_dict(config), ("data", "optim", "trainer", "parallel", "recompute")
    return [f"{group}.{key}" for group in groups for key in ours[group] if saved.get(group, {}).get(key) != ours[group][key]]


def mesh_name(sizes: dict[str, int]) -> str:
    """For example ``dp_shard 2 x tp 2``."""
    return " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one rank"


def _leaves(tree: dict[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}.{key}")
        else:
            yield f"{path}.{key}", value
