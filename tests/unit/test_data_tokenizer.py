"""Tokenizers: nothing lost on the way to ids and back, whatever the text."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
from pathlib import Path

import pytest
import sentencepiece

from megatron_mamba.data.indexed import DataError
from megatron_mamba.data.permutation import mix32
from megatron_mamba.data.sources import iterate_shards
from megatron_mamba.data.tokenizer import load_tokenizer, save_tokenizer, tokenizer_sha256
from megatron_mamba.data.train_tokenizer import sample, train_tokenizer
from megatron_mamba.progress import Progress

NASTY = [
    "", " ", "  two  spaces  ", "\n", "\n\n\t\t x\n", "\r\n\r", "a\0b", "é漢字🙂👨\u200d👩\u200d👧", "</s> <s> <unk> <0x41>",
    "\u2028\u3000\u00a0\u200b", "ｶﾞ\x7f\x01", "x" * 999, "\ufeffabc\ufffd",
    "e\u0301 \u00e9", "\tdef f(x):\n\t\treturn    x\n", "🏴" * 3 + "\U0010ffff\ue000",
]  # fmt: skip


def write_text(path: Path) -> Path:
    rng = random.Random(0)
    words = ["def", "return", "the", "state", "space", "model", "scan", "for", "in", "range", "x", "dt"]
    lines = ["    " * rng.randint(0, 3) + " ".join(rng.choices(words, k=rng.randint(0, 9))) for _ in range(400)]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    return train_tokenizer([write_text(folder / "text.txt")], 330, folder / "tok.model")


def test_trained_model_is_lossless(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    rng = random.Random(1)
    strings = [*NASTY, *("".join(rng.choices([*" \n\tabcé漢🙂</s>", "the", "    "], k=60)) for _ in range(200))]
    assert [tokenizer.decode(tokenizer.encode(text)) for text in strings] == strings
    assert tokenizer.decode(tokenizer.encode("a\u2581b")) == "a b"  # the one exception
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.eod_id) == (330, 1, 2, 2)
    assert not {0, 1, 2} & {i for text in strings for i in tokenizer.encode(text)}
    assert tokenizer.decode([1, *tokenizer.encode("x"), 2]) == "x"


def test_trained_model_keeps_white_space_apart(model: Path) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    split = processor.encode("the\n\n        state\tmodel", out_type=str)
    assert "".join(split) == "the\n\n▁▁▁▁▁▁▁▁state\tmodel"
    assert [piece for piece in split if not piece.strip("▁\n\t")][:3] == ["\n", "\n", "▁▁▁▁▁▁▁▁"]
    pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    assert [piece for piece in pieces if "\n" in piece or "\t" in piece] == ["\n", "\t"]
    assert "▁▁▁▁" in pieces


def test_training_says_what_it_cannot_do(model: Path, tmp_path: Path) -> None:
    text = model.with_name("text.txt")
    with pytest.raises(DataError, match=r"t\.model: a vocabulary of 9000 pieces cannot .*Vocabulary size too high.*--vocab-size"):
        train_tokenizer([text], 9000, tmp_path / "t.model")
    with pytest.raises(DataError, match="vocabulary of 100 pieces"):
        train_tokenizer([text], 100, tmp_path / "t.model")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match=r"empty\.txt: no text"):
        train_tokenizer([tmp_path / "empty.txt"], 300, tmp_path / "t.model")
    assert not (tmp_path / "t.model").exists()


def test_sample_is_even_and_bounded(tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl"
    path.write_bytes((b"x" * 99 + b"\n") * 5000)
    with Progress(None, "", "B") as progress:
        kept = sample(iterate_shards([path], 1000), 100_000, progress)
        assert 50_000 < sum(shard.size for shard in kept) <= 100_000
        numbers = [shard.number for shard in kept]
        assert numbers == sorted(numbers)
        draws = sorted(range(500), key=lambda number: mix32(number + 1))
        assert sorted(draws[: len(kept)]) == numbers  # those with the smallest hashes: no part of the input is preferred
        assert len(sample(iterate_shards([path], 1000), 10, progress)) == 1
        assert len(sample(iterate_shards([path], 1000), 10**9, progress)) == 500


def test_files_are_found_told_apart_and_copied(model: Path, tmp_path: Path) -> None:
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    copy = save_tokenizer(model, tmp_path / "checkpoint")
    assert copy == tmp_path / "checkpoint" / "tokenizer.model"
    assert save_tokenizer(copy, tmp_path / "checkpoint") == copy
    assert load_tokenizer(tmp_path / "checkpoint").sha256 == tokenizer_sha256(copy) == digest
    (tmp_path / "broken.model").write_bytes(model.read_bytes()[:-3])
    (tmp_path / "broken.json").write_text("{}")
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(DataError, match=f"{path.name}: no tokenizer there"):
            load_tokenizer(path)
    with pytest.raises(DataError, match=r"broken\.model: not a SentencePiece model"):
        load_tokenizer(tmp_path / "broken.model")
    pytest.importorskip("tokenizers")
    with pytest.raises(DataError, match=r"broken\.json: not a Hugging Face tokenizer"):
        load_tokenizer(tmp_path / "broken.json")


def test_a_full_disk_costs_no_copy_that_is_there(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    copy = save_tokenizer(model, tmp_path)
    before = copy.read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    assert save_tokenizer(model, tmp_path) == copy, "the same is not written again"
    (tmp_path / "other").mkdir()
    (tmp_path / "other/tokenizer.model").write_bytes(before + b"x")
    with pytest.raises(DataError, match=r"tokenizer\.model cannot be written: No space left on device. Free space"):
        save_tokenizer(tmp_path / "other", tmp_path)
    assert copy.read_bytes() == before
    with pytest.raises(DataError, match=r"below/tokenizer\.json cannot be written: Not a directory"):
        save_tokenizer(model, copy / "below")


def test_a_file_that_the_system_refuses_is_one_line(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    for use in (load_tokenizer, tokenizer_sha256):
        with pytest.raises(DataError, match=rf"{model.name}: cannot be read \(Permission denied\)\. Let it be read"):
            use(model)


def test_model_without_end_token_is_refused_for_corpora(model: Path, tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(model.with_name("text.txt").read_text().split("\n")), model_prefix=str(tmp_path / "t"),
        vocab_size=60, model_type="bpe", eos_id=-1, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    tokenizer = load_tokenizer(tmp_path / "t.model")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, None)
    with pytest.raises(DataError, match=r"t\.model: has no end-of-sequence token"):
        _ = tokenizer.eod_id


def test_hugging_face_tokenizer_is_lossless(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    raw = tokenizers.Tokenizer(tokenizers.models.BPE())
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train([str(write_text(tmp_path / "text.txt"))], trainer)
    raw.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    raw.enable_truncation(5)
    raw.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id) == (300, None, None)
    with pytest.raises(DataError, match=r"tokenizer\.json: has no end-of-sequence token .* not guessed where several fit"):
        _ = tokenizer.eod_id
    assert [tokenizer.decode(tokenizer.encode(text)) for text in NASTY] == NASTY
    assert not {0, 1} & set(tokenizer.encode("</s><|endoftext|>"))
    assert tokenizer.decode([0, *tokenizer.encode("x"), 1]) == "x"


@pytest.mark.parametrize(
    ("content", "words"), [("{", "is no JSON"), ("[1]", "holds no object of JSON, but a list"), ('{"eos_token": ["a"]}', None)]
)
def test_wrong_tokenizer_config_is_one_line(tmp_path: Path, content: str, words: str | None) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(content)
    if words is None:
        assert load_tokenizer(tmp_path).eos_id is None
        return
    with pytest.raises(DataError, match=rf"tokenizer_config\.json: {words}.*Copy it again"):
        load_tokenizer(tmp_path)


def declare(folder: Path, name: str, **tokens: object) -> Path:
    (folder / f"{name}.json").write_text(json.dumps(tokens))
    return folder


@pytest.fixture
def hugging_face(tmp_path: Path) -> Path:
    """A tokenizer.json with two usual end tokens, and none of them declared."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "<s>": 1, "</s>": 2, "<|endoftext|>": 3, "<mine>": 4}, []))
    folder = tmp_path / "hugging_face"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_end_token_is_the_declared_one(hugging_face: Path, tmp_path: Path) -> None:
    def ids() -> tuple[int | None, int | None]:
        copy = load_tokenizer(save_tokenizer(hugging_face, tmp_path / "copy"))
        tokenizer = load_tokenizer(hugging_face)
        assert (copy.bos_id, copy.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)
        return tokenizer.bos_id, tokenizer.eos_id

    assert ids() == (1, None)
    declare(hugging_face, "special_tokens_map", bos_token="<mine>", eos_token={"content": "<|endoftext|>", "lstrip": False})
    assert ids() == (4, 3)
    # Of two files that differ, the one that transformers heeds.
    declare(hugging_face, "tokenizer_config", eos_token="</s>")
    assert ids() == (4, 3)
    declare(hugging_face, "tokenizer_config", eos_token="</s>", added_tokens_decoder={})
    assert ids() == (1, 2)
    (hugging_face / "special_tokens_map.json").unlink()
    assert ids() == (1, 2)
    assert not (tmp_path / "copy/special_tokens_map.json").exists(), "left of another tokenizer"
    declare(hugging_face, "tokenizer_config", eos_token="<added later>")
    assert ids() == (1, None)
    (hugging_face / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config\.json: is no JSON"):
        ids()


def test_end_token_beside_a_sentencepiece_model_is_its_own(model: Path, tmp_path: Path) -> None:
    copy = save_tokenizer(model, declare(tmp_path, "unrelated", eos_token="<|im_end|>"))
    assert load_tokenizer(copy).eos_id == 2
    declare(tmp_path, "tokenizer_config", eos_token="</s>")
    assert load_tokenizer(copy).eos_id == 2
    declare(tmp_path, "tokenizer_config", eos_token="<|im_end|>")
    with pytest.raises(DataError, match=r"tokenizer\.model: its end-of-sequence token is '</s>', but .* = '<\|im_end\|>'"):
        load_tokenizer(copy)


def test_formats_that_are_not_read_are_named(tmp_path: Path) -> None:
    tekken, tiktoken, old = (tmp_path / name for name in ("tekken", "tiktoken", "old"))
    for folder in (tekken, tiktoken, old):
        folder.mkdir()
    (tekken / "tekken.json").write_text(json.dumps({"config": {"pattern": "x"}, "vocab": [], "special_tokens": []}))
    (tiktoken / "qwen.tiktoken").write_bytes(b"IQ== 0\nIg== 1\n")
    (tiktoken / "renamed.model").write_bytes(b"IQ== 0\nIg== 1\n")
    (old / "vocab.json").write_text("{}")
    named = {tekken: "Mistral's tekken format", tiktoken: "tiktoken's format", old: "the format of transformers' old tokenizers"}
    for path in (tekken, tekken / "tekken.json", tiktoken, tiktoken / "qwen.tiktoken", tiktoken / "renamed.model", old):
        name = named[path if path.is_dir() else path.parent]
        with pytest.raises(DataError, match=rf"{path.name}.*: is in {name}, which is not read here\. Give .*tokenizer\.json"):
            load_tokenizer(path)
