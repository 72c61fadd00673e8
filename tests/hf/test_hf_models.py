"""Exported models against transformers, and back: logits, bits, files, refusals."""

from __future__ import annotations

import inspect
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import CASES, HALF_ROPE, NO_ROPE, SWIGLU, load, tiny, weights
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_mamba.checkpoint import hf, hf_verify
from megatron_mamba.checkpoint.hf_classes import CLASSES
from megatron_mamba.checkpoint.hf_verify import compare
from megatron_mamba.config import Config, ModelConfig, to_dict
from megatron_mamba.model.parameters import parameter_table
from megatron_mamba.parallel.context import ParallelContext

TOLERANCE = 1e-5
CHUNK = 128
"""chunk_size written into config.json."""


def export(name: str, folder: Path, **settings: Any) -> tuple[ModelConfig, dict[str, Tensor]]:
    cls, config = CASES[name]
    values = weights(config)
    architecture = f"{cls}ForCausalLM" if cls == "Jais2" else None
    hf.export(config, values.__getitem__, folder, architecture=architecture, **settings)
    return config, values


def used(config: ModelConfig) -> dict[str, Any]:
    """What of a configuration makes the model: the settings of its own mixers, without borders and initialisation."""
    parts = {kind: getattr(config, kind) for kind in set(config.layers)}
    same = ("hidden_size", "vocab_size", "norm", "norm_eps", "tie_embeddings")
    return {"pattern": config.pattern.replace("|", ""), **{key: getattr(config, key) for key in same}, **parts}


def test_every_class_has_a_case() -> None:
    assert {f"{cls}ForCausalLM" for cls, _ in CASES.values()} == {cls.architecture for cls in CLASSES}


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name: str, tmp_path: Path, context: ParallelContext) -> None:
    config, values = export(name, tmp_path / "out", max_length=2048)
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["architectures"] == [f"{CASES[name][0]}ForCausalLM"]
    tokens = torch.randint(config.vocab_size, (2 * CHUNK + 30,), generator=torch.Generator().manual_seed(1)).tolist()
    difference = compare(tmp_path / "out", load(config, values, context), tokens, decode=9)
    assert difference.relative <= TOLERANCE, difference


@pytest.mark.parametrize("name", CASES)
def test_round_trip_is_bit_equal(name: str, tmp_path: Path) -> None:
    config, values = export(name, tmp_path / "tiny")
    found_config, tensors = hf.import_(tmp_path / "tiny")
    found = dict(tensors)
    assert found.keys() == values.keys()
    shifted = {"nemotron, plain weights": ("layernorm1p", -1.0), "stablelm, zero-centred weights": ("layernorm", 1.0)}.get(name)
    norm, shift = shifted or (config.norm, 0.0)
    assert used(found_config) == used(replace(config, norm=norm))
    assert found_config.name == "tiny"
    for key, value in values.items():
        expected = value + shift if key.endswith("norm.weight") and shift else value
        assert torch.equal(found[key], expected), key


@pytest.mark.parametrize(
    "name", ["mamba, tied, 3x", "mamba2, 4 groups", "hybrid, gelu, GQA", "nemotron, MHA", "llama", "phi3", "gpt-neox"]
)
def test_what_transformers_saves_is_imported(name: str, tmp_path: Path) -> None:
    import transformers

    config, values = export(name, tmp_path / "ours")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    found_config, tensors = hf.import_(tmp_path / "theirs")
    assert used(found_config) == used(config)
    assert all(torch.equal(tensor, values[key]) for key, tensor in tensors)


def test_bfloat16_keeps_small_parameters_in_fp32(tmp_path: Path) -> None:
    config, values = export("hybrid, gelu, GQA", tmp_path / "out", dtype=torch.bfloat16)
    stored = load_file(tmp_path / "out/model.safetensors")
    kept = {key for key, tensor in stored.items() if tensor.dtype == torch.float32}
    assert kept == {key for key in stored if "norm" in key or key.endswith((".A_log", ".D", ".dt_bias"))}
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"
    table = parameter_table(config)
    for key, tensor in hf.import_(tmp_path / "out")[1]:
        assert torch.equal(tensor, values[key] if table[key].fp32 else values[key].bfloat16()), key


def test_shards_hold_the_model_a_tensor_at_a_time(tmp_path: Path) -> None:
    config, values = CASES["mamba2, 4 groups"][1], weights(CASES["mamba2, 4 groups"][1])
    asked: list[str] = []

    def get(name: str) -> Tensor:
        asked.append(name)
        return values[name]

    limit = 40_000
    hf.export(config, get, tmp_path / "out", max_shard_size=limit)
    assert asked == list(dict.fromkeys(asked)), "a tensor was asked for twice"
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert len(files) > 3
    total = 0
    for file in files:
        tensors = load_file(tmp_path / "out" / file)
        assert {key for key, name in index["weight_map"].items() if name == file} == tensors.keys()
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= limit or len(tensors) == 1
        total += size
    assert index["metadata"]["total_size"] == total == sum(value.nbytes for value in values.values())
    assert all(torch.equal(tensor, values[key]) for key, tensor in hf.import_(tmp_path / "out")[1])


