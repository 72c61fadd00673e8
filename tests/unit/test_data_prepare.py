"""prepare_data: equal to a slow loop over documents, whoever does the work and however often it is interrupted."""

from __future__ import annotations

import errno
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zstandard

import prepare_data
import train_tokenizer as train_tokenizer_tool
from megatron_mamba.data import prepare as module
from megatron_mamba.data import sources
from megatron_mamba.data.indexed import DataError, IndexedReader, Metadata, bin_path, idx_path
from megatron_mamba.data.prepare import prepare
from megatron_mamba.data.tokenizer import load_tokenizer
from megatron_mamba.data.train_tokenizer import train_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SMALLEST_SHARD", 700)
    monkeypatch.setattr(sources, "_PACKED_BYTES", 50)


def texts(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    words = ["state", "space", "é", "\n", "\t", "  ", "scan", "漢字", '"', "\\"]
    return [" ".join(rng.choices(words, k=rng.randint(0, 60))) for _ in range(count)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text files, a .jsonl with blank lines and no newline at its end, a .jsonl.zst of two frames; a tokenizer."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "text" / "inner").mkdir(parents=True)
    for number, text in enumerate(texts(0, 12)):
        path = folder / "text" / ("inner" if number % 3 else ".") / f"{number:02d}.{'txt' if number % 2 else 'py'}"
        path.write_bytes(text.encode())
    (folder / "text" / "left.out").write_text("no text")
    lines = [json.dumps({"id": 1, "text": text}, ensure_ascii=len(text) % 2 == 0).encode() for text in texts(1, 60)]
    (folder / "a.jsonl").write_bytes(b"\n\n".join(lines))
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in texts(2, 60)]
    frames = [b"".join(lines[:31])[:-5], b"".join(lines[:31])[-5:] + b"".join(lines[31:])]
    (folder / "b.jsonl.zst").write_bytes(b"".join(zstandard.compress(frame) for frame in frames))
    train_tokenizer([folder / "text", folder / "a.jsonl"], 300, folder / "tok.model")
    return folder


def inputs(source: Path) -> list[Path]:
    return [source / "text", source / "a.jsonl", source / "b.jsonl.zst"]


def expected(source: Path) -> list[str]:
    files = sorted(path for path in (source / "text").rglob("*") if path.suffix in (".txt", ".py"))
    return [text for text in [*(f.read_bytes().decode() for f in files), *texts(1, 60), *texts(2, 60)] if text]


def files_of(prefix: Path) -> list[bytes]:
    return [bin_path(prefix).read_bytes(), idx_path(prefix).read_bytes(), Metadata.path(prefix).read_bytes()]


@pytest.fixture(scope="module")
def reference(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus, made by one process at one go."""
    prefix = tmp_path_factory.mktemp("reference") / "c"
    prepare(inputs(source), source / "tok.model", prefix)
    return prefix


def test_corpus_equals_a_slow_loop(source: Path, reference: Path) -> None:
    tokenizer = load_tokenizer(source / "tok.model")
    reader = IndexedReader(reference)
    reader.check()
    documents = [reader.document(d).tolist() for d in range(reader.n_documents)]
    assert documents == [[*tokenizer.encode(text), 2] for text in expected(source)]
    assert [tokenizer.decode(document) for document in documents] == expected(source)
    record = Metadata.read(reference)
    assert record is not None
    assert (record.tokens, record.documents, record.skipped) == (reader.n_tokens, reader.n_documents, 0)
    assert (record.vocab_size, record.end_of_document, record.max_token_id) == (300, 2, int(reader.tokens.max()))
    assert record.tokenizer_sha256 == load_tokenizer(record.tokenizer_path(reference)).sha256 == tokenizer.sha256
    assert reader.dtype == np.uint16
    assert {path.name for path in reference.parent.iterdir()} == {"c.bin", "c.idx", "c.json", "c.tokenizer"}


def test_three_processes_write_the_same_bytes(source: Path, reference: Path, tmp_path: Path) -> None:
    prepare(inputs(source), source / "tok.model", tmp_path / "c", workers=3)
    assert files_of(tmp_path / "c") == files_of(reference)


def test_killed_command_goes_on_where_it_was(
    source: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = """
import sys, time
from megatron_mamba.data import prepare, tokenizer
prepare._SMALLEST_SHARD, prepare.iterate_shards.__globals__["_PACKED_BYTES"] = 700, 50
encode = tokenizer.SentencePieceTokenizer.encode
tokenizer.SentencePieceTokenizer.encode = lambda self, text: time.sleep(0.05) or encode(self, text)
prepare.prepare(sys.argv[1:-2], sys.argv[-2], sys.argv[-1])
"""
    arguments = [*map(str, inputs(source)), str(source / "tok.model"), str(tmp_path / "c")]
    process = subprocess.Popen([sys.executable, "-c", script, *arguments], stderr=subprocess.DEVNULL, cwd=ROOT)
    folder = tmp_path / "c.shards"
    deadline = time.monotonic() + 300
    while len(list(folder.glob("*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {int(path.stem) for path in folder.glob("*.json")}
    assert len(finished) >= 3
    assert not idx_path(tmp_path / "c").exists()
    with pytest.raises(DataError, match=r"c\.shards: holds \d+ finished parts from other inputs.*--overwrite"):
        prepare([source / "text"], source / "tok.model", tmp_path / "c")
    again: list[int] = []
    tokenise = module.tokenise_shard

    def counted(shard, *options):
        again.append(shard.number)
        return tokenise(shard, *options)

    monkeypatch.setattr(module, "tokenise_shard", counted)
    (tmp_path / "c.bin.tmp-12345678").write_text("left by a kill while joining")
    prepare(inputs(source), source / "tok.model", tmp_path / "c")
    assert files_of(tmp_path / "c") == files_of(reference)
    assert again
    assert not finished & set(again)
    assert {path.name for path in tmp_path.iterdir()} == {"c.bin", "c.idx", "c.json", "c.tokenizer"}
    again.clear()
    record = prepare(inputs(source), source / "tok.model", tmp_path / "c")
    assert record == Metadata.read(tmp_path / "c")
    assert not again


def test_other_inputs_do_not_replace_a_corpus_unasked(source: Path, tmp_path: Path) -> None:
    prepare([source / "a.jsonl"], source / "tok.model", tmp_path / "c")
    before = files_of(tmp_path / "c")
    with pytest.raises(DataError, match=r"c\.idx: exists already.*--overwrite"):
        prepare([source / "text"], source / "tok.model", tmp_path / "c")
    assert files_of(tmp_path / "c") == before
    prepare([source / "text"], source / "tok.model", tmp_path / "c", overwrite=True)
    assert IndexedReader(tmp_path / "c").n_documents == len([t for t in texts(0, 12) if t])


BAD = {"cut": b'{"text": "a', "key": b'{"other": "a"}', "type": b'{"text": 5}', "list": b"[1]", "utf8": b'{"text": "\xff"}',
       "surrogate": b'{"text": "\\ud800"}'}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("packed", [False, True])
def test_bad_line_is_named_or_skipped(source: Path, tmp_path: Path, bad: str, packed: bool) -> None:
    lines = [json.dumps({"text": f"document {i}"}).encode() for i in range(150)]
    lines[97] = BAD[bad]
    lines.insert(20, b"")
    content = b"\n".join(lines) + b"\n"
    frames = [zstandard.compress(content[start : start + 800]) for start in range(0, len(content), 800)]
    path = tmp_path / ("a.jsonl.zst" if packed else "a.jsonl")
    path.write_bytes(b"".join(frames) if packed else content)
    with pytest.raises(DataError, match=rf"{path.name}, line 99: .*--skip-bad"):
        prepare([path], source / "tok.model", tmp_path / "c")
    record = prepare([path], source / "tok.model", tmp_path / "d", skip_bad=True)
    assert (record.skipped, record.documents) == (1, 149)


@pytest.mark.parametrize("remedy", ["mend", "key", "skip", "longer"])
def test_remedies_of_a_bad_line_lead_on(source: Path, tmp_path: Path, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished work that what the message advises does not touch is kept, and what comes out is what one run would have made."""
    (tmp_path / "good").mkdir()
    for number, text in enumerate(texts(3, 40)):
        (tmp_path / "good" / f"{number}.txt").write_text(text)
    key = "body" if remedy == "key" else "text"
    lines = [json.dumps({key: f"document {i}"}) for i in range(40)]
    bad = {"mend": "{", "key": lines[30], "skip": "{", "longer": json.dumps({"text": "x" * 200})}[remedy]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([*lines[:30], bad, *lines[30:]]))
    given = [tmp_path / "good", path]
    limit = {"max_line_bytes": 100} if remedy == "longer" else {}
    with pytest.raises(DataError, match=rf"a\.jsonl, line \d+: .*{'--max-line-bytes' if limit else '--json-key'}.*--skip-bad"):
        prepare(given, source / "tok.model", tmp_path / "c", **limit)
    finished = {path.stem for path in (tmp_path / "c.shards").glob("*.json")}
    assert finished
    if remedy == "mend":
        path.write_text("\n".join(lines))
        changed = min((tmp_path / "good").iterdir())  # in the first of the finished shards
        changed.write_text("x" * len(changed.read_text()))
    changes: dict = {"key": {"json_key": "body"}, "skip": {"skip_bad": True}, "longer": {"max_line_bytes": 1000}}
    options = changes.get(remedy, {})
    again: list[str] = []
    tokenise = module.tokenise_shard

    def counted(shard, *rest):
        again.append(f"{shard.number:08d}")
        return tokenise(shard, *rest)

    monkeypatch.setattr(module, "tokenise_shard", counted)
    prepare(given, source / "tok.model", tmp_path / "c", **options)
    assert finished - set(again)
    prepare(given, source / "tok.model", tmp_path / "d", **options)
    assert files_of(tmp_path / "c")[:2] == files_of(tmp_path / "d")[:2]


def test_work_that_left_out_bad_lines_is_not_taken_for_whole(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("{\n" + "".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(150)))
    tokenise = module.tokenise_shard

    def killed(shard, *rest):
        if shard.number == 2:
            raise KeyboardInterrupt
        return tokenise(shard, *rest)

    monkeypatch.setattr(module, "tokenise_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare([path], source / "tok.model", tmp_path / "c", skip_bad=True)
    assert (tmp_path / "c.shards" / "00000000.json").exists()
    monkeypatch.setattr(module, "tokenise_shard", tokenise)
    with pytest.raises(DataError, match=r"a\.jsonl, line 1: "):
        prepare([path], source / "tok.model", tmp_path / "c")


def test_second_command_to_one_output_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenise = module.tokenise_shard
    temporary = tmp_path / "c.d.bin.tmp-12345678"
    temporary.write_text("of another output, being written")

    def during(shard, *options):
        with pytest.raises(DataError, match=r"c: is being made by another process \(process \d+ on .+\)\. Wait for it"):
            prepare([source / "text"], source / "tok.model", tmp_path / "c", overwrite=True)
        return tokenise(shard, *options)

    monkeypatch.setattr(module, "tokenise_shard", during)
    (tmp_path / "c.lock").write_text("left by a process that was killed")
    record = prepare([source / "a.jsonl"], source / "tok.model", tmp_path / "c")
    assert record.documents == len([text for text in texts(1, 60) if text])
    assert temporary.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"c.bin", "c.idx", "c.json", "c.tokenizer", temporary.name}


def test_nothing_to_tokenise_leaves_nothing(source: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match="no document with text"):
        prepare([tmp_path / "a.txt"], source / "tok.model", tmp_path / "c")
    prepare([source / "a.jsonl"], source / "tok.model", tmp_path / "c")


def test_bad_input_is_named(source: Path, tmp_path: Path) -> None:
    def refused(path: Path, words: str) -> None:
        with pytest.raises(DataError, match=words):
            prepare([path], source / "tok.model", tmp_path / "c", overwrite=True)

    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    refused(tmp_path / "a.txt", r"a\.txt: not UTF-8 at byte 3")
    packed = (source / "b.jsonl.zst").read_bytes()
    (tmp_path / "b.jsonl.zst").write_bytes(packed[:-20])
    refused(tmp_path / "b.jsonl.zst", rf"b\.jsonl\.zst: {len(packed) - 20} bytes that end in the middle.*truncated")
    (tmp_path / "b.jsonl.zst").write_bytes(b"\0" * 100)
    refused(tmp_path / "b.jsonl.zst", r"b\.jsonl\.zst: damaged near byte")
    (tmp_path / "c.txt.gz").write_bytes(b"")
    refused(tmp_path / "c.txt.gz", r"c\.txt\.gz: \.gz files cannot be read")
    refused(tmp_path / "none", "none: no such file or folder")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", r"folder: no file in it matches \*\.txt.*--glob")
    (tmp_path / "empty.txt").write_bytes(b"")
    refused(tmp_path / "empty.txt", "no document with text")


def test_shards_may_lie_on_another_disk(source: Path, reference: Path, tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "c.shards").symlink_to(tmp_path / "scratch")
    prepare(inputs(source), source / "tok.model", tmp_path / "c")
    assert files_of(tmp_path / "c") == files_of(reference)
    assert {path.name for path in tmp_path.iterdir()} == {"c.bin", "c.idx", "c.json", "c.tokenizer"}


def test_full_disk_is_said_and_finished_work_kept(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenise = module.tokenise_shard

    def fail(shard, *options):
        if shard.number == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return tokenise(shard, *options)

    monkeypatch.setattr(module, "tokenise_shard", fail)
    with pytest.raises(DataError, match="c: no room left on the disk"):
        prepare([source / "a.jsonl"], source / "tok.model", tmp_path / "c")
    assert len(list((tmp_path / "c.shards").glob("*.json"))) >= 3


def test_command_lines(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, prefix = str(tmp_path / "m" / "t.model"), str(tmp_path / "p" / "c")
    assert train_tokenizer_tool.main(["--input", str(source / "text"), "--vocab-size", "290", "--output", model]) == 0
    arguments = ["--input", str(source / "a.jsonl"), "--tokenizer", model, "--output", prefix, "--workers", "1"]
    assert prepare_data.main(arguments) == 0
    assert f"{prefix}: {IndexedReader(prefix).n_documents:,} documents, " in capsys.readouterr().out
    assert prepare_data.main([*arguments, "--json-key", "body"]) == 1
    assert "error: " in capsys.readouterr().err
