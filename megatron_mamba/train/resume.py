"""Where a run starts: at its first sample, with the weights of another run, or at its own latest checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_mamba.checkpoint import CheckpointManager, read_metadata, resolve
from megatron_mamba.config import Config, ConfigError
from megatron_mamba.data import Datasets
from megatron_mamba.data.fingerprint import fingerprints
from megatron_mamba.data.indexed import IndexedReader
from megatron_mamba.data.standing import Standing
from megatron_mamba.data.tokenizer import tokenizer_sha256
from megatron_mamba.parallel.context import MESH_DIMENSIONS, ParallelContext
from megatron_mamba.train.checks import changed_settings, check_same_model, check_units, mesh_name

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Counters:
    """How far a run has come."""

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    passed_over: int = 0
    """Samples that were read and then left behind: they train nothing."""

    @classmethod
    def of(cls, metadata: dict[str, Any]) -> Counters:
        """Of the run that saved a checkpoint."""
        samples = metadata["consumed_samples"]
        tokens = metadata.get("consumed_tokens", samples * metadata["config"]["data"]["seq_length"])
        return cls(metadata["step"], samples, tokens, metadata.get("passed_over", 0))


@dataclass(frozen=True)
class Start:
    """What a run takes over."""

    source: Path | None = None
    """The checkpoint; None: a new run that draws its weights."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """What the trainer that saved it knew."""
    resumes: bool = False
    """It is the run's own."""
    counters: Counters = field(default_factory=Counters)

    @classmethod
    def of_run(cls, manager: CheckpointManager) -> Start:
        """At the latest checkpoint of the run, if there is one (a collective)."""
        if (latest := manager.latest()) is None:
            return cls()
        metadata = read_metadata(latest)
        return cls(latest, metadata, True, Counters.of(metadata))


def find_start(config: Config, context: ParallelContext, manager: CheckpointManager) -> Start:
    """Where the run starts (a collective), before anything is built.

    Another model is refused; on a resume, other settings and another mesh are named. Raises ConfigError and CheckpointError.
    """
    start = Start.of_run(manager)
    if start.source is None and config.checkpoint.init_from is not None:
        source = resolve(config.checkpoint.init_from)
        start = Start(source, read_metadata(source))
    if start.source is None:
        return start
    source, metadata = start.source, start.metadata
    changed = check_same_model(config, metadata["config"], source, resumes=start.resumes)
    mesh = {name: context.size(name) for name in MESH_DIMENSIONS}
    was = metadata.get("mesh", mesh)
    if context.global_rank == 0 and was != mesh:
        log.warning("%s was saved on %s and is laid out anew over %s", source, mesh_name(was), mesh_name(mesh))
    if start.resumes:
        check_units(config, start.counters.consumed_samples, start.counters.consumed_tokens)
        changed += changed_settings(config, metadata["config"])
    if context.global_rank == 0 and changed:
        log.warning("other settings than those of %s: %s", source, ", ".join(changed))
    return start


def shared_fingerprints(context: ParallelContext, readers: Iterable[IndexedReader]) -> dict[str, str]:
    """What tells the corpora apart, by prefix: read by one rank for all (a collective)."""
    return context.gather(fingerprints(readers) if context.global_rank == 0 else {})[0]


def place_data(config: Config, context: ParallelContext, data: Datasets, start: Start) -> Datasets:
    """The data from where the run's checkpoint left each corpus on (a collective).

    Raises ConfigError on all ranks for data that the run cannot go on with.
    """
    is_main = context.global_rank == 0
    saved = _saved_tokenizer(start)
    of_checkpoint = context.gather(tokenizer_sha256(saved) if is_main and saved is not None else None)[0]
    if None not in (of_checkpoint, data.tokenizer_sha256) and of_checkpoint != data.tokenizer_sha256:
        problem = f"its sha256 is {data.tokenizer_sha256}, that of the checkpoint's tokenizer {saved} is {of_checkpoint}"
        if start.resumes:
            remedy = "Tokenise the text with the checkpoint's, or start another run with checkpoint.init_from"
            raise ConfigError("data.tokenizer", str(data.tokenizer), problem, remedy)
        if is_main:
            log.warning("data.tokenizer = %s: %s. If ids mean other text, its weights are of no use", data.tokenizer, problem)
    if not start.resumes:
        return data
    position = start.counters.consumed_samples + start.counters.passed_over
    was = Standing.of_checkpoint(start.metadata)
    standing, changes = was.continued(data.standing, position, config.data.on_change == "restart")
    if is_main and changes:
        log.warning("other data than that of %s: %s", start.source, "; ".join(changes))
    return data.at(standing)


def _saved_tokenizer(start: Start) -> Path | None:
    """The tokenizer kept with the checkpoint, if it is still there."""
    if start.source is None or not start.metadata.get("tokenizer"):
        return None
    path: Path = start.source.absolute().parent / start.metadata["tokenizer"]
    return path if path.exists() else None
