"""The recipes of longer contexts: from a checkpoint at a short length, over context-parallel ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from harness import on_ranks
from megatron_mamba.parallel.context import ParallelContext
from megatron_mamba.train import loop
from megatron_mamba.train.__main__ import compose
from megatron_mamba.train.metrics import read_records

pytestmark = pytest.mark.ranks

TINY = [
    "model=hybrid_tiny", "model.pattern=M*-m", "model.hidden_size=24", "model.vocab_size=60", "model.mlp.ffn_size=40",
    "model.mamba2={d_inner: 64, head_dim: 8, state_size: 5, n_groups: 2}", "model.mamba={d_inner: 40, state_size: 5, dt_rank: 3}",
    "model.attention={n_heads: 4, n_kv_heads: 2, head_dim: 8}",
    "data=synthetic", "data.document_reset=true", "trainer.precision=fp64", "trainer.device=cpu", "trainer.train_tokens=null",
    "trainer.train_samples=400", "trainer.global_batch_size=4", "trainer.micro_batch_size=4",
    "logging.interval=1", "logging.console=false", "logging.tensorboard=false", "logging.wandb.mode=disabled",
    "eval.interval=0", "eval.samples=0",
]  # fmt: skip


def train(run_dir: Path, length: int, steps: int, *overrides: str) -> list[float]:
    """Losses of a run of the command line's settings, on as many ranks as they ask for."""
    settings = [f"run.dir={run_dir}", f"data.seq_length={length}", f"trainer.stop_after_samples={4 * steps}"]
    config = compose([*TINY, *settings, *overrides])

    def body(context: ParallelContext) -> None:
        own = ParallelContext.over(context.mesh, context.device, config.parallel)
        trainer = loop.Trainer(config, own, loop.StopRequest())
        trainer.run()
        trainer.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "draw_run", lambda *_: None)
        on_ranks({"cp": config.parallel.cp}, body)
    lines = read_records(run_dir / "metrics.jsonl")
    return [line["loss"] for line in lines if line["kind"] == "train"]


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run at a quarter of the length."""
    run_dir = tmp_path_factory.mktemp("short")
    train(run_dir, 16, 6, "optim.lr=1e-2")
    return run_dir


RECIPES = [("long_context_16k", 2), pytest.param("long_context_32k", 4, marks=pytest.mark.slow), ("long_context_128k", 8)]


@pytest.mark.parametrize(("recipe", "ranks"), RECIPES)
def test_a_recipe_goes_on_from_a_short_context(recipe: str, ranks: int, short: Path, tmp_path: Path) -> None:
    """Over the recipe's ranks as on one, and from the checkpoint's weights."""
    chosen = [f"recipe={recipe}", f"checkpoint.init_from={short}", "optim.schedule.warmup_tokens=64"]
    spread = train(tmp_path / "spread", 64, 2, *chosen)
    alone = train(tmp_path / "alone", 64, 2, *chosen, "parallel.cp=1")
    assert len(spread) == 2
    assert f"cp: {ranks}" in (tmp_path / "spread/config.yaml").read_text()
    torch.testing.assert_close(torch.tensor(spread), torch.tensor(alone), rtol=1e-10, atol=0)
    if ranks == 2:
        fresh = train(tmp_path / "fresh", 64, 1, *chosen, "checkpoint.init_from=null")
        assert abs(fresh[0] - spread[0]) > 1e-3
