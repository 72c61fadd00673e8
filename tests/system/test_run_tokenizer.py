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
from megatron_mamba.data import build_datasets, tokenizer_sha256
from megatron_mamba.train.loop import train
from megatron_mamba.train.resume import Start, keep_tokenizer, other_tokenizer


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


def test_checkpoints_from_before_digests_and_other_end_tokens(models: list[Path], tmp_path: Path) -> None:
    one, two = (build_datasets(config_for(tmp_path, data={"tokenizer": str(model)})) for model in models)
    saved = keep_tokenizer(one, Start(), tmp_path, write=True)
    kept, step = tmp_path / saved["tokenizer"], tmp_path / "step_00000001"
    assert kept.read_bytes() == models[0].read_bytes()
    old = Start(step, {"step": 1, "tokenizer": saved["tokenizer"]}, resumes=True)
    assert "but the weights were trained with the tokenizer of sha256" in other_tokenizer(two, old)
    assert other_tokenizer(one, old) == ""
    assert keep_tokenizer(one, old, tmp_path, write=True) == saved
    assert saved["end_of_document"] == 2
    now = Start(step, {"step": 1, **saved}, resumes=True)
    wrong = other_tokenizer(replace(one, end_of_document=7), now)
    assert wrong == "ends documents with id 7, but the weights were trained with 2 there"
    # What a run left that died before its first checkpoint is nobody's.
    assert keep_tokenizer(two, Start(), tmp_path, write=True)["tokenizer"] == saved["tokenizer"]
    assert kept.read_bytes() == models[1].read_bytes()
    shutil.rmtree(kept.parent)
    keep_tokenizer(one, now, tmp_path, write=True)
    assert kept.read_bytes() == models[0].read_bytes()
