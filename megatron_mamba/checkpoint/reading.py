"""The index of a checkpoint, checked, and the storage layer under torch.distributed.checkpoint that reads the tensors."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from megatron_mamba.checkpoint.coverage import are_sizes, check_apart, check_cover
from megatron_mamba.checkpoint.storage import (
    BLOCK_BYTES,
    DTYPES,
    INDEX,
    IO_THREADS,
    MANIFEST,
    UNREADABLE,
    CheckpointError,
    FileRecord,
    Location,
    group_of,
    read_manifest,
    read_safetensors_header,
    tensor_bytes,
)
from megatron_mamba.files import plain_name


def read_index(path: Path) -> Metadata:
    """The tensors of a checkpoint (a folder, or a single file of a model) as torch.distributed.checkpoint sees them;
    ``storage_data`` says where chunks lie.

    Raises :class:`CheckpointError` unless every tensor is there from its first element to its last, in files of its group that the
    manifest lists.
    """
    if path.is_file():
        whole = [(f"model.{name}", *found) for name, found in read_safetensors_header(path)[0].items()]
        listed = [(name, e.dtype, e.shape, [([0] * len(e.shape), e.shape, path.name, start)]) for name, e, start in whole]
    else:
        files = read_manifest(path)["files"]
        try:
            raw = json.loads((path / INDEX).read_bytes())
            listed = [(name, DTYPES[e["dtype"]], e["shape"], e["chunks"]) for name, e in raw.items()]
            check_apart(span for tensor in listed for span in _spans(*tensor, files))
        except OSError as error:
            raise CheckpointError(f"file {INDEX} cannot be read: {error}") from error
        except UNREADABLE as error:
            reason = str(error) if type(error) is ValueError else repr(error)
            raise CheckpointError(f"file {INDEX}, {reason}") from error
    tensors: dict[str, Any] = {}
    places: dict[MetadataIndex, Location] = {}
    for name, dtype, shape, chunks in listed:
        pieces = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes, _, _ in chunks]
        places |= {MetadataIndex(name, offsets): Location(file, start) for offsets, _, file, start in chunks}
        tensors[name] = TensorStorageMetadata(TensorProperties(dtype), torch.Size(shape), pieces)
    return Metadata(tensors, storage_data=places)


def _spans(
    name: str, dtype: torch.dtype, shape: Sequence[int], chunks: Sequence[Sequence[Any]], files: Mapping[str, FileRecord]
) -> Iterator[tuple[str, int, int, str]]:
    """Which bytes of which of `files` (the manifest's) a tensor's chunks are, as check_apart takes them. Raises ValueError."""
    try:
        check_cover(shape, [(offsets, sizes) for offsets, sizes, _, _ in chunks])
        for _, sizes, file, start in chunks:
            if plain_name(file, "file") not in files or group_of(file) != name.partition(".")[0]:
                raise ValueError(f"file {file} is none that {MANIFEST} lists for its group")
            end, size = start + math.prod(sizes) * dtype.itemsize, files[file].size
            if not are_sizes([start, end]) or end > size:
                raise ValueError(f"file {file} of {size} bytes does not hold bytes {start} to {end}")
            yield file, start, end, name
    except ValueError as error:
        raise ValueError(f"tensor {name}: {error}") from error


class Reader(StorageReader):
    """Reads of a checkpoint only the rows that a rank needs, straight into its tensors."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        """`path`: a checkpoint's folder, or the single file; `metadata`: its :func:`read_index`."""
        self.folder, self.metadata = path.parent if path.is_file() else path, metadata

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing to forget: a reader serves one load."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up: the index was read before the load began."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        with ExitStack() as stack, ThreadPoolExecutor(IO_THREADS) as pool:
            files = {}
            for name in {self.metadata.storage_data[item.storage_index].file for item in plan.items}:
                files[name] = stack.enter_context(open(self.folder / name, "rb", buffering=0)).fileno()
            list(pool.map(lambda item: self._read(item, planner, files), plan.items))
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @torch.no_grad()  # a thread's own setting: the caller's does not reach the pool
    def _read(self, item: ReadItem, planner: LoadPlanner, files: dict[str, int]) -> None:
        entry = self.metadata.state_dict_metadata[item.storage_index.fqn]
        assert isinstance(entry, TensorStorageMetadata)
        place: Location = self.metadata.storage_data[item.storage_index]
        chunk = next(chunk for chunk in entry.chunks if chunk.offsets == item.storage_index.offset)
        target = planner.resolve_tensor(item)
        if target.dim() == 0:
            target, sizes, offsets, lengths = target.view(1), [1], [0], [1]
        else:
            sizes, offsets, lengths = list(chunk.sizes), list(item.storage_offsets), list(item.lengths)
        dtype, row_items = entry.properties.dtype, math.prod(sizes[1:])
        rows_at_once = max(1, min(BLOCK_BYTES // (row_items * dtype.itemsize), lengths[0]))
        buffer = torch.empty([rows_at_once, *sizes[1:]], dtype=dtype)
        for row in range(0, lengths[0], rows_at_once):
            rows = min(rows_at_once, lengths[0] - row)
            block = buffer[:rows]
            start = place.start + (offsets[0] + row) * row_items * dtype.itemsize
            _read_exactly(files[place.file], tensor_bytes(block), start, self.folder / place.file)
            for dim in range(1, len(sizes)):
                block = block.narrow(dim, offsets[dim], lengths[dim])
            target[row : row + rows].copy_(block)


def _read_exactly(descriptor: int, buffer: memoryview, start: int, path: Path) -> None:
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], start + done)
        if count == 0:
            raise CheckpointError(f"file {path} ends at byte {start + done}: {len(buffer) - done} more were expected")
        done += count