def test_config_states_what_defaults_would_break(tmp_path: Path) -> None:
    export("hybrid, gelu, GQA", tmp_path / "hybrid", max_length=777)
    hybrid = json.loads((tmp_path / "hybrid/config.json").read_text())
    assert (hybrid["time_step_min"], hybrid["tie_word_embeddings"], hybrid["max_position_embeddings"]) == (1e-30, False, 777)
    assert (hybrid["hybrid_override_pattern"], hybrid["num_hidden_layers"]) == ("M*-M-", 5)
    assert "layers_block_type" not in hybrid
    assert "time_step_limit" not in hybrid
    trained = {"step": 7, "consumed_tokens": 123456, "config": to_dict(Config(model=CASES["mamba"][1]))}
    values = export("mamba", tmp_path / "mamba", training=trained)[1]
    mamba = json.loads((tmp_path / "mamba/config.json").read_text())
    assert mamba["tie_word_embeddings"] is False
    assert mamba["bos_token_id"] is mamba["eos_token_id"] is mamba["pad_token_id"] is None
    card = (tmp_path / "mamba/README.md").read_text()
    assert "transformers>=4.57.6" in card
    assert f"| parameters | {sum(value.numel() for value in values.values()):,} |" in card
    assert "| trained: tokens | 123,456 |" in card
    assert "| trained: global batch (sequences) | 256 |" in card


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (tiny("M-M-"), ["NemotronHForCausalLM", "at least one attention layer"]),
        (tiny("--"), ["at least one attention layer"]),
        (tiny("mM"), ["mixes Mamba (S6, `m`)", "MambaForCausalLM"]),
        (tiny("m*-", attention=NO_ROPE), ["mixes Mamba (S6, `m`)"]),
        (tiny("M*-"), ["NemotronHForCausalLM", "rotary_fraction=0 (it is 1.0)"]),
        (tiny("M*-", attention=NO_ROPE, mlp=SWIGLU), ["NemotronHForCausalLM", "ungated", "swiglu"]),
        (tiny("MM", norm="layernorm"), ["Mamba2ForCausalLM", "model.norm=rmsnorm (it is layernorm)"]),
        (tiny("mm", mamba={"d_inner": 100}), ["MambaForCausalLM", "multiple of model.hidden_size = 48 (it is 100)"]),
        (tiny("-*-*"), ["NemotronHForCausalLM", "rotary_fraction=0"]),
        (tiny("*-", attention=HALF_ROPE), ["ArceeForCausalLM", "Phi3ForCausalLM", "rotary_fraction=1.0", "swiglu"]),
        (tiny("*-", norm="layernorm", mlp=SWIGLU, attention={"head_dim": 8}), ["StableLmForCausalLM", "hidden_size", "4 x 8"]),
        (tiny("*-", attention={"n_heads": 5, "n_kv_heads": 5}), ["ArceeForCausalLM", "divisible", "5 x 12"]),
        (tiny("*-", norm="layernorm1p", attention=NO_ROPE), ["NemotronForCausalLM", "rotary_fraction above 0"]),
    ],
    ids=lambda value: getattr(value, "pattern", ""),
)
def test_what_no_class_holds_is_refused(config: ModelConfig, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(hf.HFExportError) as error:
        hf.export(config, weights(config).__getitem__, tmp_path / "out")
    assert all(word in str(error.value) for word in words), str(error.value)
    assert not (tmp_path / "out").exists()


def test_asking_for_a_class_that_does_not_fit_or_exist() -> None:
    with pytest.raises(hf.HFExportError, match=r"rotary_fraction=1\.0"):
        hf.choose(tiny("*-", mlp=SWIGLU, attention=HALF_ROPE), "LlamaForCausalLM")
    with pytest.raises(hf.HFExportError, match="Choose from MambaForCausalLM"):
        hf.choose(tiny("*-"), "GPT2LMHeadModel")
    # Heads that do not divide the hidden size: the next class that holds the model.
    assert hf.choose(tiny("*-", mlp=SWIGLU, attention={"n_heads": 5, "n_kv_heads": 5})).architecture == "Phi3ForCausalLM"
    assert hf.choose(tiny("*-", mlp=SWIGLU), "Phi3ForCausalLM").architecture == "Phi3ForCausalLM"


def test_a_failed_export_leaves_nothing(tmp_path: Path) -> None:
    config = tiny("MM")
    values = weights(config)
    values["layers.1.mixer.A_log"] = torch.zeros(3)
    with pytest.raises(hf.HFExportError, match=r"layers\.1\.mixer\.A_log has shape \(3,\)"):
        hf.export(config, values.__getitem__, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "full").mkdir()
    (tmp_path / "full/keep").write_text("mine")
    with pytest.raises(hf.HFExportError, match="not empty"):
        hf.export(config, weights(config).__getitem__, tmp_path / "full")
    assert (tmp_path / "full/keep").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("llama", {"attention_bias": True}, ["attention_bias = True"]),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, ["rope_parameters", "linear"]),
        ("llama", {"hidden_act": "gelu"}, ["hidden_act = 'gelu'", "gated"]),
        ("stablelm, half rope", {"use_parallel_residual": True}, ["use_parallel_residual = True"]),
        ("starcoder2", {"sliding_window": 64}, ["sliding_window = 64"]),
        ("mamba2, 4 groups", {"time_step_limit": [0.001, 0.1]}, ["time_step_limit"]),
        ("mamba2, 4 groups", {"n_groups": 3}, ["n_groups = 3", "divisor"]),
        ("hybrid, gelu, GQA", {"hybrid_override_pattern": "M*EM-"}, ["hybrid_override_pattern", "experts"]),
        ("hybrid, gelu, GQA", {"hybrid_override_pattern": "M*-MM"}, ["missing", "unknown"]),
        ("llama", {"intermediate_size": 60}, ["mlp.gate_proj.weight has shape (56, 48)", "(60, 48)"]),
        ("llama", {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}, ["MistralForCausalLM", "Known"]),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, ["LlamaForSequenceClassification"]),
    ],
)
def test_what_no_layer_computes_is_not_imported(name: str, changes: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    export(name, tmp_path / "out")
    path = tmp_path / "out/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(hf.HFImportError) as error:
        dict(hf.import_(tmp_path / "out")[1])
    assert all(word in str(error.value) for word in words), str(error.value)


def edit_tensors(folder: Path, **changes: Tensor) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {key.replace("__", "."): tensor for key, tensor in changes.items()}, folder / "model.safetensors")


