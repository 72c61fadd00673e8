"""Saving of sharded training state; storage.py says what files a checkpoint has.

A save happens in a background *thread*. The tensors are copied to CPU memory first, so the trainer goes on at once. The
thread spends its time in hashing, write and fsync, all of which release the interpreter lock. A process would need the
state a second time in shared memory and a way to report errors, for no gain.

A save is complete once its folder has its final name: it is written as ``.tmp-...``, synced and renamed. So the newest
``step_...`` folder is the latest checkpoint; the text file ``latest`` names it for people and scripts and is never what
the answer rests on.
"""

from __future__ import annotations

import io
import json
import logging
import os
import secrets
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.tensor import DTensor

from megatron_mamba.checkpoint.loading import cause_of, checkpoints, flatten, shared_damage, step_of
from megatron_mamba.checkpoint.ranks import Ranks
from megatron_mamba.checkpoint.storage import (
    METADATA,
    CheckpointError,
    Writer,
    item_bytes,
    rank_file,
    sync_folder,
    write_file,
)
from megatron_mamba.files import lock

log = logging.getLogger(__name__)

TEMPORARY, REPLACED, LATEST, LOCK = ".tmp-", ".old-", "latest", ".lock"


class CheckpointManager:
    """The checkpoints of one run: saving, retention, and which one to resume from. All ranks make the same calls."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep_last: int,
        keep_every: int,
        async_save: bool,
        on_damage: str,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        """Make `directory` and clear it of what dead saves left; arguments as in ``config.CheckpointConfig``."""
        self.directory = Path(directory).absolute()
        self.keep_last, self.keep_every = keep_last, keep_every
        self.async_save, self.on_damage = async_save, on_damage
        self._ranks = Ranks(process_group)
        self._lock = _Lock(self.directory / LOCK)
        self._staging = _Staging()
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | None = None
        self._ranks.on_first(self._tidy)

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of `step`."""
        return self.directory / f"step_{step:08d}"

    def save(
        self, step: int, tensors: dict[str, Any], metadata: dict[str, Any], rank_state: dict[str, Any] | None = None
    ) -> None:
        """Save nested dicts of tensors and DTensors, JSON-able `metadata` and, for each rank, its own `rank_state`.

        Waits for a save that is still running. With async_save it returns once the tensors are copied. Raises
        :class:`CheckpointError` for a failure of the save before this one, or of this one without async_save.
        """
        self.wait()
        flat = flatten(tensors)
        local = {name: tensor.to_local() if isinstance(tensor, DTensor) else tensor for name, tensor in flat.items()}
        if self.async_save:
            local = self._staging.copy(local)
        local_files = {}
        if rank_state is not None:
            buffer = io.BytesIO()
            torch.save(rank_state, buffer)
            local_files[rank_file(self._ranks.rank)] = buffer.getvalue()
        writer = Writer(
            self.directory / f"{TEMPORARY}step_{step:08d}-{secrets.token_hex(4)}",
            local_files=local_files,
            shared_files={METADATA: json.dumps(metadata, indent=1).encode()},
            facts={"step": step, "world_size": self._ranks.size, "torch": torch.__version__},
            begin=self._lock.acquire,
            publish=lambda folder: self._publish(folder, step),
        )
        if self.async_save:
            self._thread = threading.Thread(target=self._save, args=(step, flat, local, writer), name=f"save {step}")
            self._thread.start()
        else:
            self._save(step, flat, local, writer)
            self.wait()

    def wait(self) -> None:
        """Return once no save is running. Raises :class:`CheckpointError` if the last one failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Wait for a running save, then give up the staging memory and the process group."""
        try:
            self.wait()
        finally:
            self._staging = _Staging()
            self._ranks.close()

    def latest(self) -> Path | None:
        """The newest checkpoint whose checksums are right, or None where there is no checkpoint at all.

        The ranks share the work and agree. Raises :class:`CheckpointError` where the newest one is damaged and
        on_damage is "error", or where every one is damaged.
        """
        self.wait()
        candidates = self._ranks.on_first(lambda: checkpoints(self.directory))
        for path in candidates:
            damage = shared_damage(path, self._ranks)
            if not damage:
                return path
            message = f"checkpoint {path} is damaged: {'; '.join(damage)}"
            if self.on_damage == "error":
                raise CheckpointError(
                    f"{message}. Resume from the newest whole one with checkpoint.on_damage=previous, or delete {path}"
                )
            if self._ranks.rank == 0:
                log.warning("%s. Trying the one before it (checkpoint.on_damage=previous)", message)
        if candidates:
            raise CheckpointError(
                f"every checkpoint in {self.directory} is damaged ({len(candidates)} of them). "
                "Delete them to start again, or set checkpoint.dir to another folder"
            )
        return None

    def _save(self, step: int, flat: dict[str, torch.Tensor], local: dict[str, torch.Tensor], writer: Writer) -> None:
        started, group = time.perf_counter(), self._ranks.group
        try:
            dcp.save(
                flat, storage_writer=writer, planner=_SavePlanner(local), process_group=group, no_dist=group is None
            )
            if self._ranks.rank == 0:
                log.info("saved %s in %.1f s", self.path(step), time.perf_counter() - started)
                self._prune(step)
        except (Exception, CheckpointException) as error:
            shutil.rmtree(writer.folder, ignore_errors=True)
            before = [path.name for path in checkpoints(self.directory) if path != self.path(step)]
            kept = f"The previous checkpoint {before[0]} is intact" if before else "There is no previous checkpoint"
            self._error = CheckpointError(
                f"saving step {step} to {self.path(step)} failed: {cause_of(error)}. {kept}; the partial folder was "
                "removed. If the disk is full, free space or lower checkpoint.keep_last"
            )
            self._error.__cause__ = error
        finally:
            self._lock.release()

    def _publish(self, folder: Path, step: int) -> None:
        """Give a complete folder its final name; one of the same step makes room, and comes back if we die half-way."""
        final, replaced = self.path(step), self.directory / f"{REPLACED}step_{step:08d}"
        if os.path.lexists(final):  # A link too, even one that points to a disk that is not there now.
            os.rename(final, replaced)
        os.rename(folder, final)
        sync_folder(self.directory)
        pointer = self.directory / f"{TEMPORARY}{LATEST}-{secrets.token_hex(4)}"
        write_file(pointer, [f"{final.name}\n".encode()])
        os.replace(pointer, self.directory / LATEST)
        sync_folder(self.directory)
        if os.path.lexists(replaced):
            _remove(replaced)

    def _prune(self, step: int) -> None:
        """Delete what retention does not keep. Later steps (left by a run that went back) are not touched."""
        try:
            upto = [path for path in checkpoints(self.directory) if step_of(path) <= step]
            spans = [step_of(path) // self.keep_every if self.keep_every else 0 for path in upto]
            for path, span, before in list(zip(upto, spans, [*spans[1:], 0], strict=True))[self.keep_last :]:
                if span == before:
                    _remove(path)
        except OSError as error:
            log.warning("an old checkpoint could not be deleted: %s", error)

    def _tidy(self) -> None:
        """Remove what dead saves left behind, unless a live process is saving into the same folder."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if not self._lock.acquire(wait=False):
            log.warning("another process is saving to %s: temporary folders there are left alone", self.directory)
            return
        try:
            for path in self.directory.glob(f"{REPLACED}step_*"):
                original = self.directory / path.name.removeprefix(REPLACED)
                if os.path.lexists(original):
                    _remove(path)
                else:
                    os.rename(path, original)
                    log.warning("brought back %s, which an interrupted save had moved away", original)
            for path in self.directory.glob(f"{TEMPORARY}*"):
                log.warning("removing %s, left by an interrupted save", path)
                _delete(path)
        finally:
            self._lock.release()


def _remove(path: Path) -> None:
    """Delete a checkpoint's folder; interrupted anywhere, it leaves no folder that looks like a checkpoint."""
    trash = path.parent / f"{TEMPORARY}{path.name.removeprefix(REPLACED)}-{secrets.token_hex(4)}"
    os.rename(path, trash)
    sync_folder(path.parent)
    _delete(trash)


def _delete(path: Path) -> None:
    """Delete a file or folder; of a link the link, and what it leads to stays."""
    if path.is_symlink():
        log.warning("%s was a link: what it leads to, %s, stays", path, path.resolve())
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


class _Lock:
    """A file's lock that the system frees when the process dies: a temporary folder is stale if nobody holds it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None

    def acquire(self, wait: bool = True) -> bool:
        """Take the lock; without `wait`, False if another process (or manager) has it."""
        self._file = open(self._path, "ab")  # noqa: SIM115 (until release)
        held = lock(self._file, wait)
        if held is None:
            log.warning("%s: no file locks here, so what dead saves leave has to be removed by hand", self._path)
        if not held:
            self.release()
        return bool(held)

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class _SavePlanner(dcp.DefaultSavePlanner):
    """Plans from the trainer's tensors (shapes, placements); takes the data from `local`, their copies on this rank."""

    def __init__(self, local: dict[str, torch.Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._local = local

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return super().create_global_plan(share_out(all_plans))

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self._local[index.fqn]


def share_out(plans: list[SavePlan]) -> list[SavePlan]:
    """Leave each piece to one of the ranks that hold it, so that all write about equally much.

    Pieces that a single rank holds have no choice; then the largest come first, each to the rank with the least so far.
    """
    holders: dict[MetadataIndex, list[int]] = {}
    sizes: dict[MetadataIndex, int] = {}
    for rank, plan in enumerate(plans):
        for item in plan.items:
            holders.setdefault(item.index, []).append(rank)
            sizes[item.index] = item_bytes(item)
    written, writer = [0] * len(plans), {}
    for index in sorted(holders, key=lambda index: (len(holders[index]) > 1, -sizes[index])):
        writer[index] = min(holders[index], key=lambda rank: written[rank])
        written[writer[index]] += sizes[index]
    return [
        replace(plan, items=[item for item in plan.items if writer[item.index] == rank]) for rank, plan in enumerate(plans)
    ]


class _Staging:
    """One CPU buffer for all tensors of a rank, kept between saves: fresh memory costs more than the copy itself."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def copy(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies of `tensors` in the buffer; complete when this returns."""
        starts, end = {}, 0
        for name, tensor in tensors.items():
            starts[name] = end
            end += -(-tensor.nbytes // 64) * 64
        if self._buffer.numel() < end:
            self._buffer = torch.empty(end, dtype=torch.uint8)
        copies = {}
        for name, tensor in tensors.items():
            place = self._buffer[starts[name] : starts[name] + tensor.nbytes]
            copies[name] = place.view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
        return copies
