"""The indexed format: bytes as Megatron-LM writes them, and an error for every kind of damage."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import IO

import numpy as np
import pytest

from megatron_mamba.data import indexed
from megatron_mamba.data.indexed import DataError, IndexedReader, IndexedWriter, Metadata, bin_path, idx_path, token_dtype

DOCUMENTS = [([1, 2, 3, 65535], [3, 1]), ([], [0]), ([7, 8], [2])]
"""Documents and the lengths of their sequences, for which megatron-core's IndexedDatasetBuilder wrote the bytes below."""
GOLDEN = {
    np.uint16: (
        "0100 0200 0300 ffff 0700 0800",
        "4d4d494449445800 00 0100000000000000 08 0400000000000000 0400000000000000"  # magic, version, dtype, two counts
        "03000000 01000000 00000000 02000000"  # sequence lengths
        "0000000000000000 0600000000000000 0800000000000000 0800000000000000"  # where sequences start, in bytes
        "0000000000000000 0200000000000000 0300000000000000 0400000000000000",  # where documents start, in sequences
    ),
    np.int32: (
        "01000000 02000000 03000000 ffff0000 07000000 08000000",
        "4d4d494449445800 00 0100000000000000 04 0400000000000000 0400000000000000"
        "03000000 01000000 00000000 02000000"
        "0000000000000000 0c00000000000000 1000000000000000 1000000000000000"
        "0000000000000000 0200000000000000 0300000000000000 0400000000000000",
    ),
}


def write_golden(prefix: Path, dtype: type = np.uint16) -> bytes:
    content, index = (bytes.fromhex(text) for text in GOLDEN[dtype])
    bin_path(prefix).write_bytes(content)
    idx_path(prefix).write_bytes(index)
    return index


@pytest.mark.parametrize("dtype", GOLDEN)
def test_writer_gives_megatrons_bytes(tmp_path: Path, dtype: type) -> None:
    with IndexedWriter(tmp_path / "c", dtype) as writer:
        for tokens, lengths in DOCUMENTS:
            writer.add_document(tokens, lengths)
        assert not bin_path(tmp_path / "c").exists()
    assert (writer.n_tokens, writer.n_documents, writer.max_token_id) == (6, 3, 65535)
    assert bin_path(tmp_path / "c").read_bytes() == bytes.fromhex(GOLDEN[dtype][0])
    assert idx_path(tmp_path / "c").read_bytes() == bytes.fromhex(GOLDEN[dtype][1])
    assert {f.name for f in tmp_path.iterdir()} == {"c.bin", "c.idx"}


@pytest.mark.parametrize("dtype", GOLDEN)
@pytest.mark.parametrize("modes", [b"", b"\0\1\0\1"])
def test_reader_reads_megatrons_bytes(tmp_path: Path, dtype: type, modes: bytes) -> None:
    idx_path(tmp_path / "c").write_bytes(write_golden(tmp_path / "c", dtype) + modes)
    reader = IndexedReader(tmp_path / "c")
    reader.check()
    assert [reader.document(d).tolist() for d in range(reader.n_documents)] == [tokens for tokens, _ in DOCUMENTS]
    assert np.diff(reader.starts_of(slice(None))).tolist() == [4, 0, 2]
    assert reader.sequence_lengths.tolist() == [3, 1, 0, 2]
    assert reader.tokens[2:6].tolist() == reader.read(2, 6).tolist() == [3, 65535, 7, 8]
    assert np.shares_memory(reader.tokens[1:5], reader.tokens)
    assert reader.starts_of(np.array([2, 0, 3, 1])).tolist() == [4, 0, 6, 4]


def test_joined_corpora_equal_one_corpus(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 500, rng.integers(0, 9)) for _ in range(40)]
    for name, part in (("all", documents), ("a", documents[:17]), ("b", documents[17:])):
        with IndexedWriter(tmp_path / name, np.int32) as writer:
            for document in part:
                writer.add_document(document)
    with IndexedWriter(tmp_path / "joined", np.int32) as writer:
        writer.add_corpus(tmp_path / "a")
        writer.add_corpus(tmp_path / "b")
    for path in (bin_path, idx_path):
        assert path(tmp_path / "joined").read_bytes() == path(tmp_path / "all").read_bytes()
    with pytest.raises(DataError, match="int32"), IndexedWriter(tmp_path / "c", np.uint16) as writer:
        writer.add_corpus(tmp_path / "a")


def test_empty_corpus_can_be_written_and_read(tmp_path: Path) -> None:
    IndexedWriter(tmp_path / "c", np.uint16).close()
    reader = IndexedReader(tmp_path / "c")
    assert (reader.n_tokens, reader.n_documents, len(reader.starts_of(slice(None)))) == (0, 0, 1)


