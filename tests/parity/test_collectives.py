"""Which collectives a layer, the loss and a step make, and of what sizes: the communication that the layout promises."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harness import on_ranks
from megatron_mamba.config import ModelConfig, RecomputeConfig
from megatron_mamba.layout import Recompute
from megatron_mamba.model import LanguageModel, build
from megatron_mamba.model.lm import initialize
from megatron_mamba.model.module import SequenceInfo
from megatron_mamba.optim import clip_, global_grad_norm
from megatron_mamba.parallel import vocab
from megatron_mamba.parallel.context import ParallelContext
from tiny import random_tokens, tiny

pytestmark = pytest.mark.ranks

BATCH, LENGTH = 2, 8
T = BATCH * LENGTH
SIZES = {"vocab_size": 60, "mamba2": {"d_inner": 64}}
MODELS = {pattern: tiny(pattern, **SIZES) for pattern in "mM*-"}
D, GROUPS = MODELS["m"].hidden_size, MODELS["M"].mamba2.n_groups
X_PROJ = MODELS["m"].mamba.dt_rank + 2 * MODELS["m"].mamba.state_size

NAMES = {"allreduce_": "all_reduce", "_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter"}
Call = tuple[str, int]
SUM, GATHER, SCATTER = ("all_reduce", T * D), ("all_gather", T * D), ("reduce_scatter", T * D)
"""On all tokens of the residual stream."""


class Watch(TorchDispatchMode):
    """Notes every collective, whichever function of torch.distributed asks for it: its name and the elements of its largest
    tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            name = func.name().split("::")[1].split(".")[0]
            sizes = [leaf.numel() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self.calls.append((NAMES.get(name, name), max(sizes, default=0)))
        return func(*args, **(kwargs or {}))


def watched(function: Callable[[], Any]) -> tuple[Any, Counter[Call]]:
    """What the function returns, and its collectives."""
    with Watch() as watch:
        result = function()
    return result, Counter(watch.calls)


def unsharded(config: ModelConfig, context: ParallelContext, recompute: Recompute = "none") -> LanguageModel:
    """The model without FSDP."""
    kinds = RecomputeConfig(recompute, recompute, recompute, recompute)
    model = build(config, context, precision="fp64", device="meta", recompute=kinds).to_empty(device="cpu")
    initialize(model, 0)
    return model


def layer_calls(pattern: str, context: ParallelContext, recompute: Recompute) -> tuple[Counter[Call], Counter[Call]]:
    """Collectives of the forward and of the backward pass of a layer."""
    layer = unsharded(MODELS[pattern], context, recompute).layers["0"]
    tokens = T // context.size("tp") if context.sequence_parallel else T
    x = torch.ones(tokens, D, dtype=torch.float64, requires_grad=True)
    out, forward = watched(lambda: layer(x, SequenceInfo(BATCH, LENGTH, x.device), None))
    assert out.shape == x.shape
    return forward, watched(lambda: out.backward(torch.ones_like(out)))[1]


def assert_layers_call(context: ParallelContext, patterns: str, extra: dict[str, Counter[Call]]) -> None:
    """One sum each way a layer and its `extra` calls, which recomputation makes again; with sequence parallelism one gather
    and one scatter each way, and one more gather where the layer's input is kept split."""
    for pattern in patterns:
        own = extra.get(pattern, Counter())
        for recompute in ("none", "selective", "full"):
            again = own if recompute != "none" else Counter()
            found = layer_calls(pattern, replace(context, sequence_parallel=False), recompute)
            assert found == (Counter([SUM]) + own, Counter([SUM]) + own + again), (pattern, recompute, found)
            gathers = [GATHER] if recompute != "none" else []
            expected = Counter([GATHER, SCATTER]) + own, Counter([GATHER, SCATTER, *gathers]) + own + again
            found = layer_calls(pattern, replace(context, sequence_parallel=True), recompute)
            assert found == expected, (pattern, recompute, found)


def test_layers_on_two_ranks() -> None:
    extra = {"m": Counter([("all_reduce", T * X_PROJ)])}
    on_ranks({"tp": 2}, lambda context: assert_layers_call(context, "mM*-", extra))


def test_layers_on_more_ranks_than_groups() -> None:
    """Mamba-2's norm sums a number a token and group; shared keys and values add nothing."""
    extra = {"M": Counter([("all_reduce", T * GROUPS)])}
    on_ranks({"tp": 4}, lambda context: assert_layers_call(context, "M*", extra))


def test_partial_gradients_travel_together() -> None:
    """Those of the norms, with sequence parallelism: one sum over tp a step; without it, none."""
    config = tiny("mM*-", **SIZES)

    def body(context: ParallelContext) -> None:
        tokens = random_tokens(BATCH, LENGTH + 1, vocab_size=60)
        for split, calls in ((False, []), (True, [("all_reduce", 5 * D)])):
            model = unsharded(config, replace(context, sequence_parallel=split))
            model(tokens[:, :-1], labels_BS=tokens[:, 1:]).backward()
            assert watched(model.sum_gradients)[1] == Counter(calls), split

    on_ranks({"tp": 2}, body)


def loss_calls(context: ParallelContext, vocabulary: int, chunk_tokens: int) -> tuple[Counter[Call], Counter[Call]]:
    """Collectives of the forward and of the backward pass of the loss."""
    tokens = T // context.size("tp") if context.sequence_parallel else T
    hidden = torch.ones(tokens, D, dtype=torch.float64, requires_grad=True)
    weight = torch.ones(vocabulary // context.size("tp"), D, dtype=torch.float64, requires_grad=True)
    labels = random_tokens(T, vocab_size=vocabulary)
    loss, forward = watched(lambda: vocab.cross_entropy(hidden, weight, labels, context, scale=1.0, chunk_tokens=chunk_tokens))
    return forward, watched(loss.backward)[1]


def test_loss_gathers_no_logits() -> None:
    """A maximum and two sums a token, and the hidden states' gradient: nothing grows with the vocabulary."""

    def body(context: ParallelContext) -> None:
        for chunk in (T, T // 4):
            statistics = Counter({("all_reduce", chunk): T // chunk, ("all_reduce", 2 * chunk): T // chunk})
            for vocabulary in (8, 4000):
                found = loss_calls(replace(context, sequence_parallel=False), vocabulary, chunk)
                assert found == (statistics + Counter([SUM]), Counter()), (chunk, vocabulary, found)
                found = loss_calls(replace(context, sequence_parallel=True), vocabulary, chunk)
                assert found == (statistics + Counter([GATHER, SCATTER]), Counter()), (chunk, vocabulary, found)

    on_ranks({"tp": 2}, body)


def test_one_rank_calls_nothing() -> None:
    """Forward, backward, sums of gradients and clipping on a group of one, with every kind of recomputation."""

    def body(context: ParallelContext) -> None:
        tokens = random_tokens(BATCH, LENGTH + 1, vocab_size=60)

        def step(model: LanguageModel) -> None:
            model(tokens[:, :-1], labels_BS=tokens[:, 1:]).backward()
            model.sum_gradients()
            norm = global_grad_norm(model.parameters(), context)
            assert float(norm) > 0
            clip_(model.parameters(), norm, 1e-3)
            context.sum_over_tokens(norm)
            context.any_rank(False)
            context.barrier()

        for recompute in ("none", "selective", "full"):
            model = unsharded(tiny("mM*-", **SIZES), context, recompute)
            assert watched(lambda model=model: step(model))[1] == Counter(), recompute
        # Calls on a group of one would have been seen.
        assert sum(watched(lambda: dist.all_reduce(torch.ones(3)))[1].values()) == 1

    on_ranks({}, body)


def step_calls(context: ParallelContext, micro_batches: int, steps: int = 1) -> dict[str, int]:
    """Number of collectives by name in the first `steps` steps with FSDP."""
    model = build(MODELS["M"], context, precision="fp64")
    tokens = random_tokens(1, LENGTH + 1, vocab_size=60)

    def run() -> None:
        for i in range(steps * micro_batches):
            model.last_backward((i + 1) % micro_batches == 0)
            model(tokens[:, :-1], labels_BS=tokens[:, 1:]).backward()
            if (i + 1) % micro_batches == 0:
                model.sum_gradients()
                model.zero_grad()

    found: Counter[str] = Counter()
    for (name, _), count in watched(run)[1].items():
        found[name] += count
    return dict(found)


UNITS = 3
"""That FSDP shards: embedding, one layer, output."""


def test_gradients_are_summed_once_a_step() -> None:
    """Or after each micro-batch, if asked for; and of parameters kept apart, once a step in one collective."""

    def body(context: ParallelContext) -> None:
        one = step_calls(context, 1)
        assert (one["reduce_scatter"], one["all_reduce"]) == (UNITS, 1), one
        four = step_calls(context, 4)
        assert (four["reduce_scatter"], four["all_reduce"]) == (UNITS, 1), four
        each = step_calls(replace(context, reduce_every_micro_batch=True), 4)
        assert (each["reduce_scatter"], each["all_reduce"]) == (4 * UNITS, 1), each

    on_ranks({"dp_shard": 2}, body)


def test_replicas_are_summed_once_a_step() -> None:
    """Over replicas gradients travel once a step even where shards sum them after each micro-batch."""

    def body(context: ParallelContext) -> None:
        for every_micro_batch in (False, True):
            found = step_calls(replace(context, reduce_every_micro_batch=every_micro_batch), 4)
            times = 4 if every_micro_batch else 1
            assert (found["reduce_scatter"], found["all_reduce"]) == (times * UNITS, UNITS + 2), found

    on_ranks({"dp_replicate": 2, "dp_shard": 2}, body)


def test_weights_are_kept_through_the_step_if_asked_for() -> None:
    """Without resharding each unit's weights are gathered once a step; with it, again for each pass that reads them."""

    def body(context: ParallelContext) -> None:
        kept = replace(context, reshard_after_forward=False)
        assert [step_calls(kept, n)["all_gather"] for n in (1, 4)] == [UNITS, UNITS]
        assert step_calls(kept, 2, steps=3)["all_gather"] == 3 * UNITS
        one, four = (step_calls(context, n)["all_gather"] for n in (1, 4))
        # The backward passes of embedding and output read no weights.
        assert one == UNITS + 1, one
        assert four == 4 * one, (one, four)

    on_ranks({"dp_shard": 2}, body)
