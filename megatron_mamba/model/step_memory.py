"""Memory of a training step on one rank: what the layers hold (:mod:`megatron_mamba.model.memory`) and what FSDP2 does around them.

When FSDP2 allocates and frees follows its source, torch/distributed/fsdp/_fully_shard of torch 2.11 to 2.13; the names of its
methods stand beside ours. The step is walked through allocation by allocation, and its worst moment is remembered.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from functools import cache

from megatron_mamba.config import Config
from megatron_mamba.model.lm import DTYPES, master_dtype
from megatron_mamba.model.memory import Piece, measure
from megatron_mamba.parallel.dry_run import allocated

MASTERS, MOMENTS, GRADIENTS = "weights (masters)", "optimizer states", "gradients (summed)"
GATHERED, UNSHARDED, BUFFERS = "weights, gathered", "gradients, not yet summed", "FSDP buffers"
LOSS, TRANSIENT, LIBRARIES = "loss and its gradients", "temporaries", "cuBLAS workspace"

WORKSPACE = 64 << 20
"""cuBLAS's workspaces on Hopper: one for the thread of the forward pass, one for that of the backward pass."""


@dataclass
class StepMemory:
    """Bytes on one rank: now, by what they are for; the most at one time, when and of what; and at the step's milestones."""

    now: Counter[str] = field(default_factory=Counter)
    peak: int = 0
    moment: str = ""
    at_peak: dict[str, int] = field(default_factory=dict)
    largest: Counter[str] = field(default_factory=Counter)
    highest: int = 0
    """The most at one time since :meth:`mark`."""
    milestones: dict[str, int] = field(default_factory=dict)

    def hold(self, moment: str, what: str, size: int) -> None:
        """`size` more bytes of `what`, fewer if negative."""
        self.now[what] += size
        self.largest[what] = max(self.largest[what], self.now[what])
        total = self.now.total()
        self.highest = max(self.highest, total)
        if total > self.peak:
            self.peak, self.moment, self.at_peak = total, moment, {name: n for name, n in self.now.items() if n}

    def mark(self, done: str) -> None:
        """Note what there is after a part of the step, and what was the most in it; the last micro-batch's counts."""
        self.milestones |= {f"most in {done}": self.highest, f"after {done}": self.now.total()}
        self.highest = self.now.total()


@dataclass
class Unit:
    """The weights that FSDP gathers, and whose gradients it sums, at one time."""

    shapes: tuple[tuple[int, ...], ...]
    """Each weight's on a tp rank."""
    ranks: int
    """That share them."""
    root: bool = False
    """Tied embeddings: gathered once a step, for both their uses."""
    unread: bool = False
    """Embedding and output: not gathered for the backward pass, which does not read them."""
    gathering: bool = False
    gathered: bool = False
    fresh: int = 0
    """Bytes of gradients that autograd has made and FSDP has not taken over."""
    added: int = 0
    """Bytes of gradients of earlier micro-batches that are to be summed over ranks with the last one's."""
    summed: bool = False
    """Whether there are gradients summed over ranks."""

    @property
    def shards(self) -> tuple[int, ...]:
        """Elements of one rank's part of each weight."""
        return _shards(self.shapes, self.ranks)

    @property
    def shard(self) -> int:
        """Elements of one rank's part."""
        return sum(self.shards)

    @property
    def whole(self) -> int:
        """Elements of the gathered weights."""
        return self.shard * self.ranks

    def gathered_size(self, itemsize: int) -> int:
        """Bytes of the gathered weights, a tensor each."""
        return sum(allocated(shard * self.ranks * itemsize) for shard in self.shards)


