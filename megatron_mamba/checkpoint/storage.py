"""The files of a checkpoint, and the storage layer under torch.distributed.checkpoint that writes them (reading.py reads).

A checkpoint is a folder ``step_00000100`` with

- ``GROUP_RRRRR.safetensors``: what rank R wrote of a top-level group (``model``, ``optimizer``), as safetensors;
- ``rank_RRRRR.pt``: state that belongs to one rank (random generators);
- ``index.json``: global shape and dtype of each tensor, and where its chunks lie;
- ``metadata.json``: what the trainer wants to know again (config, step, consumed samples);
- ``manifest.json``: size and xxh3_128 of every file above. It is written last; a folder without it is not a checkpoint, and
  a file that it does not list, or that is a link, is not read.

torch.distributed.checkpoint plans who writes and who reads what. Its own file format is not used because it pickles the
index, reads a whole chunk where a few rows are needed, and hashes nothing.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import xxhash
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from megatron_mamba.checkpoint.coverage import are_sizes
from megatron_mamba.files import plain_name

MANIFEST, INDEX, METADATA = "manifest.json", "index.json", "metadata.json"
FORMAT = 1
BLOCK_BYTES = 16 << 20
"""Bytes hashed, written or read at a time: large enough to stream, small enough that memory stays flat."""
IO_THREADS = min(8, os.cpu_count() or 1)

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, RecursionError)
"""What comes of reading JSON that is something else than was written."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, is damaged, or belongs to another model; says which, why and what to do."""


@dataclass(frozen=True)
class FileRecord:
    """What the manifest knows of a file."""

    size: int
    checksum: str


@dataclass(frozen=True)
class Location:
    """Where the bytes of a chunk start."""

    file: str
    start: int


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, any dtype, as bytes."""
    array: Any = tensor.detach().view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def rank_file(rank: int) -> str:
    """Name of the file with the state that belongs to one rank."""
    return f"rank_{rank:05d}.pt"


def group_of(file: str) -> str | None:
    """The group whose tensors a file of this name holds; None for one that holds no tensors."""
    return file.rpartition("_")[0] if file.endswith(".safetensors") else None


def sync_folder(folder: Path) -> None:
    """Make created, renamed and removed names in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> FileRecord:
    """Write `pieces` to a new file, on disk when this returns, hashed on the way.

    Raises OSError naming the file (write and fsync leave the name out).
    """
    digest, size = xxhash.xxh3_128(), 0
    try:
        with open(path, "xb") as file:
            for piece in pieces:
                view = memoryview(piece)
                for start in range(0, len(view), BLOCK_BYTES):
                    block = view[start : start + BLOCK_BYTES]
                    digest.update(block)
                    file.write(block)
                size += len(view)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    return FileRecord(size, digest.hexdigest())


# ---------------------------------------------------------------------------------------------------- safetensors


class Entry(NamedTuple):
    """A tensor that a safetensors file is to hold."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    path: Path, entries: Sequence[Entry], tensors: Iterable[torch.Tensor], metadata: Mapping[str, str] | None = None
) -> tuple[FileRecord, list[int]]:
    """Write a new safetensors file a tensor at a time; returns its record and where in it each tensor starts.

    `tensors` are the contents of `entries` in the same order, each taken when its turn comes and let go once written. Give
    the widest dtype first, so that each starts at a multiple of its item size. Raises :class:`CheckpointError` for a dtype
    that the format has not, or a tensor that is not what its entry says.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    starts, end = [], 0
    for name, dtype, shape in entries:
        if dtype not in DTYPE_NAMES:
            raise CheckpointError(f"{name} has dtype {dtype}, which the safetensors layout cannot hold")
        starts.append(end)
        end += math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [starts[-1], end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    preamble = len(encoded).to_bytes(8, "little") + encoded

    def pieces() -> Iterator[bytes | memoryview]:
        yield preamble
        for entry, tensor in zip(entries, tensors, strict=True):
            if (tensor.dtype, tuple(tensor.shape)) != (entry.dtype, entry.shape):
                raise CheckpointError(f"{entry.name} is {tensor.dtype} {tuple(tensor.shape)}, not {entry.dtype} {entry.shape}")
            yield tensor_bytes(tensor.detach().cpu().contiguous())

    record = write_file(path, pieces())
    return record, [len(preamble) + start for start in starts]


def read_safetensors_header(path: Path) -> tuple[dict[str, tuple[Entry, int]], dict[str, str]]:
    """The tensors of a safetensors file with where in it they start, by name, and its metadata.

    Raises :class:`CheckpointError` for a file that is none, that is shorter or longer than it says, or in which tensors do not
    follow each other without a gap.
    """
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            header = json.loads(file.read(min(length, size)))
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict):
            raise TypeError(f"__metadata__ = {metadata!r}")
        tensors, end = {}, 8 + length
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if not are_sizes(entry["shape"]) or not are_sizes(entry["data_offsets"]):
                raise ValueError(f"tensor {name}: shape {entry['shape']}, data_offsets {entry['data_offsets']}")
            tensors[name] = Entry(name, DTYPES[entry["dtype"]], tuple(entry["shape"])), end
            expected = [end - 8 - length, (end := end + tensors[name][0].nbytes) - 8 - length]
            if list(entry["data_offsets"]) != expected:
                found = entry["data_offsets"]
                raise CheckpointError(f"file {path}, tensor {name}: expected data_offsets {expected}, found {found}")
    except OSError as error:
        raise CheckpointError(f"file {path} cannot be read: {error}") from error
    except UNREADABLE as error:
        raise CheckpointError(f"file {path} is not a safetensors file: {error!r}") from error
    if size != end:
        raise CheckpointError(f"file {path}: expected {end} bytes, found {size}")
    return tensors, metadata


