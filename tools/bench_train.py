"""Time of a training step beside its floor, on whatever device is there.

    python tools/bench_train.py model=hybrid_8b "model.pattern=M-M*-M-" data.seq_length=4096 trainer.micro_batch_size=2

    torchrun --nproc-per-node 2 tools/bench_train.py model=hybrid_8b parallel=tp2 recompute=selective ...

Takes the settings of megatron_mamba.train; the data is random tokens. A step is forward, backward, clipping and AdamW on one
micro-batch; the floor is the model's exact FLOPs at the matrix-product rate measured in the same run. Figures are a rank's;
tokens/s and memory are per GPU.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from megatron_mamba.config import Config, ConfigError
from megatron_mamba.model import build
from megatron_mamba.model.flops import flops_per_token
from megatron_mamba.model.lm import DTYPES
from megatron_mamba.model.parameters import count, parameter_table
from megatron_mamba.optim import build_optimizer, clip_, global_grad_norm
from megatron_mamba.parallel.context import ParallelContext
from megatron_mamba.train.__main__ import compose
from megatron_mamba.train.metrics import memory_gib

WARM_UP, REPEATS = 3, 7


def median_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Median wall time of `run` over REPEATS calls after WARM_UP, each waited for."""
    times = []
    for i in range(WARM_UP + REPEATS):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if i >= WARM_UP:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product in `dtype`."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: a @ b, device)


def measure(config: Config) -> dict[str, float] | None:
    """Seconds of the step and its parts, tokens/s, fraction of the floor, peak memory in GiB; None on later ranks."""
    context = ParallelContext.create(config.parallel, config.trainer.device)
    device, batch, length = context.device, config.trainer.micro_batch_size, config.data.seq_length
    rate = matmul_rate(device, DTYPES[config.trainer.precision])
    model = build(config.model, context, precision=config.trainer.precision, seed=config.run.seed, recompute=config.recompute)
    optimizer = build_optimizer(model.named_parameters(), parameter_table(config.model), config.optim)
    parameters = list(model.parameters())
    torch.manual_seed(context.dp_rank)  # the ranks of one sample read the same tokens
    tokens = torch.randint(0, config.model.vocab_size, (batch, length + 1), device=device)
    sharing = context.world_size // context.dp_size

    def forward() -> torch.Tensor:
        scale, chunk = 1 / (batch * length), config.trainer.loss_chunk_tokens
        return model(tokens[:, :-1], labels_BS=tokens[:, 1:], scale=scale, chunk_tokens=chunk)

    def update() -> None:
        model.sum_gradients()
        clip_(parameters, global_grad_norm(parameters, context), config.optim.clip_grad)
        optimizer.step()
        optimizer.zero_grad()

    def step() -> None:
        forward().backward()
        update()

    whole, part = median_seconds(step, device), median_seconds(lambda: forward().backward(), device)
    flops = 3 * flops_per_token(config.model, length) * batch * length / sharing
    result = {
        "parameters": float(count(config.model)),
        "step s": whole,
        "forward+backward s": part,
        "tokens/s": batch * length / whole / sharing,
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
    try:
        config = compose(["data=synthetic", "trainer.train_samples=1000000", *argv])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result = measure(config)
    if result is None:
        return 0
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    what = f"{config.model.name} {config.model.pattern} in {config.trainer.precision}"
    parallel = config.parallel
    what += f", tp {parallel.tp}{' sequence-parallel' if parallel.sequence_parallel else ''}"
    table = Table(title=f"{what}, {device}, torch {torch.__version__}")
    for name in result:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row(*(f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" for value in result.values()))
    Console(width=150).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
