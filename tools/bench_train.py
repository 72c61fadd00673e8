"""Time of a training step beside its floor, on whatever device is there.

    python tools/bench_train.py model=hybrid_8b "model.pattern=M-M*-M-" data.seq_length=4096 trainer.micro_batch_size=2

    torchrun --nproc-per-node 2 tools/bench_train.py model=hybrid_8b parallel=tp2 recompute=selective ...

Takes the settings of megatron_mamba.train; the data is random tokens. A step is forward, backward, clipping and AdamW on one
micro-batch, or with --micro-batches N on N (a pipeline's schedule wants some); the floor is the model's exact FLOPs at the
matrix-product rate measured in the same run. Times are medians of --repeats N steps (default 7). Figures are a rank's (a
pipeline's first); tokens/s and memory are per GPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from mamba_kernels import backend
from megatron_mamba.config import Config, ConfigError, require
from megatron_mamba.data.loader import Batch
from megatron_mamba.model import build_pipeline
from megatron_mamba.model.flops import flops_per_token
from megatron_mamba.model.lm import DTYPES
from megatron_mamba.model.parameters import count, parameter_table
from megatron_mamba.model.stages import stages_of
from megatron_mamba.optim import build_optimizer, clip_, global_grad_norm
from megatron_mamba.parallel.context import ParallelContext
from megatron_mamba.train.__main__ import compose
from megatron_mamba.train.metrics import memory_gib

REPEATS = 7


def median_seconds(device: torch.device, repeats: int, *parts: Callable[[], object]) -> list[float]:
    """Median wall times of the `parts` of a run, each waited for, over so many runs after as many, but at most three, others."""
    times: list[list[float]] = []
    for _ in range(min(repeats, 3) + repeats):
        times.append([])
        for part in parts:
            start = time.perf_counter()
            part()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[-1].append(time.perf_counter() - start)
    return [statistics.median(part) for part in zip(*times[-repeats:], strict=True)]


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product in `dtype`."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / median_seconds(device, REPEATS, lambda: a @ b)[0]


def measure(config: Config, micro_batches: int, repeats: int) -> dict[str, float] | None:
    """Seconds of the step and its parts, tokens/s, fraction of the floor, peak memory in GiB; None on later ranks."""
    context = ParallelContext.create(config.parallel, config.trainer.device)
    backend.FUSED = config.trainer.kernels == "fused"
    device, batch, length = context.device, config.trainer.micro_batch_size, config.data.seq_length
    rate = matmul_rate(device, DTYPES[config.trainer.precision])
    pipeline = build_pipeline(
        config.model,
        stages_of(config),
        context,
        precision=config.trainer.precision,
        seed=config.run.seed,
        recompute=config.recompute,
    )
    named = pipeline.named_parameters()
    optimizer = build_optimizer(named, parameter_table(config.model), config.optim)
    parameters = [parameter for _, parameter in named]
    torch.manual_seed(context.dp_rank)  # the ranks of one sample read the same tokens
    tokens = torch.randint(0, config.model.vocab_size, (micro_batches, batch, length + 1), device=device)
    batches = [Batch(t[:, :-1], t[:, 1:], None).pieces(context.rank("cp"), context.size("cp")) for t in tokens]
    sharing, tokens_per_step = context.world_size // context.dp_size, micro_batches * batch * length

    def passes() -> None:
        pipeline.step(batches, scale=1 / tokens_per_step, chunk_tokens=config.trainer.loss_chunk_tokens)

    def update() -> None:
        clip_(parameters, global_grad_norm(parameters, context), config.optim.clip_grad)
        optimizer.step()
        optimizer.zero_grad()

    part, rest = median_seconds(device, repeats, passes, update)
    whole = part + rest
    flops = 3 * flops_per_token(config.model, length) * tokens_per_step / sharing
    result = {
        "parameters": float(count(config.model)),
        "step s": whole,
        "forward+backward s": part,
        "tokens/s": tokens_per_step / whole / sharing,
        "TFLOP/s": flops / whole / 1e12,
        "matmul TFLOP/s": rate / 1e12,
        "floor s": flops / rate,
        "of floor": flops / rate / whole,
        "peak GiB": memory_gib(device)["memory_gib"],
    }
    main_rank = context.global_rank == 0
    context.close()
    return result if main_rank else None


def main(argv: list[str]) -> int:
    """Print the table; returns the process's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="SETTING=VALUE")
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    args = parser.parse_intermixed_args(argv)
    try:
        config = compose(["data=synthetic", "trainer.train_samples=1000000", *args.overrides])
        require(args.repeats > 0, "--repeats", args.repeats, "must be positive", "Use 1 or more")
        size = args.micro_batches * config.trainer.micro_batch_size
        config.parallel.check_micro_batches("--micro-batches", args.micro_batches, size, args.micro_batches)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result = measure(config, args.micro_batches, args.repeats)
    if result is None:
        return 0
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    what = f"{config.model.name} {config.model.pattern} in {config.trainer.precision}"
    parallel = config.parallel
    what += f", tp {parallel.tp}{' sequence-parallel' if parallel.sequence_parallel else ''}"
    what += f", cp {parallel.cp}" if parallel.cp > 1 else ""
    what += f", pp {parallel.pp} {parallel.schedule} x {args.micro_batches}" if parallel.pp > 1 else ""
    table = Table(title=f"{what}, {device}, torch {torch.__version__}")
    for name in result:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row(*(f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" for value in result.values()))
    Console(width=150).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
