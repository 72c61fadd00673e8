"""Raw text cut into shards: text files (one document each) and JSON lines, plain or packed by zstd (one document a line)."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import zstandard

from megatron_mamba.data.indexed import DataError
from megatron_mamba.data.inputs import holds_lines, is_zstd

MAX_LINE_BYTES = 1 << 28
"""Longest line that is read unless the user says otherwise: what a packed file unpacks to has no other bound."""
_READ_BYTES = 1 << 17
_PACKED_BYTES = 1 << 10
"""Packed bytes given to zstd at one time: at most 32 MiB come back, as a block of 4 bytes holds no more than 128 KiB."""


@dataclass(frozen=True)
class Shard:
    """A piece of the input that one process turns into tokens at one go. Shards in order are the input in order."""

    number: int
    size: int
    """Bytes of input files it stands for (compressed bytes for .zst)."""
    files: tuple[Path, ...]
    """Text files, a document each, or the one file of lines."""
    span: tuple[int, int] | None = None
    """Of plain lines: those that begin at these bytes (end exclusive)."""
    lines: bytes | None = None
    """Of packed lines: they themselves, unpacked; of one longer than allowed its beginning only, which is too long still."""
    first_line: int = 1
    """Of packed lines: number of the first of them."""


class BadDocumentError(DataError):
    """A line or file that holds no document: invalid JSON or UTF-8, no text under the key, too long a line."""


def iterate_shards(files: Sequence[Path], shard_bytes: int, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[Shard]:
    """Cut `files` into shards of about `shard_bytes` of text; the cuts depend on nothing else.

    Memory is bounded whatever a file unpacks to: of a line longer than `max_line_bytes` only the beginning is kept.
    Raises :class:`DataError` for a damaged .zst file.
    """
    number = 0
    group: list[Path] = []
    size = 0
    for file in [*files, None]:
        lines = file is not None and holds_lines(file)
        if group and (file is None or lines or size >= shard_bytes):
            yield Shard(number, size, tuple(group))
            number, group, size = number + 1, [], 0
        if file is None:
            return
        if not lines:
            group.append(file)
            size += file.stat().st_size
        elif is_zstd(file):
            for shard in _zstd_shards(file, shard_bytes, max_line_bytes, number):
                yield shard
                number += 1
        else:
            total = file.stat().st_size
            for start in range(0, total, shard_bytes):
                end = min(start + shard_bytes, total)
                yield Shard(number, end - start, (file,), span=(start, end))
                number += 1


def _zstd_shards(file: Path, shard_bytes: int, max_line_bytes: int, number: int) -> Iterator[Shard]:
    pending: list[bytes] = []
    size, unended, consumed, first_line = 0, 0, 0, 1
    for block, position in _decompress(file):
        head, newline, tail = block.partition(b"\n")
        piece = head[: max(max_line_bytes + 1 - unended, 0)] + newline + tail
        unended = len(tail) - tail.rfind(b"\n") - 1 if newline else unended + len(head)
        pending.append(piece)
        size += len(piece)
        if not newline or size < shard_bytes:
            continue
        whole, newline, rest = b"".join(pending).rpartition(b"\n")
        yield Shard(number, position - consumed, (file,), lines=whole + newline, first_line=first_line)
        number, consumed, first_line = number + 1, position, first_line + whole.count(b"\n") + 1
        pending, size = [rest], len(rest)
    if size:
        yield Shard(number, file.stat().st_size - consumed, (file,), lines=b"".join(pending), first_line=first_line)


def _decompress(file: Path) -> Iterator[tuple[bytes, int]]:
    """Blocks of the unpacked content (all frames), each with the packed position reached."""
    context = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame = None
    with open(file, "rb", buffering=_READ_BYTES) as source:
        while block := source.read(_PACKED_BYTES):
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


def read_documents(
    shard: Shard, json_key: str = "text", skip_bad: bool = False, max_line_bytes: int = MAX_LINE_BYTES
) -> Iterator[str | None]:
    """The documents of a shard in order, without byte order marks; where there should be one and is none (invalid UTF-8 or JSON,
    no text under the key, a line of more than `max_line_bytes`): :class:`BadDocumentError` naming file and line, or None if
    `skip_bad`."""
    is_line = shard.span is not None or shard.lines is not None
    pieces = _lines(shard, max_line_bytes) if is_line else ((file, file.read_bytes()) for file in shard.files)
    for number, (file, content) in enumerate(pieces):
        content = content.removeprefix(codecs.BOM_UTF8)
        if is_line and not content.strip():
            continue
        try:
            yield _text_of_line(content, json_key, max_line_bytes) if is_line else content.decode("utf-8")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if not skip_bad:
                place = f"{file}, line {_first_line(shard) + number}" if is_line else str(file)
                remedy = "Mend the line, name the text's key with --json-key" if is_line else "Convert it to UTF-8"
                if isinstance(error, _LongLineError):
                    remedy = "Allow more with --max-line-bytes"
                raise BadDocumentError(f"{place}: {_explain(error, json_key)}. {remedy}, or use --skip-bad") from error
            yield None


class _LongLineError(ValueError):
    """A line longer than allowed."""


def _text_of_line(content: bytes, json_key: str, max_line_bytes: int) -> str:
    if len(content) > max_line_bytes and len(content.rstrip(b"\r\n")) > max_line_bytes:
        raise _LongLineError(f"longer than {max_line_bytes:,} bytes")
    text: str = json.loads(content.decode("utf-8"))[json_key]
    text.encode("utf-8")
    return text


def _lines(shard: Shard, max_line_bytes: int) -> Iterator[tuple[Path, bytes]]:
    file = shard.files[0]
    if shard.lines is not None:
        yield from ((file, line) for line in shard.lines.split(b"\n"))
        return
    start, end = shard.span or (0, 0)
    with open(file, "rb") as source:
        if start:
            source.seek(start - 1)
            _end_line(source, source.readline(_READ_BYTES))
        # Two bytes more than allowed: a line of just that length ends with \r\n at most.
        while source.tell() < end and (line := source.readline(max_line_bytes + 2)):
            _end_line(source, line)
            yield file, line


def _end_line(source: BinaryIO, line: bytes) -> None:
    """Pass over the rest of a line of which `line` was read."""
    while line and not line.endswith(b"\n"):
        line = source.readline(_READ_BYTES)


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
        return f"not an object of JSON on one line, {error.msg} at column {error.colno}"
    if isinstance(error, UnicodeEncodeError):
        return "the text holds a lone surrogate, which is no character"
    if isinstance(error, _LongLineError):
        return str(error)
    if isinstance(error, RecursionError):
        return "JSON nested too deep"
    return f"no text under the key {json_key!r}"
