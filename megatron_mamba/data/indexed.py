"""Megatron-LM's indexed corpus format: PREFIX.bin holds the tokens, PREFIX.idx where sequences and documents lie in it.

PREFIX.idx, little-endian: magic, version (u64), dtype code (u8), number of sequences (u64), number of document borders
(u64); then sequence lengths in tokens (i32), sequence starts in bytes (i64), and the sequence index at which each
document starts, closed by the number of sequences (i64). Multimodal files append one i8 per sequence, ignored here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import struct
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from megatron_mamba.files import inner_path, lock, read_object, reason

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"), 2: np.dtype("i1"), 3: np.dtype("<i2"), 4: np.dtype("<i4"),
    5: np.dtype("<i8"), 6: np.dtype("<f8"), 7: np.dtype("<f4"), 8: np.dtype("<u2"),
}  # fmt: skip
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_HEADER = struct.Struct("<9sQBQQ")


class DataError(ValueError):
    """A corpus, text or tokenizer file that cannot be used: the message names the file, what is wrong and the remedy."""


def bin_path(prefix: str | Path) -> Path:
    """PREFIX.bin."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """PREFIX.idx."""
    return Path(f"{prefix}.idx")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrowest integer type the format offers for ids below `vocab_size` (Megatron-LM's choice: u16 or i32)."""
    return np.dtype("<u2") if vocab_size < 65536 else np.dtype("<i4")


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path` that takes its name when the block ends, and is removed if the block fails."""
    temporary = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def build_once(path: Path, build: Callable[[], None]) -> None:
    """Let one of the processes that call this, of whatever node, make the file `path` by `build`; the others wait for it.

    What they wait for is a lock on PATH.lock, which a process that dies gives back: then the next one builds. Where the file
    system has no locks every process builds; `build` must therefore put the file in place as a whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)

    def missing() -> bool:
        # Not path.exists(): NFS remembers for a while that a name was not there, until the folder is opened.
        return path.name not in os.listdir(path.parent)

    with open(path.with_name(f"{path.name}.lock"), "ab+") as file:
        while missing():
            if lock(file) is False:
                fcntl.flock(file, fcntl.LOCK_SH)
                fcntl.flock(file, fcntl.LOCK_UN)
            elif missing():
                build()


def _opened(path: Path) -> IO[bytes]:
    try:
        if path.is_file():
            return open(path, "rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({reason(error)}). Let it be read, or copy it again") from error
    raise DataError(
        f"{path}: no such file. A corpus is PREFIX.bin and PREFIX.idx, named by PREFIX alone; tools/prepare_data.py writes them"
    )


class IndexedReader:
    """Memory-mapped corpus at `prefix`.

    Opening it looks at sizes and end points only, whatever the corpus' size; :meth:`check` reads the whole .idx.
    Raises :class:`DataError` for missing, truncated, overlong or foreign files.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        with _opened(idx_path(prefix)) as file:
            self.dtype, n_sequences, n_borders = self._read_header(file)
            index = np.memmap(file, mode="r")
        offset = _HEADER.size
        self.sequence_lengths = np.frombuffer(index, "<i4", n_sequences, offset)
        offset += 4 * n_sequences
        self._pointers = np.frombuffer(index, "<i8", n_sequences, offset)
        self._borders = np.frombuffer(index, "<i8", n_borders, offset + 8 * n_sequences)
        self.n_documents = n_borders - 1
        n_bytes = int(self._pointers[-1]) + int(self.sequence_lengths[-1]) * self.dtype.itemsize if n_sequences else 0
        self.n_tokens = n_bytes // self.dtype.itemsize
        if self._borders[0] != 0 or self._borders[-1] != n_sequences or n_bytes < 0:
            raise DataError(
                f"{idx_path(prefix)}: its document borders and sequence lengths contradict each other: "
                "the file is corrupt. Write the corpus again"
            )
        self._file = _opened(bin_path(prefix))  # As long as the reader lives.
        found = os.fstat(self._file.fileno()).st_size
        if found != n_bytes:
            raise DataError(
                f"{bin_path(prefix)}: expected {n_bytes} bytes as {idx_path(prefix).name} says, found {found}: "
                f"the file is {'truncated' if found < n_bytes else 'longer than its index'}. "
                "Copy both files again, or write the corpus again"
            )
        self.tokens: np.ndarray = np.memmap(self._file, self.dtype, "r") if n_bytes else np.empty(0, self.dtype)
        """All tokens of the corpus in file order, memory-mapped: slices are zero-copy and may span documents."""

    def _read_header(self, file: IO[bytes]) -> tuple[np.dtype[Any], int, int]:
        path, header, size = idx_path(self.prefix), file.read(_HEADER.size), os.fstat(file.fileno()).st_size
        if header[: len(MAGIC)] != MAGIC[: len(header)] or not header:
            raise DataError(
                f"{path}: starts with {header[: len(MAGIC)]!r}, expected {MAGIC!r}: not an index of Megatron-LM's "
                "mmap format. Write the corpus with tools/prepare_data.py"
            )
        if len(header) < _HEADER.size:
            raise DataError(
                f"{path}: expected a header of {_HEADER.size} bytes, found {size} bytes: the file is truncated. "
                "Copy it again, or write the corpus again"
            )
        _, version, code, n_sequences, n_borders = _HEADER.unpack(header)
        if version != VERSION or code not in DTYPES or n_borders < 1:
            raise DataError(
                f"{path}: version {version}, dtype code {code}, {n_borders} document borders; expected version "
                f"{VERSION}, a code of 1 to 8 and at least one border. Write the corpus again"
            )
        expected = _HEADER.size + 12 * n_sequences + 8 * n_borders
        if size not in (expected, expected + n_sequences):
            raise DataError(
                f"{path}: expected {expected} bytes for {n_sequences} sequences and {n_borders - 1} documents, "
                f"found {size}: the file is {'truncated' if size < expected else 'too long'}. "
                "Copy it again, or write the corpus again"
            )
        if DTYPES[code].kind not in "iu":
            raise DataError(f"{path}: holds values of type {DTYPES[code]}, which are not token ids. Give a corpus of text")
        return DTYPES[code], n_sequences, n_borders

    def read(self, begin: int, end: int) -> np.ndarray:
        """Copy of `tokens[begin:end]` by one read call: unlike a page fault it lets other threads run and reads no more."""
        size = self.dtype.itemsize
        content = os.pread(self._file.fileno(), (end - begin) * size, begin * size)
        if len(content) != (end - begin) * size:
            raise DataError(f"{bin_path(self.prefix)}: ends before byte {end * size}: it was cut while in use. Copy it again")
        return np.frombuffer(content, self.dtype)

    def starts_of(self, documents: np.ndarray | slice) -> np.ndarray:
        """Position in `tokens` of the first token of each of `documents` (n_documents: the corpus' end), i64."""
        borders, n_sequences = self._borders[documents], len(self._pointers)
        if not n_sequences:
            return np.zeros(len(borders), np.int64)
        self._require_within(borders, n_sequences, "a document starts at sequence")
        starts = self._pointers[np.minimum(borders, n_sequences - 1)] // self.dtype.itemsize
        self._require_within(starts, self.n_tokens, "a document starts at token")
        return np.where(borders == n_sequences, self.n_tokens, starts)

    def _require_within(self, values: np.ndarray, last: int, what: str) -> None:
        wrong = values[(values < 0) | (values > last)]
        if len(wrong):
            raise DataError(f"{idx_path(self.prefix)}: {what} {wrong[0]} of {last}: the file is corrupt. Write the corpus again")

    def start_of(self, document: int) -> int:
        """Position in `tokens` of the first token of one document (n_documents: the corpus' end)."""
        return int(self.starts_of(slice(document, document + 1))[0])

    def document(self, number: int) -> np.ndarray:
        """Tokens of one document: a zero-copy view."""
        return self.tokens[self.start_of(number) : self.start_of(number + 1)]

    def check(self) -> None:
        """Read the whole .idx and raise :class:`DataError` unless lengths, starts and document borders agree."""
        ends = np.cumsum(self.sequence_lengths, dtype=np.int64) * self.dtype.itemsize
        sound = np.all(self.sequence_lengths >= 0) and np.array_equal(self._pointers[1:], ends[:-1])
        if not (sound and (not len(ends) or self._pointers[0] == 0) and np.all(np.diff(self._borders) >= 0)):
            raise DataError(
                f"{idx_path(self.prefix)}: sequence starts are not the sums of the lengths before them, or document "
                "borders are out of order: the file is corrupt. Write the corpus again"
            )


class IndexedWriter:
    """Writes PREFIX.bin and PREFIX.idx; both appear under their names only when :meth:`close` (or the `with` block) ends.

    Raises :class:`DataError` for ids that `dtype` cannot hold.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype[Any] | type) -> None:
        self.prefix, self.dtype = str(prefix), np.dtype(dtype).newbyteorder("<")
        if self.dtype not in _CODES or self.dtype.kind not in "iu":
            raise DataError(f"{prefix}: tokens of type {np.dtype(dtype)} have no place in the format. Use uint16 or int32")
        self._lengths: list[np.ndarray] = []
        self._borders: list[np.ndarray] = [np.zeros(1, np.int64)]
        self._n_sequences = 0
        self.n_tokens, self.n_documents, self.max_token_id = 0, 0, -1
        bin_path(prefix).parent.mkdir(parents=True, exist_ok=True)
        self._context = contextlib.ExitStack()
        self._bin = self._context.enter_context(atomic_write(bin_path(prefix)))

    def add_document(self, tokens: Sequence[int] | np.ndarray, sequence_lengths: Sequence[int] | None = None) -> None:
        """Append a document: one sequence, or consecutive sequences of the lengths given."""
        ids = np.asarray(tokens)
        lengths = np.asarray([len(ids)] if sequence_lengths is None else sequence_lengths, np.int64)
        if lengths.sum() != len(ids) or np.max(lengths, initial=0) >= 2**31:
            raise DataError(
                f"{self.prefix}: a document of {len(ids)} tokens cannot be sequences of {lengths.tolist()[:8]} tokens. "
                "Each needs a length below 2^31 and their sum must be the document's"
            )
        if len(ids):
            limits, low, high = np.iinfo(self.dtype), int(ids.min()), int(ids.max())
            if low < limits.min or high > limits.max:
                raise DataError(f"{self.prefix}: token id {low if low < 0 else high} does not fit {self.dtype}. Write int32")
            self.max_token_id = max(self.max_token_id, high)
        self._bin.write(ids.astype(self.dtype).tobytes())
        self._extend(lengths.astype("<i4"), np.array([len(lengths)], np.int64), len(ids))

    def add_corpus(self, prefix: str | Path) -> None:
        """Append all documents of another corpus of the same dtype (`max_token_id` does not take note of them)."""
        other = IndexedReader(prefix)
        if other.dtype != self.dtype:
            raise DataError(f"{bin_path(prefix)}: tokens are {other.dtype}, expected {self.dtype}. Write both with one dtype")
        with open(bin_path(prefix), "rb") as source:
            shutil.copyfileobj(source, self._bin, 1 << 20)
        self._extend(np.array(other.sequence_lengths), np.array(other._borders[1:]), other.n_tokens)

    def _extend(self, lengths: np.ndarray, borders: np.ndarray, n_tokens: int) -> None:
        self._lengths.append(lengths)
        self._borders.append(borders + self._n_sequences)
        self._n_sequences += len(lengths)
        self.n_documents += len(borders)
        self.n_tokens += n_tokens

    def close(self) -> None:
        """Write the index and give both files their names; an index already there is withdrawn before its .bin changes."""
        lengths = np.concatenate([np.empty(0, "<i4"), *self._lengths])
        borders = np.concatenate(self._borders)
        pointers = np.zeros(len(lengths), "<i8")
        np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])
        pointers *= self.dtype.itemsize
        with self._context, atomic_write(idx_path(self.prefix)) as file:
            file.write(_HEADER.pack(MAGIC, VERSION, _CODES[self.dtype], len(lengths), len(borders)))
            for part in (lengths, pointers, borders.astype("<i8")):
                file.write(part.tobytes())
            idx_path(self.prefix).unlink(missing_ok=True)
            self._context.close()

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()
        else:
            self._context.__exit__(kind, error, trace)


@dataclass(frozen=True)
class Metadata:
    """What PREFIX.json records of the corpus beside it (corpora written by Megatron-LM have none)."""

    tokenizer: str
    """Copy of the tokenizer, relative to the corpus' folder."""
    tokenizer_sha256: str
    vocab_size: int
    end_of_document: int
    """Id that closes every document."""
    tokens: int
    documents: int
    max_token_id: int
    skipped: int
    """Lines and files left out because they held no document."""
    settings: str
    """Digest of the inputs and options the corpus was made from."""

    @staticmethod
    def path(prefix: str | Path) -> Path:
        """PREFIX.json."""
        return Path(f"{prefix}.json")

    def write(self, prefix: str | Path) -> None:
        """Write PREFIX.json."""
        with atomic_write(self.path(prefix)) as file:
            file.write((json.dumps(dataclasses.asdict(self), indent=1) + "\n").encode())

    @classmethod
    def read(cls, prefix: str | Path) -> Metadata | None:
        """Read PREFIX.json, or return None where there is none; :class:`DataError` if it is damaged."""
        path = cls.path(prefix)
        if not path.exists():
            return None
        types, remedy = {"int": int, "str": str}, "Move it away to use the corpus without it, or write the corpus again"
        data = read_object(path, DataError, remedy)
        if missing := [f.name for f in dataclasses.fields(cls) if f.name not in data]:
            raise DataError(f"{path}: not a record written by tools/prepare_data.py: {', '.join(missing)} is missing. {remedy}")
        if wrong := [f.name for f in dataclasses.fields(cls) if type(data[f.name]) is not types[str(f.type)]]:
            raise DataError(f"{path}: {', '.join(wrong)} has the wrong type. {remedy}")
        record = cls(**{f.name: data[f.name] for f in dataclasses.fields(cls)})
        if not inner_path(record.tokenizer):
            raise DataError(f"{path}: tokenizer = {record.tokenizer!r} does not lie in the corpus' folder. {remedy}")
        return record

    def tokenizer_path(self, prefix: str | Path) -> Path:
        """Where the recorded tokenizer lies now."""
        return self.path(prefix).parent / self.tokenizer
