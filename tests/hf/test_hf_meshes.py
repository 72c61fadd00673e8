"""Export of checkpoints that ranks wrote: the same files as one rank's, a tensor at a time."""

from __future__ import annotations

import hashlib
import importlib.util
import resource
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hf_models import CASES, weights
from torch import Tensor

from harness import on_ranks, owned
from megatron_mamba.checkpoint import CheckpointManager, hf, load
from megatron_mamba.checkpoint.hf_source import checkpoint_tensors, write_checkpoint
from megatron_mamba.config import Config, MLPConfig, ModelConfig, to_dict
from megatron_mamba.model import build
from megatron_mamba.model.parameters import parameter_table
from megatron_mamba.parallel import fsdp
from megatron_mamba.parallel.context import ParallelContext

pytestmark = pytest.mark.ranks

TOOL = Path(__file__).parents[2] / "tools/export_hf.py"

# 43 rows of the vocabulary a tp rank, which two dp ranks cut unevenly.
MODELS = {name: replace(CASES[name][1], vocab_size=86) for name in ("hybrid, gelu, GQA", "mamba", "nemotron, GQA, wide heads")}


def export_hf() -> ModuleType:
    spec = importlib.util.spec_from_file_location("export_hf", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save(folder: Path, config: ModelConfig, context: ParallelContext, values: dict[str, Tensor] | Path) -> None:
    """A checkpoint of step 7 of a model with these global weights, or with those of another checkpoint."""
    model = build(config, context)
    named = dict(model.named_parameters())
    if isinstance(values, Path):
        load(values, {"model": named})
    else:
        for name, index in owned(model).items():
            fsdp.local(named[name].detach()).copy_(values[name][index])
    metadata = {"step": 7, "consumed_tokens": 7000, "config": to_dict(Config(model=config)), "tokenizer": None}
    manager = CheckpointManager(folder / "checkpoints", keep_last=1, keep_every=0, async_save=True, on_damage="error")
    manager.save(7, {"model": named}, metadata)
    manager.close()


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


@pytest.mark.parametrize("name", MODELS)
def test_export_of_ranks_equals_export_of_one(name: str, tmp_path: Path) -> None:
    config = MODELS[name]
    values = weights(config)
    on_ranks({"tp": 2, "dp_shard": 2}, lambda context: save(tmp_path / "ranks", config, context, values))
    on_ranks({}, lambda context: save(tmp_path / "one", config, context, tmp_path / "ranks/checkpoints/step_00000007"))
    assert len(list(tmp_path.glob("ranks/checkpoints/step_00000007/model_*"))) == 4
    found = []
    for source in ("ranks", "one"):
        folder = tmp_path / source / "hf"
        arguments = ["--checkpoint", str(tmp_path / source), "--output", str(folder), "--max-shard-size", "40KB"]
        assert export_hf().main(arguments) == 0
        found.append(digests(folder))
    assert found[0] == found[1]
    assert sum(file.endswith(".safetensors") for file in found[0]) > 1
    # Not only alike, but right: the files are those of the global weights.
    hf.export(config, values.__getitem__, tmp_path / "expected", max_shard_size=40_000)
    weight_files = {file: digest for file, digest in digests(tmp_path / "expected").items() if file != "README.md"}
    assert weight_files.items() <= found[0].items()


def test_export_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    """Memory grows by two tensors (the one being written and the next) and a block of the reader, though all is one file."""
    small = MODELS["hybrid, gelu, GQA"]
    config = replace(small, pattern="*----", hidden_size=1024, vocab_size=5120, mlp=MLPConfig(ffn_size=5120))
    table = parameter_table(config)
    largest, total = (function(4 * row.numel for row in table.values()) for function in (max, sum))
    assert total > 9 * largest

    def write(context: ParallelContext) -> None:
        write_checkpoint(tmp_path, config, ((name, torch.ones(row.shape)) for name, row in table.items()), None)

    def export(context: ParallelContext) -> None:
        hf.export(small, weights(small).__getitem__, tmp_path / "small")  # what is imported then is not counted
        get = checkpoint_tensors(tmp_path / "step_00000000")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        hf.export(config, get, tmp_path / "hf")
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        assert grown < total / 2, f"{grown / 1e6:.0f} MB for {total / 1e6:.0f} MB in tensors of {largest / 1e6:.0f} MB"

    on_ranks({}, write)
    on_ranks({}, export)
    assert (tmp_path / "hf/model.safetensors").stat().st_size > total
