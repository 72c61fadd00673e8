"""Where a run starts: at its first sample, with the weights of another run, or at its own latest checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_mamba.checkpoint import CheckpointManager, read_metadata, resolve
from megatron_mamba.config import Config, ConfigError
from megatron_mamba.data import Datasets, save_tokenizer, saved_name, tokenizer_sha256
from megatron_mamba.data.fingerprint import fingerprints
from megatron_mamba.data.indexed import IndexedReader
from megatron_mamba.data.standing import Standing
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
    if problem := other_tokenizer(data, start):
        if start.resumes:
            remedy = "Go on with data of the run's own tokenizer, or start another run with checkpoint.init_from"
            raise ConfigError("data.tokenizer", str(data.tokenizer), f"{problem}, {start.source}", remedy)
        if is_main:
            log.warning("%s: data.tokenizer = %s %s", start.source, data.tokenizer, problem)
    if not start.resumes:
        return data
    position = start.counters.consumed_samples + start.counters.passed_over
    was = Standing.of_checkpoint(start.metadata)
    standing, changes = was.continued(data.standing, position, config.data.on_change == "restart")
    if is_main and changes:
        log.warning("other data than that of %s: %s", start.source, "; ".join(changes))
    return data.at(standing)


def other_tokenizer(data: Datasets, start: Start) -> str:
    """How the run's tokenizer differs from that of the checkpoint which it starts from; "" if it does not."""
    if start.source is None or data.tokenizer is None:
        return ""
    kept, digest = start.metadata.get("tokenizer"), start.metadata.get("tokenizer_sha256")
    if digest is None and kept is not None and (file := start.source.absolute().parent / kept).exists():
        digest = tokenizer_sha256(file)  # The checkpoint was saved before digests were.
    if digest not in (None, data.tokenizer_sha256):
        return f"has sha256 {data.tokenizer_sha256}, but the weights were trained with the tokenizer of sha256 {digest}"
    end = start.metadata.get("end_of_document", data.end_of_document)
    if digest is not None and end != data.end_of_document:
        return f"ends documents with id {data.end_of_document}, but the weights were trained with {end} there"
    return ""


def keep_tokenizer(data: Datasets, start: Start, folder: Path, *, write: bool) -> dict[str, Any]:
    """Keep a copy of the run's tokenizer in `folder`, that of its checkpoints, if `write`; returns what their metadata say of it.

    The copy is what checkpoints decode with: :func:`place_data` has seen that a run goes on with no other.
    """
    saved = start.metadata if start.resumes else {}
    if data.tokenizer is None:
        return {key: saved.get(key) for key in ("tokenizer", "tokenizer_sha256", "end_of_document")}
    kept = saved.get("tokenizer") or f"tokenizer/{saved_name(data.tokenizer)}"
    if write and not (saved and (folder / kept).exists() and tokenizer_sha256(folder / kept) == data.tokenizer_sha256):
        kept = str(save_tokenizer(data.tokenizer, folder / "tokenizer").relative_to(folder))
    # Relative to the checkpoints' folder, which may be moved.
    return {"tokenizer": kept, "tokenizer_sha256": data.tokenizer_sha256, "end_of_document": data.end_of_document}