def damage(prefix: Path, path: Path, change: str) -> None:
    content = path.read_bytes()
    replaced = {
        "missing": None, "empty": b"", "cut": content[:-1], "header cut": content[:20], "longer": content + b"\0",
        "magic": b"TNTIDX\0\0\0" + content[9:], "version": content[:9] + b"\2" + content[10:],
        "dtype": content[:17] + b"\11" + content[18:], "floats": content[:17] + b"\7" + content[18:],
        "borders": content[:-8] + b"\3" + content[-7:],
    }[change]  # fmt: skip
    path.unlink()
    if replaced is not None:
        path.write_bytes(replaced)


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        (idx_path, "missing", "c.idx: no such file.*prepare_data"),
        (bin_path, "missing", "c.bin: no such file"),
        (idx_path, "empty", "c.idx: .*expected"),
        (idx_path, "header cut", "c.idx: expected a header of 34 bytes, found 20 bytes: the file is truncated"),
        (idx_path, "cut", "c.idx: expected 114 bytes for 4 sequences and 3 documents, found 113: the file is truncated"),
        (idx_path, "longer", "c.idx: expected 114 bytes for .* found 115: the file is too long"),
        (bin_path, "cut", "c.bin: expected 12 bytes as c.idx says, found 11: the file is truncated. Copy"),
        (bin_path, "longer", "c.bin: expected 12 bytes as c.idx says, found 13: the file is longer"),
        (idx_path, "magic", "c.idx: starts with b'TNTIDX"),
        (idx_path, "version", "c.idx: version 2"),
        (idx_path, "dtype", "c.idx: .*dtype code 9"),
        (idx_path, "floats", "c.idx: holds values of type float32"),
        (idx_path, "borders", "c.idx: its document borders"),
    ],
)
def test_damage_is_named(tmp_path: Path, file, change: str, words: str) -> None:
    write_golden(tmp_path / "c")
    damage(tmp_path / "c", file(tmp_path / "c"), change)
    with pytest.raises(DataError, match=words):
        IndexedReader(tmp_path / "c")


@pytest.mark.parametrize("position", [34, 58, 98])
def test_check_finds_what_sizes_do_not_show(tmp_path: Path, position: int) -> None:
    index = bytearray(write_golden(tmp_path / "c"))
    index[position] ^= 2
    idx_path(tmp_path / "c").write_bytes(index)
    with pytest.raises(DataError, match="corrupt"):
        IndexedReader(tmp_path / "c").check()


@pytest.mark.parametrize("value", [-2, -(2**62), 1000, 2**62])
@pytest.mark.parametrize("position", [34 + 16 + 16, 34 + 16 + 32 + 8])
def test_positions_outside_the_corpus_are_named(tmp_path: Path, position: int, value: int) -> None:
    """A start of a sequence and a border of a document (of 4 sequences, 6 tokens): no such place is read, whoever asks for it."""
    index = bytearray(write_golden(tmp_path / "c"))
    index[position : position + 8] = value.to_bytes(8, "little", signed=True)
    idx_path(tmp_path / "c").write_bytes(index)
    reader = IndexedReader(tmp_path / "c")
    with pytest.raises(DataError, match=r"c\.idx: a document starts at (sequence|token) -?\d+ of \d: the file is corrupt"):
        reader.starts_of(slice(None))


@pytest.mark.parametrize("file", ["c.idx", "c.bin"])
def test_a_file_that_the_system_refuses_is_one_line(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, mode: str) -> IO[bytes]:
        if path.name == file:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return path.open(mode)

    write_golden(tmp_path / "c")
    monkeypatch.setattr(indexed, "open", refuse, raising=False)
    with pytest.raises(DataError, match=rf"{file}: cannot be read \(Permission denied\)\. Let it be read, or copy it again"):
        IndexedReader(tmp_path / "c")


def test_failed_writer_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    index = write_golden(tmp_path / "c")

    def write(tokens: list[int], lengths: list[int] | None = None) -> None:
        with IndexedWriter(tmp_path / "c", np.uint16) as writer:
            writer.add_document([1])
            writer.add_document(tokens, lengths)

    with pytest.raises(DataError, match="token id 65536 does not fit uint16"):
        write([65536])
    with pytest.raises(DataError, match="token id -1"):
        write([-1])
    with pytest.raises(DataError, match="their sum"):
        write([1, 2], [1])
    assert idx_path(tmp_path / "c").read_bytes() == index
    assert {f.name for f in tmp_path.iterdir()} == {"c.bin", "c.idx"}
    with pytest.raises(DataError, match="float32"):
        IndexedWriter(tmp_path / "c", np.float32)


def test_corpus_cut_while_in_use_is_named(tmp_path: Path) -> None:
    write_golden(tmp_path / "c")
    reader = IndexedReader(tmp_path / "c")
    with open(bin_path(tmp_path / "c"), "r+b") as file:
        file.truncate(9)
    with pytest.raises(DataError, match=r"c\.bin: ends before byte 12"):
        reader.read(0, 6)


def test_token_dtype_is_the_narrowest() -> None:
    assert [token_dtype(v) for v in (256, 65535, 65536, 256000)] == [np.uint16, np.uint16, np.int32, np.int32]


def test_metadata_round_trip_and_damage(tmp_path: Path) -> None:
    assert Metadata.read(tmp_path / "c") is None
    record = Metadata("c.tokenizer/tokenizer.model", "ab", 100, 2, 10, 3, 99, 0, "cd")
    record.write(tmp_path / "c")
    assert Metadata.read(tmp_path / "c") == record
    assert record.tokenizer_path(tmp_path / "c") == tmp_path / "c.tokenizer" / "tokenizer.model"
    path = Metadata.path(tmp_path / "c")
    for text, words in (
        ("{", "is no JSON"),
        ("[1]", "holds no object of JSON, but a list"),
        ('{"tokens": 1}', "not a record .* tokenizer, .* is missing"),
        (path.read_text().replace("100", '"x"'), "vocab_size has the wrong type"),
        (path.read_text().replace("100", "true"), "vocab_size has the wrong type"),
        (
            path.read_text().replace("c.tokenizer/", "../"),
            r"tokenizer = '\.\./tokenizer\.model' does not lie in the corpus' folder",
        ),
        (path.read_text().replace("c.tokenizer/", "/etc/"), "does not lie in the corpus' folder"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=f"c.json: .*{words}.*Move it away to use the corpus without it"):
            Metadata.read(tmp_path / "c")