@cache
def _shards(shapes: tuple[tuple[int, ...], ...], ranks: int) -> tuple[int, ...]:
    """Rows are cut into equal pieces, the last ones padded."""
    return tuple(-(-shape[0] // ranks) * math.prod(shape[1:]) for shape in shapes)


Pieces = list[tuple[str, str, Piece, Unit]]
"""The parts of the model in order of use: name, kind, what it holds, the unit of its weights."""


def model_pieces(config: Config, dp_shard: int) -> Pieces:
    """The model of `config` on `dp_shard` ranks that share its weights."""
    parts = [("embedding", "embedding"), *((f"layer {i} ({kind})", kind) for i, kind in enumerate(config.model.layers))]
    pieces: Pieces = []
    measured = {kind: measure(config, kind) for kind in ("embedding", *sorted({*config.model.layers}), "output")}
    for name, kind in [*parts, ("the loss", "output")]:
        piece = measured[kind]
        end = kind in ("embedding", "output")
        tied = end and config.model.tie_embeddings
        unit = pieces[0][3] if tied and pieces else Unit(piece.shapes, dp_shard, root=tied, unread=end and not tied)
        pieces.append((name, kind, piece, unit))
    return pieces


def units_of(pieces: Pieces) -> list[Unit]:
    """Each unit once."""
    return list({id(unit): unit for *_, unit in pieces}.values())


def step_memory(config: Config, dp_shard: int, micro_batches: int) -> StepMemory:
    """What torch's CUDA allocator holds on a rank in a step of `micro_batches` (any but a run's first step)."""
    step = _Step(config, model_pieces(config, dp_shard))
    # After the second, one micro-batch is as the other but for the last.
    count = min(micro_batches, 3)
    for i in range(count):
        step.forward()
        step.memory.mark("forward")
        step.backward(last=i == count - 1)
        step.memory.mark("backward")
    step.memory.milestones["after step"] = step.memory.milestones["optimizer"] + WORKSPACE
    return step.memory


class _Step:
    """FSDP2 and autograd going through a step."""

    def __init__(self, config: Config, pieces: Pieces) -> None:
        self.pieces, self.parallel, self.memory = pieces, config.parallel, StepMemory()
        self.moment = "between steps"
        precision = config.trainer.precision
        self.wide, self.narrow = master_dtype(precision).itemsize, DTYPES[precision].itemsize
        self.previous = self.reducing = 0
        apart = [count for _, _, piece, _ in pieces for count in piece.apart]
        sizes = [allocated(count * self.wide) for count in [*apart, *(n for unit in units_of(pieces) for n in unit.shards)]]
        self.apart = sum(sizes[: len(apart)])
        self.hold(MASTERS, sum(sizes))
        self.memory.milestones["model"] = self.memory.now.total()
        # Two moments, and the number of steps taken.
        self.hold(MOMENTS, sum(2 * size + allocated(1) for size in sizes))
        self.memory.milestones["optimizer"] = self.memory.now.total()
        self.hold(LIBRARIES, WORKSPACE)

    def hold(self, what: str, size: int) -> None:
        self.memory.hold(self.moment, what, size)

    def touch(self, what: str, size: int) -> None:
        self.hold(what, size)
        self.hold(what, -size)

    def forward(self) -> None:
        units = [unit for *_, unit in self.pieces]
        for (name, kind, piece, unit), following in zip(self.pieces, [*units[1:], None], strict=True):
            self.moment = f"forward pass of {name}"
            self.gather(unit)
            self.wait(unit, forward=True)
            if following is not None and not (unit.root or following.root):
                self.gather(following)
            self.touch(TRANSIENT, piece.forward)
            self.hold(_kept(kind), piece.kept)
            if self.parallel.reshard_after_forward and not unit.root:
                self.reshard(unit)
        self.release_previous()

    def backward(self, last: bool) -> None:
        left, units = 0, [unit for *_, unit in self.pieces]
        if not self.memory.now[GRADIENTS]:
            self.hold(GRADIENTS, self.apart)
        for (name, kind, piece, unit), following in zip(self.pieces[::-1], [*units[-2::-1], None], strict=True):
            self.moment = f"backward pass of {name}"
            if not unit.unread:
                self.gather(unit)
                self.wait(unit, forward=False)
            if following is not None and not following.unread:
                self.gather(following)
            self.hold(TRANSIENT, -left)
            self.touch(TRANSIENT, piece.backward - piece.kept)
            self.hold(_kept(kind), -piece.kept)
            left = piece.left
            self.hold(TRANSIENT, left)
            if unit.fresh:
                # Of tied embeddings: the gradients of both uses, and their sum.
                self.touch(UNSHARDED, 2 * piece.gradients)
            else:
                unit.fresh = piece.gradients
                self.hold(UNSHARDED, unit.fresh)
            if unit is not units[0]:
                self.reduce(unit, name, last)
        self.hold(TRANSIENT, -left)
        # The embedding's input has no gradient whose computation would tell FSDP that it is done.
        self.reduce(units[0], "embedding", last)
        self.hold(BUFFERS, -self.reducing)
        self.reducing = 0

    # ------------------------------------------------------------------------------------------- FSDP2's own methods

    def gather(self, unit: Unit) -> None:
        """FSDPParamGroup.unshard: begin to gather, if not begun already."""
        if not (unit.gathered or unit.gathering):
            unit.gathering = True
            if unit.ranks > 1:
                self.hold(BUFFERS, unit.whole * self.narrow)
                self.touch(BUFFERS, unit.shard * self.narrow)

    def wait(self, unit: Unit, forward: bool) -> None:
        """FSDPParamGroup.wait_for_unshard: copy the weights out of the buffer, or if there is one rank cast each."""
        if not unit.gathering:
            return
        unit.gathering, unit.gathered = False, True
        if unit.ranks == 1:
            before = 0
            for size in (allocated(math.prod(shape) * self.narrow) for shape in unit.shapes):
                cast = size if self.narrow < self.wide else 0
                self.touch(BUFFERS, before + cast)
                self.hold(GATHERED, size)
                self.touch(BUFFERS, cast)
                before = cast
        else:
            if forward:
                self.release_previous()
            self.hold(GATHERED, unit.gathered_size(self.narrow))
            if forward:
                self.previous = unit.whole * self.narrow
            else:
                self.hold(BUFFERS, -unit.whole * self.narrow)

    def release_previous(self) -> None:
        """FSDPCommContext.all_gather_state: a forward pass keeps a buffer until the next unit has arrived."""
        self.hold(BUFFERS, -self.previous)
        self.previous = 0

    def reshard(self, unit: Unit) -> None:
        """FSDPParamGroup.reshard: give up the gathered weights."""
        if unit.gathered:
            self.hold(GATHERED, -unit.gathered_size(self.narrow))
            unit.gathered = False

    def reduce(self, unit: Unit, name: str, last: bool) -> None:
        """FSDPParamGroup.post_backward and foreach_reduce: sum the unit's gradients over ranks, or keep them for later."""
        self.moment = f"sum of gradients of {name}"
        if last or self.parallel.reshard_after_forward:
            self.reshard(unit)
        if unit.added:
            self.hold(UNSHARDED, -unit.fresh)
            unit.fresh = 0
        if not last and self.parallel.reduce_gradients == "step":
            if unit.fresh:
                unit.added = sum(allocated(math.prod(shape) * self.wide) for shape in unit.shapes)
                if self.narrow < self.wide:
                    self.hold(UNSHARDED, unit.added)
                    self.hold(UNSHARDED, -unit.fresh)
                unit.fresh = 0
            return
        self.hold(BUFFERS, -self.reducing)
        self.reducing = unit.whole * self.wide
        self.hold(BUFFERS, self.reducing)
        self.hold(UNSHARDED, -unit.fresh - unit.added)
        unit.fresh = unit.added = 0
        self.hold(GRADIENTS, unit.shard * self.wide)
        if unit.ranks == 1:
            self.touch(BUFFERS, unit.whole * self.wide)
        if unit.summed:
            self.hold(GRADIENTS, -unit.shard * self.wide)
        unit.summed = True


def _kept(kind: str) -> str:
    return {"output": LOSS}.get(kind, f"kept for backward, {kind}")