# ------------------------------------------------------------------------------------------------------- manifest


def write_manifest(folder: Path, facts: dict[str, Any], files: dict[str, FileRecord]) -> None:
    """Write the manifest: `facts`, the files' records and a checksum of the manifest itself."""
    body = {"format": FORMAT, **facts, "files": {name: dataclasses.asdict(files[name]) for name in sorted(files)}}
    write_file(folder / MANIFEST, [json.dumps(body | {"checksum": _checksum(body)}, indent=1).encode()])


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, ``files`` as :class:`FileRecord`. Raises :class:`CheckpointError` if it is missing or damaged, or lists what is
    no plain name of a file, or lists no index or metadata."""
    try:
        _require_regular(folder / MANIFEST)
        manifest = json.loads((folder / MANIFEST).read_bytes())
        expected = manifest.pop("checksum")
        found = _checksum(manifest)
        if found != expected:
            raise CheckpointError(f"file {MANIFEST}: expected xxh3_128 {expected}, found {found}")
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"file {MANIFEST}: expected format {FORMAT}, found {manifest['format']}")
        files = manifest["files"]
        manifest["files"] = {plain_name(name, "files"): FileRecord(**record) for name, record in files.items()}
        if not are_sizes([record.size for record in manifest["files"].values()]):
            raise ValueError("a file's size is not a number of bytes")
    except FileNotFoundError:
        raise CheckpointError(f"file {MANIFEST} is missing") from None
    except OSError as error:
        raise CheckpointError(f"file {MANIFEST} cannot be read: {error}") from error
    except UNREADABLE as error:
        raise CheckpointError(f"file {MANIFEST} is not a manifest: {error!r}") from error
    if missing := [name for name in (INDEX, METADATA) if name not in files]:
        raise CheckpointError(f"file {MANIFEST} does not list {' and '.join(missing)}")
    return manifest


def _require_regular(path: Path) -> int:
    """Size of a file that lies in its folder itself. Raises OSError for a link, a pipe or a device: it may lead anywhere."""
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError("it is a link or something else that is no file. Put the file itself there")
    return found.st_size


def _checksum(body: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())


def find_damage(folder: Path, files: dict[str, FileRecord], *, contents: bool = True) -> list[str]:
    """One line for each of `files` that is missing, has another size, or (with `contents`) another checksum."""
    with ThreadPoolExecutor(IO_THREADS) as pool:
        lines = pool.map(lambda name: _file_damage(folder / name, files[name], contents), files)
        return [line for line in lines if line is not None]


def _file_damage(path: Path, record: FileRecord, contents: bool) -> str | None:
    try:
        size = _require_regular(path)
        if size != record.size:
            return f"file {path.name}: expected {record.size} bytes, found {size}"
        if not contents:
            return None
        digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(BLOCK_BYTES))
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
    except FileNotFoundError:
        return f"file {path.name} is missing: expected {record.size} bytes"
    except OSError as error:
        return f"file {path.name} cannot be read: {error}"
    found = digest.hexdigest()
    return None if found == record.checksum else f"file {path.name}: expected xxh3_128 {record.checksum}, found {found}"


# -------------------------------------------------------------------------------------------------------- writing


class Writer(StorageWriter):
    """Writes one checkpoint: each rank its tensors and its own `local_files`, the coordinator index, `shared_files` and
    manifest.

    The coordinator's `folder` is the one that all ranks use. It calls `begin` before making it and `publish` when it is
    whole; an error in either is raised on every rank.
    """

    def __init__(
        self,
        folder: Path,
        *,
        local_files: dict[str, bytes],
        shared_files: dict[str, bytes],
        facts: dict[str, Any],
        begin: Callable[[], object],
        publish: Callable[[Path], None],
    ) -> None:
        self.folder, self.local_files, self.shared_files = folder, local_files, shared_files
        self.facts, self.begin, self.publish = facts, begin, publish

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing to forget: a writer serves one save."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up: the coordinator makes the folder once all ranks have planned."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self.begin()
        self.folder.mkdir()
        return [dataclasses.replace(plan, storage_data=(self.folder, rank)) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        folder, rank = plan.storage_data
        groups: dict[str, list[WriteItem]] = {}
        for item in plan.items:
            if math.prod(_chunk(item).sizes):
                groups.setdefault(item.index.fqn.partition(".")[0], []).append(item)
        results = []
        for group, items in groups.items():
            results += _write_tensors(folder / f"{group}_{rank:05d}.safetensors", items, planner)
        for name, content in self.local_files.items():
            results.append(_file_result(name, write_file(folder / name, [content])))
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        files, places = {}, {}
        for result in (result for of_rank in results for result in of_rank):
            if isinstance(result.storage_data, FileRecord):
                files[result.index.fqn] = result.storage_data
            else:
                places[result.index] = result.storage_data
        for name, content in {INDEX: _index(metadata, places), **self.shared_files}.items():
            files[name] = write_file(self.folder / name, [content])
        if damage := find_damage(self.folder, files, contents=False):
            raise CheckpointError(f"{damage[0]} once written; do all ranks share the file system of checkpoint.dir?")
        write_manifest(self.folder, self.facts, files)
        sync_folder(self.folder)
        self.publish(self.folder)


def _chunk(item: WriteItem) -> ChunkStorageMetadata:
    assert item.tensor_data is not None
    return item.tensor_data.chunk


def item_bytes(item: WriteItem) -> int:
    """Size of the piece that `item` writes (``tensor_storage_size`` is that of the whole tensor)."""
    return math.prod(_chunk(item).sizes) * _properties(item).dtype.itemsize


def _file_result(name: str, record: FileRecord) -> WriteResult:
    return WriteResult(MetadataIndex(name), record.size, record)


def _write_tensors(path: Path, items: list[WriteItem], planner: SavePlanner) -> list[WriteResult]:
    """Write chunks as a safetensors file; widest dtype first, so that each starts at a multiple of its item size."""
    items = sorted(items, key=lambda item: -_properties(item).dtype.itemsize)
    entries = [Entry(_key(item), _properties(item).dtype, tuple(_chunk(item).sizes)) for item in items]
    tensors = (cast(torch.Tensor, planner.resolve_data(item)) for item in items)
    record, starts = write_safetensors(path, entries, tensors)
    places = [Location(path.name, start) for start in starts]
    results = [WriteResult(item.index, record.size, place) for item, place in zip(items, places, strict=True)]
    return [*results, _file_result(path.name, record)]


def _properties(item: WriteItem) -> TensorProperties:
    assert item.tensor_data is not None
    return item.tensor_data.properties


def _key(item: WriteItem) -> str:
    """Name inside the file: the tensor's own, with the part's bounds where a rank holds a part of it."""
    assert item.tensor_data is not None
    group, _, name = item.index.fqn.partition(".")
    chunk = _chunk(item)
    if chunk.sizes == item.tensor_data.size:
        return name or group
    bounds = (f"{start}:{start + size}" for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
    return f"{name or group}[{','.join(bounds)}]"


def _index(metadata: Metadata, places: dict[MetadataIndex, Location]) -> bytes:
    tensors: dict[str, Any] = {}
    for name, entry in metadata.state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)
        chunks = []
        for chunk in entry.chunks:
            if (place := places.get(MetadataIndex(name, chunk.offsets))) is not None:
                chunks.append([list(chunk.offsets), list(chunk.sizes), place.file, place.start])
        tensors[name] = {"dtype": DTYPE_NAMES[entry.properties.dtype], "shape": list(entry.size), "chunks": chunks}
    return json.dumps(tensors, separators=(",", ":")).encode()
