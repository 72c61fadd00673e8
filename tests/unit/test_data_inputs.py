"""Which files are read and as what: nothing is read as what it is not, and nothing is left out without a word."""

from __future__ import annotations

import json
import logging
import os
import tracemalloc
from pathlib import Path

import pytest
import zstandard

from megatron_mamba.data import sources
from megatron_mamba.data.indexed import DataError
from megatron_mamba.data.inputs import TEXT_GLOBS, find_files
from megatron_mamba.data.sources import iterate_shards, read_documents

TEXTS = [f"document {i}" for i in range(40)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
BOM = b"\xef\xbb\xbf"


def documents(*inputs: Path, shard_bytes: int = 100, **options) -> list[str | None]:
    limit = {key: value for key, value in options.items() if key == "max_line_bytes"}
    shards = iterate_shards(find_files(inputs), shard_bytes, **limit)
    return [text for shard in shards for text in read_documents(shard, **options)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.json", "a.ndjson", "a.jsonl.zst", "a.JSON.ZST", "a.ndjson.zst"])
@pytest.mark.parametrize("bom", [b"", BOM])
def test_json_lines_are_read_under_all_their_names(tmp_path: Path, name: str, bom: bytes) -> None:
    content = bom + LINES
    (tmp_path / name).write_bytes(zstandard.compress(content) if name.lower().endswith(".zst") else content)
    assert documents(tmp_path / name) == TEXTS
    assert documents(tmp_path) == TEXTS


def test_byte_order_marks_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(BOM + b"abc")
    # As cat joins files that begin with one.
    (tmp_path / "b.jsonl").write_bytes(BOM + LINES + BOM + LINES + BOM)
    assert documents(tmp_path) == ["abc", *TEXTS, *TEXTS]


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    def refused(name: str, content: bytes, words: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=words):
            documents(tmp_path / name)

    refused("a.json", BOM + b' \n [{"text": "a"}]', r"a\.json: starts with \[, and JSON arrays cannot be read yet")
    refused("b.json", b'{\n "text": "a"\n}\n', r"b\.json, line 1: not an object of JSON on one line")
    for suffix in ("jsonl.gz", "JSONL.GZ", "parquet", "ARROW", "txt.zst", "pdf"):
        refused(f"c.{suffix}", b"", rf"c\.{suffix}: \.\w+ files cannot be read yet")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe: neither a file nor a folder"):
        find_files([tmp_path / "pipe"])


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    folder = tmp_path / "mixed"
    (folder / ".git").mkdir(parents=True)
    (folder / "inner").mkdir()
    (tmp_path / "elsewhere").mkdir()
    for name in ("a.txt", "inner/B.TXT", ".git/x.txt", ".hidden.txt", "c.png", "c.jsonl.gz", "d.parquet", "e.parquet"):
        (folder / name).write_text("text")
    (folder / "lines.json").write_bytes(LINES)
    (folder / "package.json").write_text('{\n "name": "no text"\n}')
    (folder / "settings.json").write_text('{"name": "no text"}')
    (tmp_path / "elsewhere" / "f.txt").write_text("text")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "loop").symlink_to(folder)
    (folder / "broken.txt").symlink_to(tmp_path / "none")
    return folder


def test_folder_says_what_it_leaves_out(mixed: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = find_files([mixed])
    assert [str(path.relative_to(mixed)) for path in found] == ["a.txt", "inner/B.TXT", "lines.json", "link/f.txt"]
    (line,) = caplog.messages
    assert line.startswith(f"{mixed}: 10 left out: ")
    for part in (
        "2 hidden (.git)", "1 .png (c.png)", "1 .jsonl.gz (c.jsonl.gz)", "2 .parquet (d.parquet)",
        "1 folder linked twice (loop)",
        "2 .json without a text under the key 'text' in their first line (package.json)",
        "1 no file, or a broken link (broken.txt)",
    ):  # fmt: skip
        assert part in line, part
    assert line.endswith("Name what is to be read with --glob")


def test_globs_choose_from_a_folder(mixed: Path, tmp_path: Path) -> None:
    def chosen(*globs: str) -> list[str]:
        return [str(path.relative_to(mixed)) for path in find_files([mixed], globs)]

    assert chosen("*.txt") == chosen("**/*.TXT") == ["a.txt", "inner/B.TXT", "link/f.txt"]
    assert chosen("inner/*") == ["inner/B.TXT"]
    # Asked for by name, they are read as JSON lines, and refused if they are none.
    assert chosen("*.json") == ["lines.json", "package.json", "settings.json"]
    with pytest.raises(DataError, match=r"c\.jsonl\.gz: \.gz files cannot be read yet"):
        find_files([mixed], ["*.gz"])
    with pytest.raises(DataError, match=r"no file in it matches \*\.rst; 1[0-9] left out: .*2 hidden.*Name others with --glob"):
        find_files([mixed], ["*.rst"])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.json").write_text('{"content": "a"}\n')
    with pytest.raises(DataError, match=r"1 \.json without a text under the key 'text' in their first line \(a\.json\)"):
        find_files([tmp_path / "other"], TEXT_GLOBS)
    assert len(find_files([tmp_path / "other"], json_key="content")) == 1


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
def test_too_long_a_line_is_named_or_skipped(tmp_path: Path, packed: bool, ending: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_PACKED_BYTES", 7)
    lines = LINES.splitlines()
    limit = 300
    longest = json.dumps({"text": "x" * (limit - 12)}).encode()
    assert len(longest) == limit
    lines[5], lines[20], lines[-1] = longest, longest[:-2] + b'x"}', b"y" * 2000
    content = ending.join(lines) + ending
    path = tmp_path / ("a.jsonl.zst" if packed else "a.jsonl")
    path.write_bytes(zstandard.compress(content) if packed else content)
    with pytest.raises(DataError, match=rf"{path.name}, line 21: longer than 300 bytes. Allow more with --max-line-bytes"):
        documents(path, max_line_bytes=limit)
    for shard_bytes in (100, 100_000):
        found = documents(path, shard_bytes=shard_bytes, max_line_bytes=limit, skip_bad=True)
        assert [i for i, text in enumerate(found) if text is None] == [20, 39]
        assert found[5] == "x" * (limit - 12)
        assert found[6:20] == TEXTS[6:20]


def test_memory_is_bounded_whatever_a_file_unpacks_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 MiB on one line, and on lines of 1 MiB, in some hundred bytes of file: a block of them is unpacked at a time."""
    monkeypatch.setattr(sources, "_PACKED_BYTES", 16)
    line = b"x" * (1 << 20)
    for name, content, limit, wanted in (("a", 16 * line, 10_000, 1), ("b", 16 * (line + b"\n"), 1 << 20, 16)):
        path = tmp_path / f"{name}.jsonl.zst"
        path.write_bytes(zstandard.compress(content))
        assert path.stat().st_size < 1000
        tracemalloc.start()
        found = [text for shard in iterate_shards([path], 1000, limit) for text in read_documents(shard, "text", True, limit)]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert found == [None] * wanted
        assert peak < 8 << 20
