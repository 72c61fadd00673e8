"""Hugging Face folders with wrong values and damaged files: accepted rightly, or refused with one line."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import CASES, tiny, weights
from safetensors.torch import load_file, save_file

import import_hf
from megatron_mamba.checkpoint import hf
from megatron_mamba.checkpoint.hf_classes import CLASSES
from megatron_mamba.checkpoint.hf_config import read_config, write_config
from megatron_mamba.config import ModelConfig

VALUES: dict[str, Any] = {
    "null": None, "string": "x", "list": [1], "dict": {"a": 1}, "negative": -3, "zero": 0, "bool": True, "float": 1.5,
    "fractional": 1e-3,
}  # fmt: skip
OTHER_SPELLINGS = (
    "rope_parameters", "rope_scaling", "head_dim", "num_key_value_heads", "attention_bias", "layer_types", "layers_block_type",
    "hybrid_override_pattern", "expand", "intermediate_size", "n_layer", "quantization_config", "auto_map", "transformers_version",
)  # fmt: skip


def plausible(config: ModelConfig) -> bool:
    """Whether every setting has the type that its dataclass says."""
    groups = [config, config.mamba, config.mamba2, config.attention, config.mlp]
    values = [(key, value) for group in groups for key, value in vars(group).items()]
    wrong = [key for key, value in values if isinstance(value, bool) != (key == "tie_embeddings")]
    return not wrong and all(
        isinstance(value, int) for key, value in values if key.endswith(("size", "d_inner", "heads", "head_dim"))
    )


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.architecture)
def test_every_wrong_value_is_one_line(cls: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = next(config for name, config in CASES.values() if f"{name}ForCausalLM" == cls.architecture)
    sound = write_config(cls, config, dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")), 128, "float32")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(sound))
    original = read_config(tmp_path)[1]
    refused = []
    for key in dict.fromkeys([*sound, *OTHER_SPELLINGS]):
        for value in VALUES.values():
            path.write_text(json.dumps(sound | {key: value}))
            try:
                found = read_config(tmp_path)[1]
            except hf.HFImportError as error:
                refused.append(str(error))
                continue
            assert plausible(found), f"{key} = {value!r} became {found}"
            if key in cls.fields and value is not None and not isinstance(value, float):
                assert found == original or key == "tie_word_embeddings", f"{key} = {value!r} became {found}"
    assert len(refused) > 100
    assert all(message.startswith(str(tmp_path)) and "\n" not in message for message in refused)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", "\x00", '{"model_type": "llama"', "[" * 40 + "]" * 40])
def test_config_that_is_no_object_is_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(hf.HFImportError, match=r"config\.json: (is no JSON|holds no object of JSON).*Copy the folder again$"):
        hf.import_(tmp_path)


def test_nesting_too_deep_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_deep(content: bytes) -> None:
        raise RecursionError

    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("megatron_mamba.files.json.loads", too_deep)
    with pytest.raises(hf.HFImportError, match=r"config\.json: is nested too deep to be read as JSON"):
        hf.import_(tmp_path)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    config = tiny("MM")
    hf.export(config, weights(config).__getitem__, tmp_path / "out", max_shard_size=40_000)
    return tmp_path / "out"


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/etc/other.safetensors", "inner/other.safetensors", "..", "", None, 3, ["a"], {"a": "b"}]
)
def test_weights_come_only_from_the_folder(name: Any, sharded: Path) -> None:
    for place in (sharded.parent, sharded / "inner"):
        place.mkdir(exist_ok=True)
        (place / "other.safetensors").write_bytes(next(sharded.glob("*.safetensors")).read_bytes())
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    key = min(content["weight_map"])
    content["weight_map"][key] = name
    index.write_text(json.dumps(content))
    with pytest.raises(hf.HFImportError) as error:
        hf.import_(sharded)
    assert f"weight_map[{key!r}] = {name!r} is not the name of a file in the folder" in str(error.value)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": null}', '{"weight_map": ["a"]}'])
def test_damaged_index_is_one_line(content: str, sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(hf.HFImportError, match=r"model\.safetensors\.index\.json: .*Copy the folder again$"):
        hf.import_(sharded)


def test_damaged_weights_are_one_line(sharded: Path, tmp_path: Path) -> None:
    shard = min(sharded.glob("*.safetensors"))
    whole = shard.read_bytes()
    # Cut, and without the tensor that the index promises.
    for damage in (lambda: shard.write_bytes(whole[:100]), lambda: save_file({"other": torch.zeros(1)}, shard)):
        damage()
        with pytest.raises(hf.HFImportError, match=rf"{shard.name}: cannot be read as safetensors \(.*Copy it again$"):
            dict(hf.import_(sharded)[1])
    shard.write_bytes(whole)
    save_file({key: tensor.to(torch.int8) for key, tensor in load_file(shard).items()}, shard)
    with pytest.raises(hf.HFImportError, match=r"is torch\.int8\. Only weights that are not quantised"):
        dict(hf.import_(sharded)[1])


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_failed_import_leaves_nothing_in_the_way(content: str, sharded: Path, tmp_path: Path) -> None:
    (sharded / "tokenizer.json").write_text(content)
    arguments = ["--input", str(sharded), "--output", str(tmp_path / "imported")]
    with pytest.raises(hf.HFImportError, match=r"tokenizer\.json: (is no JSON|holds no object of JSON).* --no-tokenizer imports"):
        import_hf.main(arguments)
    assert not (tmp_path / "imported").exists()
    (sharded / "tokenizer.json").unlink()
    assert import_hf.main(arguments) == 0


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, *_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    config = tiny("MM")
    monkeypatch.setattr(hf, "write_safetensors", full)
    with pytest.raises(hf.HFExportError, match=r"out cannot be written: .*No space left on device.*Free space, or choose another"):
        hf.export(config, weights(config).__getitem__, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(hf.HFExportError, match="cannot be written"):
        hf.export(config, weights(config).__getitem__, tmp_path / "file" / "out")
