"""A step that goes wrong on one rank: all ranks do the same about it, name that rank, and go on as if nothing had been."""

from __future__ import annotations

import math
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import on_ranks
from megatron_mamba.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LoggingConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    ScheduleConfig,
    SpikeConfig,
    TrainerConfig,
    WandbConfig,
)
from megatron_mamba.parallel.context import ParallelContext
from megatron_mamba.train import loop
from megatron_mamba.train.metrics import read_records
from tiny import tiny

pytestmark = pytest.mark.ranks


def config_for(folder: Path, parallel: ParallelConfig, policy: Any) -> Config:
    """A run of eight steps that saves at the fourth."""
    return Config(
        model=tiny("M*", vocab_size=60),
        parallel=parallel,
        data=DataConfig(kind="synthetic", seq_length=16),
        optim=OptimConfig(lr=1e-2, min_lr=1e-3, schedule=ScheduleConfig(warmup_samples=8)),
        trainer=TrainerConfig(
            train_samples=32, global_batch_size=4, precision="fp64", spike=SpikeConfig(policy, window=3), watchdog_seconds=None
        ),
        checkpoint=CheckpointConfig(interval=4),
        logging=LoggingConfig(interval=1, console=False, tensorboard=False, wandb=WandbConfig(mode="disabled")),
        eval=EvalConfig(interval=0, samples=0),
        run=RunConfig(dir=str(folder), name="test"),
    ).validate()


def trained(
    folder: Path, sizes: dict[str, int], policy: str, faults: Sequence[tuple[int, int, float]] = ()
) -> list[dict[str, Any]]:
    """The records of a run whose last rank finds its own loss times a factor at passes (step, run, factor)."""

    def body(context: ParallelContext) -> None:
        config = config_for(folder, ParallelConfig(**({"dp_shard": 1} | sizes)), policy)
        trainer = loop.Trainer(config, context, loop.StopRequest())
        runs, step = [], trainer.pipeline.step

        def faulty(*arguments: Any, **named: Any) -> torch.Tensor:
            runs.append(trainer.step + 1)
            here = (runs[-1], runs.count(runs[-1]))
            factor = math.prod(factor for *passes, factor in faults if tuple(passes) == here)
            return step(*arguments, **named) * (factor if context.global_rank == context.world_size - 1 else 1.0)

        trainer.pipeline.step = faulty  # type: ignore[method-assign]
        trainer.run()
        trainer.close()

    on_ranks(sizes, body)
    return read_records(folder / "metrics.jsonl")


def losses(records: list[dict[str, Any]]) -> list[float]:
    return [record["loss"] for record in records if record["kind"] == "train"]


@pytest.mark.parametrize("sizes", [pytest.param({"tp": 2}, marks=pytest.mark.slow), {"tp": 2, "dp_shard": 2}], ids=str)
def test_a_fault_of_one_rank_is_named_and_costs_nothing(sizes: dict[str, int], tmp_path: Path) -> None:
    """Not finite at step 6, a spike at step 7; ranks of another tp rank see neither."""
    clean = trained(tmp_path / "clean", sizes, "skip")
    faulty = trained(tmp_path / "faulty", sizes, "skip", [(6, 1, math.nan), (7, 1, 100.0)])
    assert losses(faulty) == losses(clean)
    assert faulty[-1]["transient_faults"] == 2
    assert faulty[-1]["skipped_steps"] == 0
    events = [record["message"] for record in faulty if "run again" in record.get("message", "")]
    last = math.prod(sizes.values()) - 1
    for message, what in zip(events, ("step 6 was not finite", "step 7 is a spike"), strict=True):
        assert message.startswith(what)
        assert f"The share of the loss changed of rank {last} on {socket.gethostname()} (" in message


def test_a_spike_that_one_rank_sees_sends_all_back(tmp_path: Path) -> None:
    records = trained(tmp_path / "run", {"tp": 2}, "rewind", [(6, 1, 100.0), (6, 2, 100.0)])
    assert [record["step"] for record in records if record["kind"] == "train"] == list(range(1, 9))
    assert records[-1]["rewinds"] == 1
    (event,) = (record for record in records if record.get("event") == "rewind")
    assert "The run goes on with sample 24" in event["message"]
    alone = trained(tmp_path / "one", {}, "rewind", [(6, 1, 100.0), (6, 2, 100.0)])
    assert losses(alone) == pytest.approx(losses(records), rel=1e-10)
