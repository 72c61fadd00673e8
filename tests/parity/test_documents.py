"""Packed documents, spread over cp ranks or not, train as the same documents alone: losses of tokens and every gradient."""

from __future__ import annotations

import math
import random
import tempfile
from collections import defaultdict
from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from harness import on_ranks, owned, perturb
from megatron_mamba.config import ModelConfig
from megatron_mamba.model import LanguageModel, build
from megatron_mamba.parallel import fsdp
from megatron_mamba.parallel.context import ParallelContext
from tiny import tiny

pytestmark = pytest.mark.ranks

SIZES = {"vocab_size": 60, "mamba2": {"d_inner": 64}}
MODELS = {
    pattern: tiny(pattern, **SIZES, attention={"rotary_fraction": 1.0 if "*" in pattern and "M" not in pattern else 0.0})
    for pattern in ("mm", "MM", "*-*", "M*-m")
} | {"MM, wide convolution": tiny("MM", vocab_size=60, mamba2={"d_inner": 64, "conv_width": 9})}
LENGTH, RANKS = 72, (1, 2, 4)
"""Pieces of 72, 36 and 18 tokens."""


def lengths(seed: int) -> list[int]:
    """Documents of 1 token up to one that covers whole pieces, which fill a row."""
    generator, found = random.Random(seed), []
    while (left := LENGTH - sum(found)) > 0:
        found.append(min(left, generator.choice([1, 1, 2, 3, 5, 8, 13, 19, 40, 60])))
    return found


# A row of one-token documents, one with borders at those of the pieces, one document, and random ones.
ROWS = [[1] * LENGTH, [18] * 4, [17, 2, 17, 1, 35], [LENGTH], *(lengths(seed) for seed in range(4))]


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels and document starts of all rows."""
    generator = torch.Generator().manual_seed(3)
    tokens, labels = (torch.randint(0, 60, (len(ROWS), LENGTH), generator=generator) for _ in range(2))
    starts = torch.zeros(len(ROWS), LENGTH, dtype=torch.bool)
    for row, documents in enumerate(ROWS):
        begin = 0
        for length in documents:
            starts[row, begin] = True
            begin += length
    return tokens, labels, starts


def losses_of(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)


def gradients_of(model: LanguageModel) -> dict[str, Tensor]:
    model.sum_gradients()
    return {name: fsdp.local(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}


def prepared(config: ModelConfig, context: ParallelContext) -> LanguageModel:
    model = build(config, context, precision="fp64", seed=4)
    perturb(model)
    return model


def one_by_one(config: ModelConfig, context: ParallelContext) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses of the tokens and summed gradients, each document being a row of its own, with others of its length."""
    model, (tokens, labels, _) = prepared(config, context), batch()
    losses, places = torch.zeros(tokens.shape, dtype=torch.float64), defaultdict(list)
    for row, documents in enumerate(ROWS):
        for begin, end in pairwise(accumulate(documents, initial=0)):
            places[end - begin].append((row, slice(begin, end)))
    for spans in places.values():
        t, answers = (torch.stack([values[span] for span in spans]) for values in (tokens, labels))
        with torch.no_grad():
            for span, found in zip(spans, losses_of(model(t), answers), strict=True):
                losses[span] = found
        model(t, labels_BS=answers).backward()
    return losses, gradients_of(model)


def packed(config: ModelConfig, context: ParallelContext) -> tuple[Tensor, dict[str, Tensor]]:
    """The same of this rank's pieces of the packed rows."""
    model = prepared(config, context)
    tokens, labels, starts = (t.chunk(context.size("cp"), 1)[context.rank("cp")] for t in batch())
    with torch.no_grad():
        losses = losses_of(model(tokens, document_start_BS=starts), labels)
    model(tokens, labels_BS=labels, document_start_BS=starts).backward()
    return losses, gradients_of(model)


def relative(found: Tensor, expected: Tensor, whole: Tensor) -> float:
    error = float((found - expected).abs().max() / whole.abs().max()) if found.numel() else 0.0
    return error if math.isfinite(error) else math.inf


def compared(name: str, ranks: int, expected: Any) -> list[tuple[float, float]]:
    """Largest differences of losses and gradients from documents one by one, on each rank."""
    with tempfile.TemporaryDirectory() as folder:

        def body(context: ParallelContext) -> None:
            losses, gradients = packed(MODELS[name], context)
            whole_losses, whole_gradients = expected
            piece = whole_losses.chunk(ranks, 1)[context.rank("cp")]
            slices = owned(build(MODELS[name], context, precision="fp64"))
            assert gradients.keys() == whole_gradients.keys()
            errors = [relative(g, whole_gradients[n][slices[n]], whole_gradients[n]) for n, g in gradients.items()]
            torch.save((relative(losses, piece, whole_losses), max(errors)), f"{folder}/{context.global_rank}")

        on_ranks({"cp": ranks}, body)
        return [torch.load(f"{folder}/{rank}") for rank in range(ranks)]


@pytest.mark.parametrize("name", MODELS)
def test_packed_documents_are_documents_one_by_one(name: str, record_property: Callable[[str, object], None]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        on_ranks({}, lambda context: torch.save(one_by_one(MODELS[name], context), f"{folder}/alone"))
        expected = torch.load(f"{folder}/alone")
    found = {ranks: compared(name, ranks, expected) for ranks in RANKS}
    record_property("documents", {f"{name}, cp{n}": [max(e) for e in zip(*errors, strict=True)] for n, errors in found.items()})
    for ranks, errors in found.items():
        assert max(max(pair) for pair in errors) <= 1e-10, (name, ranks, errors)
