"""Which samples a rank evaluates, and whether a run has been evaluated already."""

from __future__ import annotations

from pathlib import Path

from megatron_mamba.config import Config
from megatron_mamba.data import Datasets
from megatron_mamba.parallel.context import ParallelContext
from megatron_mamba.train.metrics import read_records


def sample_groups(samples: int, micro_batch_size: int, context: ParallelContext) -> list[list[int]]:
    """This rank's sample numbers by micro-batch; every rank gets equally many, some of them short or empty."""
    mine = list(range(context.dp_rank, samples, context.dp_size))
    count = -(-samples // (micro_batch_size * context.dp_size))
    return [mine[i * micro_batch_size : (i + 1) * micro_batch_size] for i in range(count)]


def is_evaluated(config: Config, step: int, data: Datasets, *splits: str) -> bool:
    """Whether the run has recorded its losses of a step on `splits`, or on all there are."""
    there = {name for name, dataset in (("valid", data.valid), ("test", data.test)) if dataset is not None and config.eval.samples}
    found = {record["kind"] for record in read_records(Path(config.run.dir) / "metrics.jsonl") if record.get("step") == step}
    return step > 0 and there & {*(splits or there)} <= found


def finished(config: Config, step: int) -> str:
    """What a run says that has nothing left to do."""
    trainer = config.trainer
    name = "train_samples" if trainer.train_samples is not None else "train_tokens"
    return (
        f"finished: step {step} was the last of trainer.{name}={getattr(trainer, name)}, and it is evaluated. "
        f"To go on, raise trainer.{name}; for another run, choose another run.dir"
    )
