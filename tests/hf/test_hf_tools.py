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

from megatron_mamba.checkpoint import read_metadata
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


def test_imported_folder_brings_its_tokenizer(checkpoint: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    assert export_hf.main(["--checkpoint", str(checkpoint[0]), "--output", str(tmp_path / "hf")]) == 0
    Tokenizer(models.BPE({"a": 0, "b": 1, "<eos>": 2}, [])).save(str(tmp_path / "hf/tokenizer.json"))
    assert import_hf.main(["--input", str(tmp_path / "hf"), "--output", str(tmp_path / "back")]) == 0
    assert read_metadata(tmp_path / "back/step_00000000")["tokenizer"] == "tokenizer"
    assert export_hf.main(["--checkpoint", str(tmp_path / "back"), "--output", str(tmp_path / "again")]) == 0
    assert json.loads((tmp_path / "again/config.json").read_text())["eos_token_id"] == 2
    assert (tmp_path / "again/tokenizer.json").read_bytes() == (tmp_path / "hf/tokenizer.json").read_bytes()
