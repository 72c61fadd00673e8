"""Finding, checking and reading checkpoints; needs no manager, so tools use it as well as the trainer."""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_mamba.checkpoint.ranks import Ranks
from megatron_mamba.checkpoint.reading import Reader, read_index
from megatron_mamba.checkpoint.storage import (
    METADATA,
    UNREADABLE,
    CheckpointError,
    FileRecord,
    find_damage,
    group_of,
    rank_file,
    read_manifest,
    read_safetensors_header,
)
from megatron_mamba.data.tokenizer import tokenizer_sha256
from megatron_mamba.files import inner_path, one_line, read_object

log = logging.getLogger(__name__)
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

STEP_NAME = re.compile(r"step_(\d{8,})")
NAMES_SHOWN = 8


def load(
    path: str | os.PathLike[str],
    tensors: dict[str, Any],
    *,
    rank_state: dict[str, Any] | None = None,
    verified: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Read a checkpoint into `tensors`, in their own layout whatever mesh it was saved on, and return its metadata.

    `tensors` are nested dicts as given to ``CheckpointManager.save``. Groups (top-level keys) that are left out are not
    read; within a group the names and global shapes must be the checkpoint's. Floating-point values are converted to
    the target's dtype. A `rank_state` dict is filled with what this rank saved; it stays empty, with a notice in the
    log, where another number of ranks saved. Checksums are checked first unless the caller has just done so
    (`verified`: true of a path from ``CheckpointManager.latest``). All ranks of `process_group` (default: all) call it.

    Raises :class:`CheckpointError` on every rank for damage or another model's checkpoint, naming files or tensors.
    """
    path = Path(path)
    flat = flatten(tensors)
    ranks = Ranks(process_group)
    try:
        damage = shared_damage(path, ranks, groups=set(tensors), contents=not verified)
        if damage:
            raise CheckpointError(f"checkpoint {path} is damaged: {'; '.join(damage)}. Load another one")
        metadata = read_index(path)
        local = (set(flat), _misfits(flat, metadata))
        ranks.reduce(local, lambda found: _require_same_model(path, metadata, set(tensors), found))
        read_tensors(path, metadata, flat, ranks.group)
        if rank_state is not None:
            rank_state.update(_read_rank_state(path, ranks))
    finally:
        ranks.close()
    return read_metadata(path)


def read_tensors(path: Path, index: Metadata, tensors: dict[str, torch.Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Fill `tensors` from a checkpoint with this :func:`read_index` (a collective of `group`). Raises :class:`CheckpointError`."""
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        dcp.load(tensors, storage_reader=Reader(path, index), planner=planner, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        raise CheckpointError(f"checkpoint {path} could not be read: {cause_of(error)}") from error


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What ``CheckpointManager.save`` was given as metadata. Raises :class:`CheckpointError` if it is damaged."""
    path = Path(path)
    if path.is_file():
        kept = read_safetensors_header(path)[1]
        try:
            metadata = {key: json.loads(value) for key, value in kept.items() if key != "format"}
        except UNREADABLE as error:
            problem = f"file {path}: its metadata is not JSON ({error})"
            raise CheckpointError(f"{problem}. Write it again with tools/consolidate.py") from error
        config = metadata.get("config")
        if not isinstance(config, dict) or not all(isinstance(config.get(group), dict) for group in ("model", "trainer")):
            raise CheckpointError(f"file {path} holds no configuration. Give a file that tools/consolidate.py wrote")
        return metadata
    try:
        damage = find_damage(path, {METADATA: read_manifest(path)["files"][METADATA]})
    except CheckpointError as error:
        damage = [str(error)]
    if damage:
        raise CheckpointError(f"checkpoint {path} is damaged: {damage[0]}. Use another one")
    return read_object(path / METADATA, CheckpointError, "Use another checkpoint")


def tokenizer_path(path: str | os.PathLike[str], metadata: dict[str, Any]) -> Path | None:
    """The tokenizer saved with checkpoint `path` (recorded relative to the folder of checkpoints), or None.

    Raises :class:`CheckpointError` if the record names a file that is not there, not below that folder, or not the recorded one
    any more.
    """
    saved, digest = metadata.get("tokenizer"), metadata.get("tokenizer_sha256")
    if saved is None:
        return None
    folder = Path(path).absolute().parent
    if not inner_path(saved):
        raise CheckpointError(
            f"checkpoint {path} names the tokenizer {saved!r}, which does not lie below {folder}. "
            "Name the tokenizer yourself (tokenizer=PATH, --tokenizer PATH)"
        )
    found = folder / saved
    if found.is_symlink() and not found.is_dir():
        raise CheckpointError(f"checkpoint {path}: its tokenizer {found} is a link. Put the file itself there")
    if not found.exists():
        raise CheckpointError(f"checkpoint {path} was saved with the tokenizer {found}, which is not there any more. Put it back")
    if digest is not None and (now := tokenizer_sha256(found)) != digest:
        raise CheckpointError(
            f"checkpoint {path} was saved with the tokenizer {found} of sha256 {digest}, but that has sha256 {now} now. "
            "Put the one it was saved with back, or name it"
        )
    return found


def verify(path: str | os.PathLike[str]) -> None:
    """Recompute every checksum. Raises :class:`CheckpointError` naming each damaged file, with expected and found."""
    damage = shared_damage(Path(path), None)
    if damage:
        raise CheckpointError(f"checkpoint {path} is damaged: {'; '.join(damage)}. Use another one, or delete it")


def resolve(path: str | os.PathLike[str]) -> Path:
    """The checkpoint that `path` means: a step's folder, the newest in a folder of checkpoints, the newest of a run, or a
    single file that tools/consolidate.py wrote.

    Raises :class:`CheckpointError` where there is none, or where the newest is incomplete (:func:`load` checks the
    checksums).
    """
    path = Path(path).absolute()
    if (STEP_NAME.fullmatch(path.name) and path.is_dir()) or (path.suffix == ".safetensors" and path.is_file()):
        return path
    for folder in (path, path / "checkpoints"):
        found = checkpoints(folder)
        if not found:
            continue
        damage = shared_damage(found[0], None, contents=False)
        if damage:
            others = ", ".join(other.name for other in found[1:]) or "there is no other"
            raise CheckpointError(
                f"checkpoint {found[0]} is damaged: {'; '.join(damage)}. Name another one in {folder}: {others}"
            )
        return found[0]
    raise CheckpointError(
        f"{path} holds no checkpoint. Give a folder step_XXXXXXXX, a folder of such folders, the folder of a run with "
        "checkpoints/ in it, or a .safetensors file of tools/consolidate.py"
    )


def checkpoints(directory: Path) -> list[Path]:
    """Folders of complete saves, newest first."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if STEP_NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """Step of a checkpoint's folder, from its name."""
    return int(path.name.removeprefix("step_"))


def shared_damage(
    path: Path, ranks: Ranks | None, *, groups: set[str] | None = None, contents: bool = True
) -> list[str]:
    """Damage of a checkpoint; with `ranks` they share out the files and all get the same list.

    `groups`: whose tensors to look at (default: all). `contents`: checksums, not only presence and sizes (a single file
    has none).
    """
    files: dict[str, FileRecord] = {}
    damage = []
    try:
        if not path.is_file():
            files = read_manifest(path)["files"]
    except CheckpointError as error:
        damage.append(str(error))
    if groups is not None:
        files = {name: record for name, record in files.items() if group_of(name) in {None, *groups}}
    if ranks is None:
        return damage + find_damage(path, files, contents=contents) or _index_damage(path)
    largest_first = sorted(files, key=lambda name: -files[name].size)
    mine = {name: files[name] for name in largest_first[ranks.rank :: ranks.size]}
    damage += find_damage(path, mine, contents=contents)
    return ranks.reduce(damage, lambda found: sorted({line for lines in found for line in lines}) or _index_damage(path))


def _index_damage(path: Path) -> list[str]:
    """What the index of an otherwise whole checkpoint gets wrong."""
    try:
        read_index(path)
    except CheckpointError as error:
        return [str(error)]
    return []


def flatten(tensors: dict[str, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    """Nested dicts of tensors as one, names joined by dots. Raises TypeError for a leaf that is no tensor."""
    flat: dict[str, torch.Tensor] = {}
    for key, value in tensors.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            inner = flatten(value, f"{name}.")
        elif isinstance(value, torch.Tensor):
            inner = {name: value}
        else:
            raise TypeError(
                f"{name} is a {type(value).__name__}: a checkpoint holds tensors. Put plain values into its metadata"
            )
        if twice := flat.keys() & inner.keys():
            raise ValueError(f"two tensors are named {min(twice)}. Rename one of them")
        flat |= inner
    return flat


def cause_of(error: BaseException) -> str:
    """One line that says what happened, and on which rank."""
    if not isinstance(error, CheckpointException):
        return str(error) or repr(error)
    return "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items())


def _misfits(flat: dict[str, torch.Tensor], metadata: Metadata) -> list[str]:
    """Tensors of this rank whose global shape or kind of dtype is not the checkpoint's."""
    lines = []
    for name, tensor in flat.items():
        entry = metadata.state_dict_metadata.get(name)
        if not isinstance(entry, TensorStorageMetadata):
            continue
        saved = entry.properties.dtype
        if entry.size != tensor.shape:
            lines.append(f"{name} (checkpoint {tuple(entry.size)}, here {tuple(tensor.shape)})")
        elif saved != tensor.dtype and not (saved.is_floating_point and tensor.dtype.is_floating_point):
            lines.append(f"{name} (checkpoint {saved}, here {tensor.dtype})")
    return lines


def _require_same_model(
    path: Path, metadata: Metadata, groups: set[str], found: list[tuple[set[str], list[str]]]
) -> None:
    wanted = set().union(*(names for names, _ in found))
    saved = {name for name in metadata.state_dict_metadata if name.partition(".")[0] in groups}
    misfits = {line for _, lines in found for line in lines}
    kinds = {"missing in it": wanted - saved, "only in it": saved - wanted, "of another shape or kind": misfits}
    problems = [f"{kind}: {_some(names)}" for kind, names in kinds.items() if names]
    if problems:
        raise CheckpointError(
            f"{path} is a checkpoint of another model; {'; '.join(problems)}. "
            "Give the configuration it was trained with, or another path"
        )


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:NAMES_SHOWN])
    return shown if len(names) <= NAMES_SHOWN else f"{shown} and {len(names) - NAMES_SHOWN} more"


def _read_rank_state(path: Path, ranks: Ranks) -> dict[str, Any]:
    manifest, file = read_manifest(path), path / rank_file(ranks.rank)
    world_size = manifest.get("world_size")
    state, problem = None, None
    if world_size == ranks.size and file.name in manifest["files"]:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
            problem = None if isinstance(state, dict) else f"holds a {type(state).__name__}"
        except pickle.UnpicklingError:
            # What torch says of it advises to load it all the same.
            problem = "holds objects that are not plain data, which no checkpoint of this program has"
        except (RuntimeError, EOFError, OSError) as error:
            problem = f"cannot be read ({one_line(error)})"
        problem = problem and f"file {file.name} {problem}"
    problems = ranks.reduce(problem, lambda found: [line for line in found if line])
    if problems:
        raise CheckpointError(f"checkpoint {path}: {'; '.join(problems)}. It was not loaded: use another checkpoint")
    if state is not None:
        return state
    if ranks.rank == 0:
        reason = f"{world_size} ranks saved it, {ranks.size} load it" if world_size != ranks.size else "none was saved"
        log.warning("the state of single ranks (random generators) is not restored from %s: %s", path, reason)
    return {}