def test_a_bias_that_is_not_zero_is_not_imported(tmp_path: Path) -> None:
    export("gpt-neox", tmp_path / "out")
    edit_tensors(tmp_path / "out", gpt_neox__layers__1__mlp__dense_4h_to_h__bias=torch.eye(48)[3])
    with pytest.raises(hf.HFImportError, match=r"dense_4h_to_h\.bias is not zero"):
        dict(hf.import_(tmp_path / "out")[1])


def test_tied_on_paper_but_not_in_the_file(tmp_path: Path) -> None:
    values = export("mamba, tied, 3x", tmp_path / "out")[1]
    edit_tensors(tmp_path / "out", lm_head__weight=values["embedding.weight"].clone())
    assert hf.import_(tmp_path / "out")[0].tie_embeddings
    edit_tensors(tmp_path / "out", lm_head__weight=values["embedding.weight"] + 1)
    found, tensors = hf.import_(tmp_path / "out")
    assert not found.tie_embeddings
    assert torch.equal(dict(tensors)["output.weight"], values["embedding.weight"] + 1)


def test_incomplete_folders(tmp_path: Path) -> None:
    with pytest.raises(hf.HFImportError, match=r"no config\.json"):
        hf.import_(tmp_path)
    export("mamba2, 4 groups", tmp_path / "out", max_shard_size=40_000)
    shard = sorted((tmp_path / "out").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(hf.HFImportError, match=shard.name):
        hf.import_(tmp_path / "out")


def test_sizes() -> None:
    assert [hf.parse_size(text) for text in ("5GB", "1.5 mb", "700", "2K")] == [5 * 10**9, 1_500_000, 700, 2000]
    for text in ("", "big", "0", "-1GB"):
        with pytest.raises(ValueError, match="not a size"):
            hf.parse_size(text)


class Model:
    """Stands for transformers' classes of several versions: the signature decides how a cache is passed."""

    def __init__(self, *names: str) -> None:
        parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
        self.forward = lambda **kwargs: None
        self.forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["input_ids", "cache"], "cache"),  # 5.24, all classes
        (["input_ids", "cache_params"], "cache_params"),  # 5.23, Mamba and Mamba-2
        (["input_ids", "past_key_values"], "past_key_values"),
        (["past_key_values", "cache"], "cache"),  # deprecated and new beside each other
    ],
)
def test_the_cache_is_passed_under_the_name_that_is_read(names: list[str], found: str) -> None:
    assert hf_verify._cache_argument(Model(*names)) == found


def test_a_model_without_a_cache_is_refused() -> None:
    with pytest.raises(hf.HFExportError, match="takes its cache under none of the names cache, cache_params, past_key_values"):
        hf_verify._cache_argument(Model("input_ids", "kwargs"))
