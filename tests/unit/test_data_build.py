"""build_datasets: the run's data checked against tokenizer and model before anything is trained."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_mamba.config import Config, ConfigError, DataConfig, ModelConfig, TrainerConfig
from megatron_mamba.data import DataError, Metadata, build_datasets
from megatron_mamba.data.prepare import prepare
from megatron_mamba.data.tokenizer import save_tokenizer
from megatron_mamba.data.train_tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpora a and b of tokenizer one, c of tokenizer two."""
    folder = tmp_path_factory.mktemp("data")
    for name, letter in (("a", "x"), ("b", "y")):
        lines = [json.dumps({"text": f"{letter} {n} some words of document {n}"}) for n in range(300)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    for name, inputs, size in (("one", "a", 300), ("two", "b", 310)):
        train_tokenizer([folder / f"{inputs}.jsonl"], size, folder / f"{name}.model")
    for name, inputs, tokenizer in (("a", "a", "one"), ("b", "b", "one"), ("c", "b", "two")):
        prepare([folder / f"{inputs}.jsonl"], folder / f"{tokenizer}.model", folder / name)
    return folder


def config(vocab_size: int = 300, **data) -> Config:
    options = {"seq_length": 32, "split": (8.0, 1.0, 1.0)} | data
    model = ModelConfig(name="t", pattern="M", hidden_size=8, vocab_size=vocab_size)
    return Config(model=model, data=DataConfig(**options), trainer=TrainerConfig(train_samples=1)).validate()


def test_corpus_brings_its_tokenizer(folder: Path) -> None:
    data = build_datasets(config(path=str(folder / "a")))
    assert data.tokenizer == folder / "a.tokenizer" / "tokenizer.model"
    record = Metadata.read(folder / "a")
    assert record is not None
    assert data.tokenizer_sha256 == record.tokenizer_sha256
    seen = [
        {int(t) for i in range(d.samples_per_epoch) for t in d[i].tokens}
        for d in (data.train, data.valid, data.test)
        if d is not None
    ]
    assert len(seen) == 3
    assert data.train[0].tokens.shape == (33,)
    assert data.valid is not None
    assert data.train.samples_per_epoch > 7 * data.valid.samples_per_epoch
    given = build_datasets(config(path=str(folder / "a"), tokenizer=str(folder / "one.model")))
    assert given.tokenizer == folder / "one.model"
    assert np.array_equal(given.train[5].tokens, data.train[5].tokens)


def test_split_without_share_is_none_and_one_without_text_an_error(folder: Path) -> None:
    data = build_datasets(config(path=str(folder / "a"), split=(9.0, 1.0, 0.0)))
    assert data.valid is not None
    assert data.test is None
    with pytest.raises(DataError, match=r"a: the test split has \d+ tokens of 1 documents.*data\.seq_length = 500.*data\.split"):
        build_datasets(config(path=str(folder / "a"), split=(299.0, 100.0, 1.0), seq_length=500))
    assert build_datasets(config(kind="synthetic", split=(1.0, 0.0, 0.0))).valid is None


def test_other_tokenizer_than_the_corpus_is_refused(folder: Path) -> None:
    one, two = (record.tokenizer_sha256 for record in map(Metadata.read, (folder / "a", folder / "c")) if record is not None)
    with pytest.raises(
        DataError, match=f"a: was tokenised with a tokenizer of sha256 {one} .*data.tokenizer = .*two.model has sha256 {two}"
    ):
        build_datasets(config(path=str(folder / "a"), tokenizer=str(folder / "two.model")))
    with pytest.raises(DataError, match=f"c: .*{two}.*the tokenizer of .*a has sha256 {one}"):
        build_datasets(config(400, blend={str(folder / "a"): 1.0, str(folder / "c"): 1.0}))


def test_the_tokenizer_beside_a_corpus_is_hashed_not_believed(folder: Path, tmp_path: Path) -> None:
    foreign(folder / "a", tmp_path / "a")
    record = Metadata.read(folder / "a")
    assert record is not None
    record.write(tmp_path / "a")
    copy = save_tokenizer(folder / "one.model", tmp_path / "a.tokenizer")
    data = build_datasets(config(400, path=str(tmp_path / "a")))
    assert (data.tokenizer, data.tokenizer_sha256, data.end_of_document) == (copy, record.tokenizer_sha256, 2)
    copy.write_bytes((folder / "two.model").read_bytes())
    with pytest.raises(DataError, match=rf"a: was tokenised with .* sha256 {record.tokenizer_sha256}.* the tokenizer of"):
        build_datasets(config(400, path=str(tmp_path / "a")))
    replace(record, end_of_document=7).write(tmp_path / "a")
    with pytest.raises(DataError, match=r"a: its documents end with id 7, but data\.tokenizer = .* has 2 as its end-of-sequence"):
        build_datasets(config(path=str(tmp_path / "a"), tokenizer=str(folder / "one.model")))


def test_too_small_a_vocabulary_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size = 299: .* has 300 ids\. Set model\.vocab_size to 300 or more"):
        build_datasets(config(299, path=str(folder / "a")))
    foreign(folder / "a", tmp_path / "a")
    with pytest.raises(ConfigError, match=r"model\.vocab_size = 299"):
        build_datasets(config(299, path=str(tmp_path / "a"), tokenizer=str(folder / "one.model")))


def foreign(source: Path, target: Path) -> None:
    """The corpus without the record that Megatron-LM does not write."""
    for suffix in ("bin", "idx"):
        Path(f"{target}.{suffix}").write_bytes(Path(f"{source}.{suffix}").read_bytes())


def test_corpus_of_megatron_is_accepted(folder: Path, tmp_path: Path) -> None:
    foreign(folder / "a", tmp_path / "a")
    data = build_datasets(config(path=str(tmp_path / "a")))
    assert (data.tokenizer, data.tokenizer_sha256) == (None, None)
    assert np.array_equal(data.train[3].tokens, build_datasets(config(path=str(folder / "a"))).train[3].tokens)
    small = build_datasets(config(200, path=str(tmp_path / "a")))
    with pytest.raises(DataError, match=r"model\.vocab_size = 200"):
        small.train[0]


def test_record_of_another_corpus_is_refused(folder: Path, tmp_path: Path) -> None:
    foreign(folder / "a", tmp_path / "a")
    record = Metadata.read(folder / "a")
    assert record is not None
    replace(record, tokens=record.tokens - 1).write(tmp_path / "a")
    with pytest.raises(DataError, match=r"a\.json: records .* the record is of another corpus"):
        build_datasets(config(path=str(tmp_path / "a")))
    record.write(tmp_path / "a")
    with pytest.raises(DataError, match="no tokenizer there"):
        build_datasets(config(path=str(tmp_path / "a")))


def test_blend_reads_each_corpus_in_its_share(folder: Path) -> None:
    a, b = (build_datasets(config(path=str(folder / name))) for name in "ab")
    data = build_datasets(config(blend={str(folder / "a"): 3.0, str(folder / "b"): 1.0}))
    streams = {corpus: iter(range(100)) for corpus in "ab"}
    order = ""
    for number in range(80):
        tokens = data.train[number].tokens
        corpus = "a" if any(np.array_equal(tokens, a.train[i].tokens) for i in range(100)) else "b"
        order += corpus
        assert np.array_equal(tokens, (a if corpus == "a" else b).train[next(streams[corpus])].tokens)
    assert order.count("a") == 60
    assert data.valid is not None


def test_importing_the_package_leaves_torch_alone() -> None:
    """A tokenising process would spend seconds and hundreds of MB on it."""
    script = "import sys, megatron_mamba.data.prepare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], check=False).returncode == 0
