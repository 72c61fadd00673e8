"""tools/export_hf.py and tools/import_hf.py on a checkpoint."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hf_models import CASES, load, weights
from torch import Tensor

from megatron_mamba.checkpoint import CheckpointError, hf, read_metadata, tokenizer_path
from megatron_mamba.checkpoint.hf_source import checkpoint_tensors, write_checkpoint
from megatron_mamba.generate import loading
from megatron_mamba.model import LanguageModel
from megatron_mamba.parallel.context import ParallelContext

TOOLS = Path(__file__).parents[2] / "tools"


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


export_hf, import_hf = tool("export_hf"), tool("import_hf")


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    config = CASES["hybrid, gelu, GQA"][1]
    values = weights(config)
    write_checkpoint(tmp_path / "run/checkpoints", config, values.items(), None)
    return tmp_path / "run", values


@pytest.fixture(autouse=True)
def keep_context(context: ParallelContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tools make and leave a process group; here they share the tests' one, and compare fewer tokens."""
    monkeypatch.setattr(ParallelContext, "create", classmethod(lambda cls, *args: context))
    monkeypatch.setattr(ParallelContext, "close", lambda self: None)
    monkeypatch.setattr(export_hf, "VERIFY_TOKENS", 300)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_export_verify_import(
    checkpoint: tuple[Path, dict[str, Tensor]],
    dtype: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    context: ParallelContext,
) -> None:
    run, values = checkpoint
    output = tmp_path / "hf"
    assert export_hf.main(["--checkpoint", str(run), "--output", str(output), "--dtype", dtype, "--verify"]) == 0
    printed = capsys.readouterr().out
    assert "NemotronHForCausalLM" in printed
    assert "300 tokens" in printed
    assert printed.rstrip().endswith("equal")
    assert "trained:" not in (output / "README.md").read_text(), "weights of step 0 were not trained here"
    assert (output / "model.safetensors").stat().st_mode == (output / "config.json").stat().st_mode
    if dtype == "bf16":
        return
    assert import_hf.main(["--input", str(output), "--output", str(tmp_path / "back")]) == 0
    get = checkpoint_tensors(tmp_path / "back/step_00000000")
    assert all(torch.equal(get(name), value) for name, value in values.items())
    model, metadata = loading.load_model(tmp_path / "back", context)
    assert metadata["config"]["model"]["pattern"] == "M*-M-"
    tokens = torch.arange(20)[None]
    assert torch.equal(model(tokens), load(model.config, values, context)(tokens))


