"""What a layer sends over cp ranks, counted in real collectives: for scans nothing that grows with the sequence.

``--slow`` counts it for 64K tokens too.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from harness import on_ranks
from megatron_mamba.model.lm import build
from megatron_mamba.model.module import SequenceInfo
from megatron_mamba.parallel import ring_attention
from megatron_mamba.parallel.context import ParallelContext
from tiny import tiny

pytestmark = pytest.mark.ranks

RANKS, LENGTHS, LONG = 4, (1024, 8192), 65536
MODELS = {kind: tiny(kind, vocab_size=60, mamba2={"d_inner": 64}) for kind in "Mm*-"}
WIDTH = 4
"""Bytes of an element: float32, also of states and of gradients."""


class Sent(TorchDispatchMode):
    """Counts the bytes that this rank sends to others."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            name = func.name().split("::")[1].split(".")[0]
            if "alltoall" in name:
                sent, to = args[1], args[4]
                self.bytes["all-to-all"] += (sum(to) - to[dist.get_rank()]) * sent.element_size()
            elif "allgather" in name:
                self.bytes["all-gather"] += args[1].nbytes * (RANKS - 1)
            else:
                self.bytes[name] += 1 << 60  # nothing else is expected
        return func(*args, **(kwargs or {}))


def sent_by_a_layer(kind: str, length: int, context: ParallelContext) -> int:
    """Bytes that this rank sends in the forward and backward pass of a layer over sequences of `length`."""
    config = MODELS[kind]
    layer = build(config, context, device="meta").to_empty(device="cpu").layers
    layer = next(iter(layer.values() if isinstance(layer, torch.nn.ModuleDict) else layer))
    for parameter in layer.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    piece = length // RANKS
    ring = ring_attention.schedule(1, piece, None, context) if kind == "*" else None
    info = SequenceInfo(1, piece, torch.device("cpu"), ring=ring)
    x = torch.full((piece, config.hidden_size), 0.1, requires_grad=True)
    with Sent() as sent:
        out: Tensor = layer(x, info, None)
        out.backward(torch.ones_like(out))
    assert torch.isfinite(out).all()
    return sum(sent.bytes.values())


def measured(lengths: dict[str, tuple[int, ...]]) -> dict[str, list[list[int]]]:
    """By kind and length, what each rank sends."""
    with tempfile.TemporaryDirectory() as folder:

        def body(context: ParallelContext) -> None:
            found = {kind: [sent_by_a_layer(kind, length, context) for length in some] for kind, some in lengths.items()}
            torch.save(found, f"{folder}/{context.global_rank}")

        on_ranks({"cp": RANKS}, body)
        ranks = [torch.load(f"{folder}/{rank}") for rank in range(RANKS)]
    return {kind: [[rank[kind][i] for rank in ranks] for i in range(len(some))] for kind, some in lengths.items()}


def halo_and_states(kind: str, rank: int) -> int:
    """Inputs of the convolution to one neighbour there and back, a state and its decay to every other rank each way."""
    m, m2 = MODELS[kind].mamba, MODELS[kind].mamba2
    if kind == "m":
        halo, state = (m.conv_width - 1) * m.d_inner, m.d_inner * (m.state_size + 1)
    else:
        halo = (m2.conv_width - 1) * (m2.d_inner + 2 * m2.n_groups * m2.state_size)
        state = m2.n_heads * (m2.head_dim * m2.state_size + 1)
    neighbours = (rank < RANKS - 1) + (rank > 0)
    return WIDTH * (neighbours * halo + 2 * (RANKS - 1) * state)


def ring(length: int, rank: int) -> int:
    """Keys and values round the ring, their gradients once more, and what is dealt out: q, k, v, the output and back."""
    a, piece = MODELS["*"].attention, length // RANKS
    kv, q = 2 * a.n_kv_heads * a.head_dim, a.n_heads * a.head_dim
    kept = len({2 * rank, 2 * rank + 1} & {rank, 2 * RANKS - 1 - rank})
    dealt = piece * (2 - kept) // 2 * ((kv + q) + q) * 2
    return WIDTH * (((RANKS - 1) + (RANKS - 1) + RANKS) * piece * kv + dealt)


def all_to_all(kind: str, length: int) -> int:
    """What sending activations instead would take, forward and backward: every rank gets all tokens of a share of the heads
    (z, x, B, C and dt in, y out), and so a rank sends all but its share of its piece."""
    m, m2 = MODELS[kind].mamba, MODELS[kind].mamba2
    mamba2 = 3 * m2.d_inner + 2 * m2.n_groups * m2.state_size + m2.n_heads
    a_token = 4 * m.d_inner + 2 * m.state_size if kind == "m" else mamba2
    return WIDTH * 2 * length // RANKS * a_token * (RANKS - 1) // RANKS


def test_bytes_sent_by_a_layer(slow: bool, record_property: Callable[[str, object], None]) -> None:
    # The work of attention is quadratic.
    lengths = {kind: (*LENGTHS, LONG) if slow and kind != "*" else LENGTHS for kind in MODELS}
    found = measured(lengths)
    for rank in range(RANKS):
        for kind in "Mm":
            assert [at[rank] for at in found[kind]] == [halo_and_states(kind, rank)] * len(lengths[kind]), (kind, rank, found[kind])
        assert [at[rank] for at in found["*"]] == [ring(length, rank) for length in LENGTHS], (rank, found["*"])
        assert [at[rank] for at in found["-"]] == [0] * len(lengths["-"])
    lines = {}
    for kind in "Mm":
        ours, theirs = ([max(at) for at in found[kind]], [all_to_all(kind, length) for length in lengths[kind]])
        lines[kind] = {length: (a, b) for length, a, b in zip(lengths[kind], ours, theirs, strict=True)}
        assert all(a * 8 < b for a, b in list(lines[kind].values())[1:])
    record_property("cp traffic", lines)
