"""Which files are read, and as what: text, or JSON lines, in whatever case their names are written."""

from __future__ import annotations

import codecs
import fnmatch
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePath

from megatron_mamba.data.indexed import DataError

log = logging.getLogger(__name__)

TEXT_GLOBS = (
    "*.txt", "*.text", "*.md", "*.rst", "*.tex", "*.html", "*.py", "*.pyi", "*.c", "*.h", "*.cc", "*.cpp", "*.hpp", "*.cu", "*.cuh",
    "*.java", "*.js", "*.ts", "*.go", "*.rs", "*.sh", "*.sql", "*.jsonl", "*.ndjson", "*.json", "*.jsonl.zst", "*.ndjson.zst",
    "*.json.zst",
)  # fmt: skip
"""What is taken from a folder unless the user says otherwise."""
_LINES = (".jsonl", ".ndjson", ".json")
_UNREADABLE = {
    ".gz", ".tgz", ".xz", ".bz2", ".lz4", ".br", ".zip", ".7z", ".rar", ".tar", ".zst", ".parquet", ".arrow", ".feather", ".orc",
    ".avro", ".pdf", ".docx", ".epub",
}  # fmt: skip
_FIRST_LINE_BYTES = 1 << 24
_KINDS_SHOWN = 8


def holds_lines(file: Path) -> bool:
    """Whether each line of `file` is a document: JSON lines, as they are or packed by zstd."""
    return file.name.lower().removesuffix(".zst").endswith(_LINES)


def is_zstd(file: Path) -> bool:
    """Whether `file` is packed by zstd."""
    return file.suffix.lower() == ".zst"


def find_files(inputs: Iterable[str | Path], globs: Sequence[str] = TEXT_GLOBS, json_key: str = "text") -> list[Path]:
    """Input files in the order given, folders searched recursively (sorted; links are followed, hidden names are not read).

    What a folder holds besides is counted in the log. Of .json files it gives only those whose first line has a text under
    `json_key`, unless `globs` are the user's own. Raises :class:`DataError` for an input that yields no file, or one that
    cannot be read.
    """
    found: list[Path] = []
    for entry in map(Path, inputs):
        if entry.is_dir():
            found += _in_folder(entry, globs, json_key)
        elif entry.is_file():
            found.append(entry)
        else:
            problem = "neither a file nor a folder" if entry.exists() else "no such file or folder"
            raise DataError(f"{entry}: {problem}")
    for file in found:
        if file.suffix.lower() in _UNREADABLE and not (is_zstd(file) and holds_lines(file)):
            raise DataError(f"{file}: {file.suffix} files cannot be read yet. Give plain text, JSON lines (.jsonl) or .jsonl.zst")
        if file.suffix.lower() == ".json" and _first_line(file).startswith(b"["):
            raise DataError(f"{file}: starts with [, and JSON arrays cannot be read yet. Write JSON lines: an object a line")
    return found


def _in_folder(folder: Path, globs: Sequence[str], json_key: str) -> list[Path]:
    found: list[Path] = []
    left: dict[str, list[Path]] = {}
    for file in _walk(folder, left):
        if not any(_matches(file.relative_to(folder), pattern) for pattern in globs):
            left.setdefault(_kind(file), []).append(file)
        elif file.suffix.lower() == ".json" and tuple(globs) == TEXT_GLOBS and not _has_text(file, json_key):
            left.setdefault(f".json without a text under the key {json_key!r} in their first line", []).append(file)
        else:
            found.append(file)
    count = sum(map(len, left.values()))
    parts = [f"{len(files):,} {kind} ({files[0].relative_to(folder)})" for kind, files in left.items()]
    more = f" and {len(parts) - _KINDS_SHOWN} other kinds" if len(parts) > _KINDS_SHOWN else ""
    listed = f"{count:,} left out: {', '.join(parts[:_KINDS_SHOWN])}{more}"
    if not found:
        raise DataError(f"{folder}: no file in it matches {' '.join(globs)}{f'; {listed}' * bool(count)}. Name others with --glob")
    if count:
        log.warning("%s: %s. Name what is to be read with --glob", folder, listed)
    return sorted(found)


def _walk(folder: Path, left: dict[str, list[Path]]) -> Iterator[Path]:
    """Files below `folder`; what is no file, is hidden or was met before is put into `left`."""

    def fail(error: OSError) -> None:
        raise error

    seen = set()
    for base, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        here, status = Path(base), os.stat(base)
        if (status.st_dev, status.st_ino) in seen:
            left.setdefault("folder linked twice", []).append(here)
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        left_here = [here / name for name in sorted([*folders, *names]) if name.startswith(".")]
        if left_here:
            left.setdefault("hidden", []).extend(left_here)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                if (here / name).is_file():
                    yield here / name
                else:
                    left.setdefault("no file, or a broken link", []).append(here / name)


def _matches(path: PurePath, pattern: str) -> bool:
    """Whether the end of `path` matches `pattern`, whatever the case of either."""
    path, pattern = PurePath(str(path).lower()), pattern.lower()
    while pattern.startswith("**/"):
        pattern = pattern[3:]
    return path.match(pattern) if "/" in pattern else fnmatch.fnmatchcase(path.name, pattern)


def _kind(file: Path) -> str:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    return "".join(suffixes[-2:] if suffixes and suffixes[-1] in _UNREADABLE else suffixes[-1:]) or "without a suffix"


def _first_line(file: Path) -> bytes:
    with open(file, "rb") as source:
        line = source.readline(_FIRST_LINE_BYTES).removeprefix(codecs.BOM_UTF8)
        while line.isspace():
            line = source.readline(_FIRST_LINE_BYTES)
    return line.lstrip()


def _has_text(file: Path, json_key: str) -> bool:
    try:
        first = json.loads(_first_line(file))
    except (ValueError, RecursionError):
        return False
    return isinstance(first, dict) and isinstance(first.get(json_key), str)
