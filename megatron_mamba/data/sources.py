"""Raw text cut into shards: text files (one document each), .jsonl and .jsonl.zst (one document a line)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import zstandard

from megatron_mamba.data.indexed import DataError

TEXT_GLOBS = (
    "*.txt", "*.text", "*.md", "*.rst", "*.tex", "*.html", "*.py", "*.pyi", "*.c", "*.h", "*.cc", "*.cpp", "*.hpp", "*.cu", "*.cuh",
    "*.java", "*.js", "*.ts", "*.go", "*.rs", "*.sh", "*.sql", "*.jsonl", "*.jsonl.zst",
)  # fmt: skip
"""What is taken from a folder unless the user says otherwise."""
_UNREADABLE = {".gz", ".xz", ".bz2", ".zip", ".zst", ".tar", ".parquet", ".arrow"}
_READ_BYTES = 1 << 17


@dataclass(frozen=True)
class Shard:
    """A piece of the input that one process turns into tokens at one go. Shards in order are the input in order."""

    number: int
    size: int
    """Bytes of input files it stands for (compressed bytes for .zst)."""
    files: tuple[Path, ...]
    """Text files, a document each, or the one file of lines."""
    span: tuple[int, int] | None = None
    """Of a .jsonl: the lines that begin at these bytes (end exclusive)."""
    lines: bytes | None = None
    """Of a .jsonl.zst: the lines themselves, uncompressed."""
    first_line: int = 1
    """Of a .jsonl.zst: number of the first of them."""


class BadDocumentError(DataError):
    """A line or file that holds no document: invalid JSON or UTF-8, no text under the key."""


def find_files(inputs: Iterable[str | Path], globs: Sequence[str] = TEXT_GLOBS) -> list[Path]:
    """Input files in the order given, folders searched recursively (sorted); raises :class:`DataError` if one yields none."""
    found: list[Path] = []
    for entry in map(Path, inputs):
        if not entry.exists():
            raise DataError(f"{entry}: no such file or folder")
        files = sorted({f for g in globs for f in entry.rglob(g) if f.is_file()}) if entry.is_dir() else [entry]
        if not files:
            raise DataError(f"{entry}: no file in it matches {' '.join(globs)}. Name others with --glob")
        found += files
    for file in found:
        if file.suffix in _UNREADABLE and not file.name.endswith(".jsonl.zst"):
            raise DataError(f"{file}: {file.suffix} files cannot be read. Give plain text, .jsonl or .jsonl.zst")
    return found


def iterate_shards(files: Sequence[Path], shard_bytes: int) -> Iterator[Shard]:
    """Cut `files` into shards of about `shard_bytes` of text; the cuts depend on nothing else.

    Raises :class:`DataError` for a damaged .zst file.
    """
    number = 0
    group: list[Path] = []
    size = 0
    for file in [*files, None]:
        lines = file is not None and file.name.endswith((".jsonl", ".jsonl.zst"))
        if group and (file is None or lines or size >= shard_bytes):
            yield Shard(number, size, tuple(group))
            number, group, size = number + 1, [], 0
        if file is None:
            return
        if not lines:
            group.append(file)
            size += file.stat().st_size
        elif file.suffix == ".zst":
            for shard in _zstd_shards(file, shard_bytes, number):
                yield shard
                number += 1
        else:
            total = file.stat().st_size
            for start in range(0, total, shard_bytes):
                end = min(start + shard_bytes, total)
                yield Shard(number, end - start, (file,), span=(start, end))
                number += 1


def _zstd_shards(file: Path, shard_bytes: int, number: int) -> Iterator[Shard]:
    pending: list[bytes] = []
    size, consumed, first_line = 0, 0, 1
    for block, position in _decompress(file):
        pending.append(block)
        size += len(block)
        if size < shard_bytes:
            continue
        whole, newline, rest = b"".join(pending).rpartition(b"\n")
        if newline:
            yield Shard(number, position - consumed, (file,), lines=whole + newline, first_line=first_line)
            number, consumed, first_line = number + 1, position, first_line + whole.count(b"\n") + 1
        pending, size = [rest], len(rest)
    if size:
        yield Shard(number, file.stat().st_size - consumed, (file,), lines=b"".join(pending), first_line=first_line)


def _decompress(file: Path) -> Iterator[tuple[bytes, int]]:
    """Blocks of the uncompressed content (all frames), each with the compressed position reached."""
    context = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame = None
    with open(file, "rb") as source:
        while block := source.read(_READ_BYTES):
            while block:
                frame = frame or context.decompressobj()
                try:
                    yield frame.decompress(block), source.tell()
                except zstandard.ZstdError as error:
                    raise DataError(f"{file}: damaged near byte {source.tell()} ({error}). Fetch it again") from error
                block, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise DataError(
            f"{file}: {file.stat().st_size} bytes that end in the middle of a zstd frame: the file is truncated. Fetch it again"
        )


def read_documents(shard: Shard, json_key: str = "text", skip_bad: bool = False) -> Iterator[str | None]:
    """The documents of a shard in order; where there should be one and is none (invalid UTF-8 or JSON, no text under the key):
    :class:`BadDocumentError` naming file and line, or None if `skip_bad`."""
    pieces = ((file, file.read_bytes()) for file in shard.files) if shard.span is None and shard.lines is None else _lines(shard)
    for number, (file, content) in enumerate(pieces):
        is_line = file.name.endswith((".jsonl", ".jsonl.zst"))
        if is_line and not content.strip():
            continue
        remedy = "Convert it, or use --skip-bad"
        try:
            text = content.decode("utf-8")
            if is_line:
                remedy = "Mend the line, name the text's key with --json-key, or use --skip-bad"
                text = json.loads(text)[json_key]
                text.encode("utf-8")
            yield text
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if not skip_bad:
                place = f"{file}, line {_first_line(shard) + number}" if is_line else str(file)
                raise BadDocumentError(f"{place}: {_explain(error, json_key)}. {remedy}") from error
            yield None


def _lines(shard: Shard) -> Iterator[tuple[Path, bytes]]:
    file = shard.files[0]
    if shard.lines is not None:
        yield from ((file, line) for line in shard.lines.split(b"\n"))
        return
    start, end = shard.span or (0, 0)
    with open(file, "rb") as source:
        if start:
            source.seek(start - 1)
            source.readline()
        while source.tell() < end and (line := source.readline()):
            yield file, line


def _first_line(shard: Shard) -> int:
    """Number of the first line of a shard of lines."""
    if shard.span is None or not shard.span[0]:
        return shard.first_line
    count, left = 2, shard.span[0] - 1
    with open(shard.files[0], "rb") as source:
        while left and (block := source.read(min(left, _READ_BYTES))):
            count += block.count(b"\n")
            left -= len(block)
    return count


def _explain(error: Exception, json_key: str) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 at byte {error.start} ({error.reason})"
    if isinstance(error, json.JSONDecodeError):
        return f"invalid JSON, {error.msg} at column {error.colno}"
    if isinstance(error, UnicodeEncodeError):
        return "the text holds a lone surrogate, which is no character"
    return f"no text under the key {json_key!r}"
