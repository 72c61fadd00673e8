"""The tokenizer that a run keeps: what its checkpoints decode with, whatever lies beside the data later."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from test_train import config_for

from megatron_mamba.checkpoint import CheckpointError, read_metadata, resolve, tokenizer_path
from megatron_mamba.config import ConfigError
from megatron_mamba.data import Datasets, build_datasets, tokenizer_sha256
from megatron_mamba.train.checks import keep_tokenizer
from megatron_mamba.train.loop import train


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two tokenizers with as many ids."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for name, text in (("one", "a b c d e f g"), ("two", "g h i j k l m")):
        settings = {"vocab_size": 18, "model_type": "bpe", "minloglevel": 2}
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter([text] * 9), model_prefix=str(folder / name), **settings)
    return [folder / "one.model", folder / "two.model"]


def run(run_dir: Path, tokenizer: Path | None, samples: int = 4, **changes: Any) -> None:
    data = {"tokenizer": None if tokenizer is None else str(tokenizer)}
    once = {"train_samples": 16, "stop_after_samples": samples, "health_check": False}
    train(config_for(run_dir, data=data, trainer=once, eval={"interval": 0, "samples": 0}, **changes))


def recorded(run_dir: Path) -> bytes:
    step = resolve(run_dir)
    path = tokenizer_path(step, read_metadata(step))
    assert path is not None
    return path.read_bytes()


def test_a_run_goes_on_with_its_own_tokenizer(models: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one, two = models
    first, kept = tmp_path / "run", tmp_path / "run/checkpoints/tokenizer/tokenizer.model"
    run(first, one)
    assert read_metadata(resolve(first))["tokenizer_sha256"] == tokenizer_sha256(one)
    with pytest.raises(ConfigError, match=rf"data\.tokenizer = .*two\.model': has sha256 {tokenizer_sha256(two)}, but the"):
        run(first, two, 8)
    assert kept.read_bytes() == one.read_bytes()
    # Damage is found by those who read it, and mended by the run, which has the same tokenizer.
    kept.write_bytes(two.read_bytes())
    with pytest.raises(CheckpointError, match=r"saved with the tokenizer .*tokenizer\.model of sha256 .* now\. Put the one"):
        recorded(first)
    run(first, one, 8)
    assert recorded(first) == one.read_bytes()
    # Other data's weights may be taken over, with a warning.
    with caplog.at_level(logging.WARNING):
        run(tmp_path / "other", two, checkpoint={"init_from": str(first)})
    assert f"two.model has sha256 {tokenizer_sha256(two)}, but the weights were trained with" in caplog.text


def test_a_run_that_names_no_tokenizer_any_more_keeps_it(models: list[Path], tmp_path: Path) -> None:
    run(tmp_path, models[0])
    run(tmp_path, None, 8)
    assert read_metadata(resolve(tmp_path))["step"] == 2
    assert recorded(tmp_path) == models[0].read_bytes()


def keep(data: Datasets, saved: dict[str, Any], folder: Path) -> dict[str, Any]:
    return keep_tokenizer(data, saved, folder, write=True)


def test_checkpoints_from_before_digests_and_other_end_tokens(models: list[Path], tmp_path: Path) -> None:
    one, two = (build_datasets(config_for(tmp_path, data={"tokenizer": str(model)})) for model in models)
    saved = keep(one, {}, tmp_path)
    kept = tmp_path / saved["tokenizer"]
    assert kept.read_bytes() == models[0].read_bytes()
    old = {"step": 1, "tokenizer": saved["tokenizer"]}
    with pytest.raises(ConfigError, match=r"has sha256 .* but the weights were trained with the tokenizer of sha256"):
        keep(two, old, tmp_path)
    assert keep(one, old, tmp_path) == saved
    assert saved["end_of_document"] == 2
    with pytest.raises(ConfigError, match="ends documents with id 7, but the weights were trained with 2 there"):
        keep(replace(one, end_of_document=7), {"step": 1, **saved}, tmp_path)
    # What a run left that died before its first checkpoint is nobody's.
    assert keep(two, {}, tmp_path)["tokenizer"] == saved["tokenizer"]
    assert kept.read_bytes() == models[1].read_bytes()
    shutil.rmtree(kept.parent)
    keep(one, {"step": 1, **saved}, tmp_path)
    assert kept.read_bytes() == models[0].read_bytes()
