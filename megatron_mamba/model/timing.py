"""What each part of the model costs in seconds, by running it: for pipeline stages of equal time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from megatron_mamba.config import Config
from megatron_mamba.model.lm import DTYPES, LanguageModel, master_dtype
from megatron_mamba.model.memory import cast_weights, one_layer
from megatron_mamba.model.parameters import initial_values
from megatron_mamba.parallel import tensor
from megatron_mamba.parallel.collectives import reduce_
from megatron_mamba.parallel.context import MESH_DIMENSIONS, ParallelContext
from megatron_mamba.parallel.fsdp import local

WARM_UP, RUNS = 2, 5


def measured_costs(config: Config, context: ParallelContext) -> list[float]:
    """Seconds of embedding, every layer, and output with its loss, forward and backward, for one micro-batch on this device.

    One layer of each kind runs on this rank's piece of a micro-batch (one document a sequence), with the run's precision and
    recomputation and over its tp and cp ranks, but without FSDP; the median of a few runs counts, and of all ranks the slowest.
    All ranks must call it at once; all get the same.
    """
    kinds = ("embedding", *sorted({*config.model.layers}), "output")
    seconds = torch.tensor([_median(config, context, kind) for kind in kinds], dtype=torch.float64, device=context.device)
    for dimension in MESH_DIMENSIONS:
        reduce_(seconds, context.group(dimension), "max")
    found = dict(zip(kinds, seconds.tolist(), strict=True))
    return [found["embedding"], *(found[kind] for kind in config.model.layers), found["output"]]


def _median(config: Config, context: ParallelContext, kind: str) -> float:
    run = _part(config, context, kind)
    for _ in range(WARM_UP):
        run()
    seconds = []
    for _ in range(RUNS):
        _synchronize(context.device)
        begin = time.perf_counter()
        run()
        _synchronize(context.device)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _part(config: Config, context: ParallelContext, kind: str) -> Callable[[], None]:
    """A function that runs one layer of `kind`, the "embedding", or the final norm and "output", forward and backward."""
    trainer, device = config.trainer, context.device
    dtype = DTYPES[trainer.precision]
    model = LanguageModel(one_layer(config.model, kind), context, master_dtype(trainer.precision), config.recompute)
    ends: dict[str, list[nn.Module]] = {"embedding": [model.embedding], "output": [model.final_norm, model.output]}
    parts = ends.get(kind, [*model.layers.children()])
    used = {id(parameter) for part in parts for parameter in part.parameters()}
    table = [(parameter, row) for _, parameter, row in model.table_parameters() if id(parameter) in used]
    for part in parts:
        part.to_empty(device=device)
    for parameter, row in table:
        weight = local(parameter).detach()
        if row.fp32:
            index = tensor.owned_slices(row.shape, row.split_dim, row.units, context, sharded=False)
            weight.copy_(initial_values(row, config.run.seed, index, weight.dtype))
        else:
            weight.normal_(std=config.model.init.std)
    cast_weights(model, dtype)
    piece = config.data.seq_length // context.size("cp")
    tokens = torch.randint(config.model.vocab_size, (trainer.micro_batch_size, piece), device=device)
    info = model._sequence_info(tokens, None, None)
    rows = tokens.numel() // (context.size("tp") if context.sequence_parallel else 1)
    x, grad = torch.randn(2, rows, config.model.hidden_size, dtype=dtype, device=device)
    x.requires_grad_()

    def run() -> None:
        if kind == "output":
            model.output(model.final_norm(x), tokens.flatten(), 1.0, trainer.loss_chunk_tokens).backward()
        else:
            y = parts[0](tokens.flatten()) if kind == "embedding" else parts[0](x, info, None)
            y.backward(grad)

    return run
