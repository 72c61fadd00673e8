"""Predicted and measured memory of a training step on GPUs: how far tools/plan.py is off.

    python tools/bench_memory.py model=hybrid_8b "model.pattern=M-M*-M-" trainer.micro_batch_size=2 [--timeline]
    torchrun --nproc-per-node 2 tools/bench_memory.py model=hybrid_8b parallel.tp=2 parallel.sequence_parallel=true

Takes the settings of megatron_mamba.train; the data is random tokens. Runs steps as the trainer does them (forward, backward,
clipping, AdamW) of --micro-batches N (default 1) and prints the most that torch's allocator held from the second step on, on
the rank that held most, beside the prediction. --timeline: what it holds between the parts of a step, too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.table import Table

from mamba_kernels import backend
from megatron_mamba.config import Config, ConfigError
from megatron_mamba.data.loader import Batch
from megatron_mamba.model import build_pipeline
from megatron_mamba.model.parameters import parameter_table
from megatron_mamba.model.stages import stages_of
from megatron_mamba.model.step_memory import step_memory
from megatron_mamba.optim import build_optimizer, clip_, global_grad_norm
from megatron_mamba.parallel.collectives import reduce_
from megatron_mamba.parallel.context import MESH_DIMENSIONS, ParallelContext
from megatron_mamba.train.__main__ import compose

STEPS, GIB = 3, 2**30


def measure(config: Config, context: ParallelContext, micro_batches: int) -> dict[str, int]:
    """Bytes that the allocator held at each milestone of the last step, the "peak" of all steps but the first, and "reserved"."""
    device, batch, length = context.device, config.trainer.micro_batch_size, config.data.seq_length
    found = {"peak": 0}

    def note(done: str) -> None:
        """After a part of the step: what is allocated, and the most that was in it."""
        most = torch.cuda.max_memory_allocated(device)
        found.update({f"most in {done}": most, f"after {done}": torch.cuda.memory_allocated(device)})
        found["peak"] = max(found["peak"], most)
        torch.cuda.reset_peak_memory_stats(device)

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        yield
        note(name)

    pipeline = build_pipeline(
        config.model,
        stages_of(config),
        context,
        precision=config.trainer.precision,
        seed=config.run.seed,
        recompute=config.recompute,
    )
    found["model"] = torch.cuda.memory_allocated(device)
    named = pipeline.named_parameters()
    optimizer = build_optimizer(named, parameter_table(config.model), config.optim)
    found["optimizer"] = torch.cuda.memory_allocated(device)
    parameters = [parameter for _, parameter in named]
    torch.manual_seed(context.dp_rank)  # the ranks of one sample read the same tokens
    tokens = torch.randint(0, config.model.vocab_size, (batch, length + 1), device=device)
    piece = Batch(tokens[:, :-1], tokens[:, 1:], None).pieces(context.rank("cp"), context.size("cp"))
    for step in range(STEPS):
        if step == 1:
            found["peak"] = 0
        scale, chunk = 1 / (batch * length * micro_batches), config.trainer.loss_chunk_tokens
        pipeline.step([piece] * micro_batches, scale=scale, chunk_tokens=chunk, phase=phase)
        clip_(parameters, global_grad_norm(parameters, context), config.optim.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        note("step")
    return found | {"reserved": torch.cuda.max_memory_reserved(device)}


def main(argv: list[str]) -> int:
    """Print the comparison on rank 0; returns the process's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="SETTING=VALUE")
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--timeline", action="store_true")
    args = parser.parse_intermixed_args(argv)
    try:
        config = compose(["data=synthetic", "trainer.train_samples=1000000", *args.overrides])
        size = args.micro_batches * config.trainer.micro_batch_size
        config.parallel.check_micro_batches("--micro-batches", args.micro_batches, size, args.micro_batches)
        context = ParallelContext.create(config.parallel, "cuda")
        backend.FUSED = config.trainer.kernels == "fused"
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = measure(config, context, args.micro_batches)
    largest = torch.tensor(list(found.values()), device=context.device)
    for dimension in MESH_DIMENSIONS:
        reduce_(largest, context.group(dimension), "max")
    measured = dict(zip(found, largest.tolist(), strict=True))
    is_main, ranks, shards = context.global_rank == 0, context.world_size, context.shard_size
    # The prediction makes a process group of its own.
    context.close()
    if not is_main:
        return 0
    stages, pp_ranks = stages_of(config), range(config.parallel.pp)
    of_each = [step_memory(config, shards, args.micro_batches, stages, rank) for rank in pp_ranks]
    predicted = max(of_each, key=lambda memory: memory.peak)
    console = Console(width=100, highlight=False)
    where = f"{ranks} x {torch.cuda.get_device_name()}, torch {torch.__version__}"
    table = Table(title=f"{config.model.name} {config.model.pattern}, {where}")
    for heading in ("GiB on a rank", "predicted", "measured", "difference"):
        table.add_column(heading, justify="left" if heading == "GiB on a rank" else "right", no_wrap=True)
    # A pipeline's milestones lie inside its schedule, where nothing is measured.
    milestones = {name: size for name, size in predicted.milestones.items() if args.timeline and name in measured}
    rows = {**milestones, "peak": predicted.peak}
    for name, size in rows.items():
        table.add_row(name, f"{size / GIB:.3f}", f"{measured[name] / GIB:.3f}", f"{size / measured[name] - 1:+.2%}")
    console.print(table)
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in predicted.at_peak.items())
    console.print(f"predicted peak in the {predicted.moment}: {parts}; measured reserved: {measured['reserved'] / GIB:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
