"""Generation on tensor-parallel ranks: the tokens and logits of one rank, for every architecture, in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from harness import on_ranks
from megatron_mamba.checkpoint import CheckpointManager
from megatron_mamba.config import Config, ModelConfig, to_dict
from megatron_mamba.generate import GenerationSettings, generate, prefill
from megatron_mamba.generate.loading import load_model
from megatron_mamba.model import LanguageModel
from megatron_mamba.parallel import fsdp, tensor
from megatron_mamba.parallel.context import ParallelContext
from tiny import ARCHITECTURES, random_model, random_tokens

pytestmark = pytest.mark.ranks

def divisible(config: ModelConfig) -> ModelConfig:
    """The model with eight Mamba-2 heads and a vocabulary that four ranks can share out."""
    groups = 8 if config.mamba2.n_groups == 6 else config.mamba2.n_groups
    return replace(config, vocab_size=60, mamba2=replace(config.mamba2, d_inner=64, n_groups=groups))


MODELS = {name: divisible(config) for name, config in ARCHITECTURES.items()}


class Output(NamedTuple):
    """What a model generates, and its logits `[B, V]` after prompts of different lengths and after each of more tokens."""

    tokens: list[list[list[int]]]
    logits: Tensor


def output(model: LanguageModel) -> Output:
    prompts = [random_tokens(length, seed=length, vocab_size=60).tolist() for length in (1, 9, 5)]
    settings = [GenerationSettings(temperature=t, max_new_tokens=3, prefill_length=6) for t in (0.0, 1.0)]
    tokens = [generate(model, prompts, setting, None) for setting in settings]
    with torch.no_grad():
        logits, cache = prefill(model, prompts, 4, 4)
        following = random_tokens(3, 4, seed=1, vocab_size=60)
        steps = [model(following[:, i : i + 1], cache=cache, last_only=True) for i in range(4)]
        # And without a cache, all positions at once.
        return Output(tokens, torch.cat([logits, *steps, model(following).flatten(0, 1)]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of each model, `N/step_00000001`, and what one rank makes of it, `N/output.pt`."""
    folder = tmp_path_factory.mktemp("models")

    def save(context: ParallelContext) -> None:
        for i, (name, config) in enumerate(MODELS.items()):
            model = random_model(config, context, seed=i, sharded=False)
            manager = CheckpointManager(folder / str(i), keep_last=1, keep_every=0, async_save=False, on_damage="error")
            manager.save(1, {"model": dict(model.named_parameters())}, {"config": to_dict(Config(model=config)), "step": 1})
            manager.close()
            values = {name: fsdp.local(parameter.detach()) for name, parameter in model.named_parameters()}
            loaded, metadata = load_model(folder / str(i), context, "fp64")
            assert metadata["step"] == 1, name
            torch.save((values, output(loaded)._asdict()), folder / str(i) / "one.pt")

    on_ranks({}, save)
    return folder


@pytest.mark.parametrize("tp", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_generate_what_one_does(tp: int, folder: Path) -> None:
    """Two ranks share one group or key/value head, four share one or two."""

    def compare(context: ParallelContext) -> None:
        wrong = {}
        for i, name in enumerate(MODELS):
            expected = Output(**torch.load(folder / str(i) / "one.pt")[1])
            found = output(load_model(folder / str(i), context, "fp64")[0])
            error = float((found.logits - expected.logits).abs().max() / expected.logits.abs().max())
            if not (found.tokens == expected.tokens and error <= 1e-12):
                wrong[name] = f"logits differ by {error:.1e}, tokens {found.tokens}, expected {expected.tokens}"
        assert not wrong, wrong

    on_ranks({"tp": tp}, compare)


def test_a_rank_holds_its_part_in_the_compute_dtype(folder: Path) -> None:
    """bf16 weights, A_log, D, dt_bias and norm weights in fp32, each the rank's slice of the checkpoint's; and they compute."""

    def check(context: ParallelContext) -> None:
        for i, name in enumerate(MODELS):
            values, _ = torch.load(folder / str(i) / "one.pt")
            model, _ = load_model(folder / str(i), context, "bf16")
            for full_name, parameter, row in model.table_parameters():
                index = tensor.owned_slices(row.shape, row.split_dim, row.units, context, sharded=False)
                dtype = torch.float32 if row.fp32 else torch.bfloat16
                assert parameter.dtype == dtype, f"{name}: {full_name}"
                assert torch.equal(fsdp.local(parameter), values[full_name][index].to(dtype)), f"{name}: {full_name}"
            new = generate(model, [[1, 2, 3]], GenerationSettings(temperature=0.0, max_new_tokens=2), None)
            assert len(new[0]) == 2

    on_ranks({"tp": 2}, check)
