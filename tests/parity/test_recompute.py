"""Recomputation: what a layer keeps for its backward pass, what that pass computes again, and that gradients stay the same."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harness import on_ranks
from mamba_kernels import rope_tables
from megatron_mamba.config import RecomputeConfig
from megatron_mamba.layout import Recompute
from megatron_mamba.model import LanguageModel, build
from megatron_mamba.model.lm import initialize
from megatron_mamba.model.module import SequenceInfo
from megatron_mamba.parallel import fsdp
from megatron_mamba.parallel.context import ParallelContext
from tiny import random_tokens, tiny

pytestmark = pytest.mark.ranks

BATCH, LENGTH = 2, 12
T = BATCH * LENGTH
SIZES = {"vocab_size": 60, "mlp": {"activation": "swiglu"}}
MODELS = {pattern: tiny(pattern, **SIZES) for pattern in "mM*-"}
D = MODELS["m"].hidden_size
PACKED = {"m": 2 * 40, "M": 2 * 48 + 2 * 2 * 10 + 6, "*": (4 + 2 * 2) * 8, "-": 2 * 40}
"""Channels that a layer's input projections write."""
AGAIN = {
    "none": dict.fromkeys(MODELS, 0),
    "selective": dict.fromkeys(MODELS, 0) | {"m": 2},
    "full": dict.fromkeys(MODELS, 1) | {"m": 3},
}
"""Matrix products of two dimensions that the backward pass repeats: Mamba's x_proj and dt_proj lie between the projections;
the output projection, whose result no gradient needs, is never among them."""
ELEMENT = 8
"""Bytes, in float64."""


class Watch(TorchDispatchMode):
    """Counts matrix products and remembers the storages that operations made."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def alive(self, apart_from: set[int]) -> int:
        """Bytes of those storages that still exist."""
        return sum(size for key, (ref, size) in self.made.items() if not ref.expired() and key not in apart_from)


def storages(module: nn.Module, *tensors: Tensor) -> set[int]:
    """Where the module's parameters and other tensors lie."""
    return {fsdp.local(t).untyped_storage()._cdata for t in (*module.parameters(), *tensors)}


@contextmanager
def saving(apart_from: set[int]) -> Iterator[dict[int, int]]:
    """Bytes of each storage that autograd saves while active."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in apart_from:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def unsharded(pattern: str, context: ParallelContext, recompute: Recompute) -> LanguageModel:
    """The model without FSDP, in float64."""
    kinds = RecomputeConfig(recompute, recompute, recompute, recompute)
    model = build(tiny(pattern, **SIZES), context, precision="fp64", device="meta", recompute=kinds).to_empty(device="cpu")
    initialize(model, 0)
    return model


@dataclass
class Pass:
    """A layer's forward and backward pass: bytes saved for and held until the backward pass, matrix products of each pass,
    output and gradients."""

    saved: int
    held: int
    forward: int
    backward: int
    results: dict[str, Tensor] = field(repr=False)


def run(pattern: str, context: ParallelContext, recompute: Recompute) -> Pass:
    layer = unsharded(pattern, context, recompute).layers["0"]
    tokens = T // context.size("tp") if context.sequence_parallel else T
    x = torch.randn(tokens, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    starts, rotary = torch.arange(LENGTH).expand(BATCH, -1) % 5 == 0, MODELS[pattern].attention
    rope = rope_tables(torch.arange(LENGTH), rotary.rotary_dim, rotary.rope_base, torch.float64)
    info = SequenceInfo(BATCH, LENGTH, x.device, starts, rope=rope)
    with Watch() as forward, saving(storages(layer, starts, *rope)) as kept:
        out = layer(x, info, None)
    saved, apart = sum(kept.values()), storages(layer, starts, *rope, out)
    # Gloo's threads let go of a tensor a moment after its collective has ended.
    patience = time.monotonic() + 60
    while (held := forward.alive(apart)) > saved and time.monotonic() < patience:
        time.sleep(0.01)
    with Watch() as backward:
        out.backward(x.detach().flip(0))
    gradients = {name: fsdp.local(p.grad) for name, p in layer.named_parameters()}
    return Pass(saved, held, forward.products, backward.products, gradients | {"output": out.detach(), "x": x.grad})


def assert_recompute(context: ParallelContext, pattern: str) -> None:
    tokens = T // context.size("tp") if context.sequence_parallel else T
    none, selective, full = (run(pattern, context, recompute) for recompute in ("none", "selective", "full"))
    packed = T * PACKED[pattern] // context.size("tp")
    # The layer's input with a number a token for the norm, the normed input of the projections, and what they wrote.
    assert selective.saved == ELEMENT * (tokens * (2 * D + 1) + packed), selective
    assert full.saved == ELEMENT * tokens * D, full
    assert none.saved > selective.saved > full.saved, (none, selective, full)
    for recompute, found in (("none", none), ("selective", selective), ("full", full)):
        assert found.held == found.saved, (recompute, found)
        assert found.forward == none.forward, (recompute, found)
        assert found.backward == none.backward + AGAIN[recompute][pattern], (recompute, found, none)
        for name, value in none.results.items():
            assert value.norm() > 0, name
            assert torch.equal(found.results[name], value), (recompute, name)


def test_memory_and_work() -> None:
    """Bytes exactly, no product too many, and the same bits, of every kind of layer."""
    on_ranks({}, lambda context: [assert_recompute(context, pattern) for pattern in MODELS] and None)


def test_memory_and_work_of_split_layers() -> None:
    """With sequence parallelism the input is kept split, though the projections read all of it."""

    def body(context: ParallelContext) -> None:
        for pattern in MODELS:
            assert_recompute(context, pattern)
            assert_recompute(replace(context, sequence_parallel=True), pattern)

    on_ranks({"tp": 2}, body)


def decode(context: ParallelContext, recompute: Recompute) -> dict[str, Tensor]:
    """Logits with a cache and without, the cache's states, and gradients through the last piece of the decoding."""
    tokens = random_tokens(BATCH, LENGTH, vocab_size=60)
    model = unsharded("mM*-", context, recompute)
    cache = model.new_cache(BATCH, LENGTH, torch.float64)
    *pieces, last = tokens.split([5, 1, 1, 5], dim=1)
    with torch.no_grad(), saving(storages(model)) as kept:
        found = {"whole": model(tokens)}
        found["pieces"] = torch.cat([model(piece, cache=cache) for piece in pieces], dim=1)
    assert not kept
    logits = model(last, cache=cache)
    logits.backward(torch.ones_like(logits))
    found["pieces"] = torch.cat([found["pieces"], logits.detach()], dim=1)
    states = [vars(state) for state in cache.layers if state is not None]
    found |= {f"{name} of {i}": value.detach() for i, state in enumerate(states) for name, value in state.items()}
    return found | {name: fsdp.local(p.grad) for name, p in model.named_parameters()}


def test_decoding() -> None:
    """Without gradients nothing is kept; a cache is filled and advanced once, and gradients go through it."""

    def body(context: ParallelContext) -> None:
        none = decode(context, "none")
        assert torch.allclose(none["pieces"], none["whole"], rtol=1e-10, atol=0)
        for recompute in ("selective", "full"):
            found = decode(context, recompute)
            assert found.keys() == none.keys()
            wrong = [name for name, value in none.items() if not torch.equal(found[name], value)]
            assert not wrong, (recompute, wrong)

    on_ranks({}, body)
