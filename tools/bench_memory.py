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

import torch
from rich.console import Console
from rich.table import Table

from megatron_mamba.config import Config, ConfigError
from megatron_mamba.model import build
from megatron_mamba.model.parameters import parameter_table
from megatron_mamba.model.step_memory import step_memory
from megatron_mamba.optim import build_optimizer, clip_, global_grad_norm
from megatron_mamba.parallel.collectives import reduce_
from megatron_mamba.parallel.context import ParallelContext
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

    model = build(config.model, context, precision=config.trainer.precision, seed=config.run.seed, recompute=config.recompute)
    found["model"] = torch.cuda.memory_allocated(device)
    optimizer = build_optimizer(model.named_parameters(), parameter_table(config.model), config.optim)
    found["optimizer"] = torch.cuda.memory_allocated(device)
    parameters = list(model.parameters())
    torch.manual_seed(context.dp_rank)  # the ranks of one sample read the same tokens
    tokens = torch.randint(0, config.model.vocab_size, (batch, length + 1), device=device)
    for step in range(STEPS):
        if step == 1:
            found["peak"] = 0
        for i in range(micro_batches):
            model.last_backward(i == micro_batches - 1)
            scale, chunk = 1 / (batch * length * micro_batches), config.trainer.loss_chunk_tokens
            loss = model(tokens[:, :-1], labels_BS=tokens[:, 1:], scale=scale, chunk_tokens=chunk)
            note("forward")
            loss.backward()
            note("backward")
        model.sum_gradients()
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
        context = ParallelContext.create(config.parallel, "cuda")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = measure(config, context, args.micro_batches)
    largest = torch.tensor(list(found.values()), device=context.device)
    for dimension in ("tp", "dp_shard", "dp_replicate"):
        reduce_(largest, context.group(dimension), "max")
    measured = dict(zip(found, largest.tolist(), strict=True))
    is_main, ranks, dp_shard = context.global_rank == 0, context.world_size, context.size("dp_shard")
    # The prediction makes a process group of its own.
    context.close()
    if not is_main:
        return 0
    predicted = step_memory(config, dp_shard, args.micro_batches)
    console = Console(width=100, highlight=False)
    where = f"{ranks} x {torch.cuda.get_device_name()}, torch {torch.__version__}"
    table = Table(title=f"{config.model.name} {config.model.pattern}, {where}")
    for heading in ("GiB on a rank", "predicted", "measured", "difference"):
        table.add_column(heading, justify="left" if heading == "GiB on a rank" else "right", no_wrap=True)
    rows = {**predicted.milestones, "peak": predicted.peak} if args.timeline else {"peak": predicted.peak}
    for name, size in rows.items():
        table.add_row(name, f"{size / GIB:.3f}", f"{measured[name] / GIB:.3f}", f"{size / measured[name] - 1:+.2%}")
    console.print(table)
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in predicted.at_peak.items())
    console.print(f"predicted peak in the {predicted.moment}: {parts}; measured reserved: {measured['reserved'] / GIB:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
