"""tokenizer.json of SentencePiece models: the same ids, or no export."""

from __future__ import annotations

import io
import json
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hf_models import tiny, weights

from megatron_mamba.checkpoint import hf
from megatron_mamba.checkpoint.hf_tokenizer import NASTY, check_texts, check_tokenizer, write_tokenizer
from megatron_mamba.data.tokenizer import load_tokenizer
from megatron_mamba.data.train_tokenizer import train_tokenizer

CORPUS = [Path(sysconfig.get_paths()["stdlib"]) / name for name in ("argparse.py", "textwrap.py", "statistics.py")]
SPACE = "\u2581"
EXACT = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
}
SYMBOLS = ["\n", "\t", SPACE * 2, SPACE * 4, "<tag>", "<tag>x", "  "]


def train(path: Path, **settings: Any) -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    texts = iter([file.read_text()[:30_000] for file in CORPUS])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts,
        model_writer=model,
        vocab_size=600,
        minloglevel=2,
        max_sentence_length=10**6,
        **{**EXACT, **settings},
    )
    path.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What tools/train_tokenizer.py makes."""
    return train_tokenizer(CORPUS, 700, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


def test_exported_folder_tokenises_as_in_training(project: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    config = tiny("mm", vocab_size=700)
    hf.export(config, weights(config).__getitem__, tmp_path / "out", tokenizer=project, max_length=321)
    settings = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    for name in ("config", "generation_config"):
        written = json.loads((tmp_path / f"out/{name}.json").read_text())
        # <s> occurs in no document; <unk> in none either, as bytes stand for what has no piece.
        assert [written[f"{token}_token_id"] for token in ("bos", "eos", "pad")] == [2, 2, 0]
    reference = sentencepiece.SentencePieceProcessor(model_file=str(project))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 2, 0)
    assert (tokenizer.model_max_length, tokenizer.padding_side) == (321, "left")
    compared = 0
    for text in check_texts([]):
        if "</s>" in text or "<s>" in text or "<unk>" in text:
            continue
        ids = reference.encode(text)
        assert tokenizer(text).input_ids == ids, text[:80]
        compared += 1
        if SPACE not in text and not text.startswith("\ufeff"):
            assert tokenizer.decode(ids) == text
    assert compared > 1000
    assert tokenizer("a\n\n\tb  c").input_ids.count(reference.piece_to_id("\n")) == 2
    assert "token_type_ids" not in tokenizer("a")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"user_defined_symbols": SYMBOLS},
        {"add_dummy_prefix": True},
        {"add_dummy_prefix": True, "user_defined_symbols": SYMBOLS},
        {"byte_fallback": False},
        {"pad_id": 3, "bos_id": -1, "control_symbols": ["<sep>"]},
    ],
    ids=["plain", "symbols", "prefix", "prefix and symbols", "no bytes", "other specials"],
)
def test_ids_are_equal(settings: dict[str, Any], tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    reference = train(tmp_path / "t.model", **settings)
    ids = write_tokenizer(tmp_path / "t.model", tmp_path, 10, 600)
    # The unknown token pads where it cannot occur in text.
    assert ids["pad_token_id"] == (3 if "pad_id" in settings else 0 if settings.get("byte_fallback", True) else 2)
    assert (ids["bos_token_id"], ids["eos_token_id"]) == (2, 2)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    symbols = settings.get("user_defined_symbols", [])
    for text in [*NASTY, *symbols, *(text for a in symbols for b in symbols for text in (f"{a}{b}", f"x{a}{b}y {a}"))]:
        if len(text) > 1 and text in symbols and settings.get("add_dummy_prefix"):
            continue  # the known exception, see convert()
        assert tokenizer.encode(text, add_special_tokens=False).ids == reference.encode(text), repr(text)


def test_a_model_that_does_not_convert_is_refused(tmp_path: Path) -> None:
    train(tmp_path / "t.model", normalization_rule_name="nmt_nfkc")
    config = tiny("mm", vocab_size=600)
    with pytest.raises(hf.HFExportError, match=r"'\\r\\n' has the ids"):
        hf.export(config, weights(config).__getitem__, tmp_path / "out", tokenizer=tmp_path / "t.model")
    assert not (tmp_path / "out").exists()
    train(tmp_path / "word.model", model_type="word", hard_vocab_limit=False, byte_fallback=False)
    with pytest.raises(hf.HFExportError, match="type word"):
        write_tokenizer(tmp_path / "word.model", tmp_path, 10, 600)


def test_more_ids_than_the_model_has(project: Path, tmp_path: Path) -> None:
    config = tiny("mm", vocab_size=699)
    with pytest.raises(hf.HFExportError, match=r"has 700 ids, but model\.vocab_size = 699"):
        hf.export(config, weights(config).__getitem__, tmp_path / "out", tokenizer=project)


def test_hugging_face_tokenizers_are_copied(project: Path, tmp_path: Path) -> None:
    write_tokenizer(project, tmp_path, 10, 700)
    config = tmp_path / "tokenizer_config.json"
    settings = json.loads(config.read_text()) | {
        "tokenizer_class": "TokenizersBackend",
        "pad_token": {"content": "</s>"},
        "mine": 1,
    }
    config.write_text(json.dumps(settings))
    (tmp_path / "copy").mkdir()
    ids = write_tokenizer(tmp_path, tmp_path / "copy", 10, 700)
    assert ids == {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 2}
    assert (tmp_path / "copy/tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    copied = json.loads((tmp_path / "copy/tokenizer_config.json").read_text())
    assert copied == settings | {"tokenizer_class": "PreTrainedTokenizerFast"}


@pytest.fixture
def llama_like(project: Path, tmp_path: Path) -> Path:
    """A Hugging Face tokenizer that puts <s> before a text and </s> behind it."""
    from tokenizers import Tokenizer, processors

    folder = tmp_path / "llama_like"
    folder.mkdir()
    write_tokenizer(project, folder, 10, 700)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "add_bos_token": True}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>"}))
    return folder


def test_an_exported_tokenizer_adds_what_training_added(llama_like: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    config = tiny("mm", vocab_size=700)
    get, text = weights(config).__getitem__, "def f(x):\n    return x"
    ids = load_tokenizer(llama_like).encode(text)
    hf.export(config, get, tmp_path / "trained", tokenizer=llama_like)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "trained")
    assert tokenizer(text).input_ids == ids
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 2, 2)
    # transformers does not train the embedding of config.json's pad token, which must not be eos's.
    files = [tmp_path / f"trained/{name}.json" for name in ("config", "generation_config")]
    assert [json.loads(file.read_text())["pad_token_id"] for file in files] == [None, 2]
    assert "bos as well as eos" in (tmp_path / "trained/README.md").read_text()
    # A model that was imported and never trained here was trained with them.
    hf.export(config, get, tmp_path / "imported", tokenizer=llama_like, training={"step": 0})
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "imported")
    assert tokenizer(text).input_ids == [1, *ids, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert (tmp_path / "imported/tokenizer.json").read_bytes() == (llama_like / "tokenizer.json").read_bytes()


def test_a_tokenizer_that_transformers_reads_otherwise_is_refused(llama_like: Path, tmp_path: Path) -> None:
    config = tiny("mm", vocab_size=700)
    get, output = weights(config).__getitem__, tmp_path / "out"
    settings = {"eos_token": "</s>", "extra_special_tokens": ["<added later>"]}
    (llama_like / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(hf.HFExportError, match=r"gives them ids up to 700, but model\.vocab_size = 700\. Take .*tokenizer_config"):
        hf.export(config, get, output, tokenizer=llama_like)
    assert not output.exists()
    (llama_like / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "added_tokens_decoder": {"2": "</s>"}}))
    with pytest.raises(hf.HFExportError, match=r"tokenizer\.json: transformers .* cannot read it with the settings beside it: "):
        hf.export(config, get, output, tokenizer=llama_like)
    (llama_like / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "pad_token": "<added later>"}))
    hf.export(config, get, output, tokenizer=llama_like)
    assert check_tokenizer(llama_like, output, 700) > 1000
    exported = json.loads((output / "tokenizer.json").read_text())
    exported["normalizer"] = {"type": "Lowercase"}
    (output / "tokenizer.json").write_text(json.dumps(exported))
    with pytest.raises(hf.HFExportError, match=r"tokenizer\.json: .* has the ids .* in training but .* with transformers"):
        check_tokenizer(llama_like, output, 700)
