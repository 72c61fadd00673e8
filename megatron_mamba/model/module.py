"""A module whose parameters come from the table, and what travels beside the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_mamba.layout import Recompute
from megatron_mamba.model.parameters import ParameterSpec
from megatron_mamba.parallel import tensor
from megatron_mamba.parallel.context import ParallelContext
from megatron_mamba.parallel.linear import column_parallel
from megatron_mamba.parallel.ring_attention import Ring


class TableModule(nn.Module):
    """Registers its rows of the parameter table as DTensors over tp, and hands out this rank's part of each."""

    recompute: Recompute = "none"

    def __init__(self, rows: Sequence[ParameterSpec], context: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__()
        self.context = context
        self.rows = {row.name: row for row in rows}
        for row in rows:
            parameter = nn.Parameter(tensor.declare(row.shape, row.split_dim, row.units, context, dtype))
            self.register_parameter(row.name, parameter)

    def local(self, name: str) -> Tensor:
        """This rank's part of parameter `name` as a plain tensor: its slice, or the whole of a replicated one."""
        row = self.rows[name]
        return tensor.local_part(getattr(self, name), row.split_dim, row.units, self.context)

    def local_units(self, name: str) -> int:
        """How many of the units (heads, groups, channels) of parameter `name` this rank computes with."""
        row = self.rows[name]
        return tensor.local_units(row.split_dim, row.units, self.context)

    def project(self, x: Tensor, *names: str) -> Tensor:
        """``x @ concat(parameters `names`).T``, from x `[T, D]` (`[t, D]` with sequence parallelism) to `[T, C]`. If the mixer
        is recomputed selectively, x is kept for the backward pass as it is given, and gathered again there."""
        weights = [self.local(name) for name in names]
        return column_parallel(x, weights, self.context, gather_again=self.recompute == "selective")

    def inside(self, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """``function(*inputs)``, what lies between a mixer's projections: computed again in the backward pass if the mixer
        is recomputed selectively."""
        return recomputed(function, *inputs) if self.recompute == "selective" else function(*inputs)


def recomputed(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """``function(*inputs)`` of which the backward pass keeps the inputs only and computes the rest again; with a decoding
    state, which a second run would advance again, it keeps everything."""
    if any(isinstance(value, RecurrentState | KeyValueState) for value in inputs):
        return function(*inputs)
    result: Tensor = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return result


@dataclass
class SequenceInfo:
    """What mixers need to know about the tokens beside their hidden states.

    The residual stream is `[T, D]` with T = batch x length; `document_start` `[B, S]` bool is True at the first token of
    every document (None: one document a row); `offset` tokens of each row are already in the caches; `start` `[B]`
    int64 is the position of each row's first real token (None: 0), positions before it are padding. Over cp ranks the
    batch holds pieces of sequences, which begin at position `offset`, and `ring` says what attention computes.
    """

    batch: int
    length: int
    device: torch.device
    document_start: Tensor | None = None
    offset: int = 0
    start: Tensor | None = None
    rope: tuple[Tensor, Tensor] | None = field(default=None, repr=False)
    ring: Ring | None = field(default=None, repr=False)

    @cached_property
    def documents(self) -> list[list[int]]:
        """Lengths of the documents (or pieces of documents) in each row, in order."""
        if self.document_start is None:
            return [[self.length]] * self.batch
        rows = []
        for row in self.document_start.cpu():
            borders = [0, *(row[1:].nonzero().flatten() + 1).tolist(), self.length]
            rows.append([b - a for a, b in pairwise(borders)])
        return rows


@dataclass
class RecurrentState:
    """Decoding state of a Mamba or Mamba-2 mixer: conv `[B, W-1, C]` inputs oldest first, ssm `[B, ...]` fp32."""

    conv: Tensor
    ssm: Tensor


@dataclass
class KeyValueState:
    """Decoding state of an attention mixer: keys and values `[B, S_max, K, P]`, filled up to the cache's offset."""

    key: Tensor
    value: Tensor


LayerState = RecurrentState | KeyValueState | None


@dataclass
class Cache:
    """Decoding state of the whole model: one entry a layer, tokens seen so far, first real position of each row."""

    layers: list[LayerState]
    capacity: int
    offset: int = 0
    start: Tensor | None = None