def test_verify_fails_where_a_layer_is_wrong(
    checkpoint: tuple[Path, dict[str, Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original: Callable[..., tuple[LanguageModel, dict]] = export_hf.load_model

    def wrong(*args: object) -> tuple[LanguageModel, dict]:
        model, metadata = original(*args)
        model.layers["0"].mixer.eps = 1e-2
        return model, metadata

    monkeypatch.setattr(export_hf, "load_model", wrong)
    assert export_hf.main(["--checkpoint", str(checkpoint[0]), "--output", str(tmp_path / "hf"), "--verify"]) == 1
    assert "NOT equal" in capsys.readouterr().out


@pytest.fixture
def exported(checkpoint: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> Path:
    """The checkpoint as a Hugging Face folder."""
    assert export_hf.main(["--checkpoint", str(checkpoint[0]), "--output", str(tmp_path / "hf")]) == 0
    return tmp_path / "hf"


def import_(folder: Path, output: Path, *more: str) -> int:
    result: int = import_hf.main(["--input", str(folder), "--output", str(output), *more])
    return result


def recorded_tokenizer(folder: Path) -> Path | None:
    step = folder / "step_00000000"
    return tokenizer_path(step, read_metadata(step))


def test_imported_folder_brings_its_tokenizer(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tokenizers import Tokenizer, models

    tokenizer = {"a": 0, "b": 1, "<eos>": 2, "</s>": 3}
    Tokenizer(models.BPE(tokenizer, [])).save(str(exported / "tokenizer.json"))
    (exported / "special_tokens_map.json").write_text('{"eos_token": "<eos>"}')
    assert import_(exported, tmp_path / "made") == 0
    (tmp_path / "made").rename(tmp_path / "back")
    assert recorded_tokenizer(tmp_path / "back") == tmp_path / "back/tokenizer/tokenizer.json"
    again = ["--checkpoint", str(tmp_path / "back"), "--output", str(tmp_path / "again"), "--verify"]
    assert export_hf.main(again) == 0
    assert "texts have the ids of the original" in capsys.readouterr().out
    assert json.loads((tmp_path / "again/config.json").read_text())["eos_token_id"] == 2
    assert (tmp_path / "again/tokenizer.json").read_bytes() == (exported / "tokenizer.json").read_bytes()
    (tmp_path / "back/tokenizer/tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"saved with the tokenizer .*tokenizer\.json of sha256 .* now\. Put the one"):
        recorded_tokenizer(tmp_path / "back")


def test_imported_folder_brings_its_sentencepiece_model(exported: Path, tmp_path: Path) -> None:
    import sentencepiece

    model = exported / "tokenizer.model"
    settings = {"vocab_size": 18, "model_type": "bpe", "minloglevel": 2}
    texts = iter(["a b c d e f g"] * 9)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=texts, model_prefix=str(tmp_path / "t"), **settings)
    model.write_bytes((tmp_path / "t.model").read_bytes())
    assert import_(exported, tmp_path / "back") == 0
    copy = recorded_tokenizer(tmp_path / "back")
    assert copy is not None
    assert (copy.name, copy.read_bytes()) == (model.name, model.read_bytes())


def test_import_refuses_a_tokenizer_that_is_not_read(exported: Path, tmp_path: Path) -> None:
    (exported / "tekken.json").write_text("{}")
    with pytest.raises(hf.HFImportError, match=r"Mistral's tekken format, .* --no-tokenizer imports the model alone"):
        import_(exported, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    assert import_(exported, tmp_path / "back", "--no-tokenizer") == 0
    assert recorded_tokenizer(tmp_path / "back") is None


CONFIG, ONE_FILE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
BAD_FOLDERS = {
    "a type": (CONFIG, '"hidden_size": 48', '"hidden_size": "many"', r"config\.json: transformers refuses it .*many"),
    "a pattern": (CONFIG, '"M*-M-"', '"M?-M-"', r"config\.json: transformers refuses it"),
    "not JSON": (CONFIG, '"hidden_size"', "hidden_size", r"config\.json: is no JSON .* Copy the folder again"),
    "null": (CONFIG, '"hidden_size": 48', '"hidden_size": null', r"config\.json"),
    "the limit of dt": (
        CONFIG, '"time_step_min"', '"time_step_limit": [0.0, 0.1], "time_step_min"', r"time_step_limit = .*0\.1.*only \(0\.0, inf"
    ),
    "the file": (ONE_FILE, None, "x" * 99, r"model\.safetensors: cannot be read as safetensors .* Copy it again"),
    "the index": (INDEX, None, "[]", r"index\.json: holds no object of JSON, but a list\. Copy the folder again"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_import_says_in_one_line_what_is_wrong(case: str, exported: Path, tmp_path: Path) -> None:
    name, old, new, message = BAD_FOLDERS[case]
    text = new
    if old is not None:
        whole = (exported / name).read_text()
        assert whole.count(old) == 1
        text = whole.replace(old, new)
    (exported / name).write_text(text)
    with pytest.raises(hf.HFImportError, match=message) as caught:
        import_(exported, tmp_path / "back")
    assert "\n" not in str(caught.value)


def test_import_leaves_nothing_half_done(exported: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(exported / ONE_FILE)
    last = max(tensors)
    save_file(tensors | {last: tensors[last].flatten()[:-1]}, exported / ONE_FILE)
    before = set(tmp_path.iterdir())
    with pytest.raises(hf.HFImportError, match=r"has shape .* but config\.json describes"):
        import_(exported, tmp_path / "back")
    assert set(tmp_path.iterdir()) == before
