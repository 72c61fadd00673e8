"""Memory of a training step on one rank: what the layers hold (:mod:`megatron_mamba.model.memory`) and what FSDP2 does around them.

When FSDP2 allocates and frees follows its source, torch/distributed/fsdp/_fully_shard of torch 2.11 to 2.15; the names of its
methods stand beside ours. The step is walked through allocation by allocation, and its worst moment is remembered.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import torch

from megatron_mamba.config import Config
from megatron_mamba.model.lm import DTYPES, master_dtype
from megatron_mamba.model.memory import Piece, measure
from megatron_mamba.model.schedule import ROUNDS
from megatron_mamba.model.stages import Stage, rank_of
from megatron_mamba.parallel import torch_private
from megatron_mamba.parallel.dry_run import allocated, pipeline_actions

MASTERS, MOMENTS, GRADIENTS = "weights (masters)", "optimizer states", "gradients (summed)"
GATHERED, UNSHARDED, BUFFERS = "weights, gathered", "gradients, not yet summed", "FSDP buffers"
LOSS, TRANSIENT, LIBRARIES = "loss and its gradients", "temporaries", "cuBLAS workspace"
BORDERS, DEFERRED = "between pipeline stages", "kept for gradients of weights"

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


def model_pieces(config: Config, ranks: int, stage: Stage | None = None) -> Pieces:
    """A stage of the model of `config` (default: all of it) on `ranks` ranks that share its weights."""
    kinds = config.model.layers
    stage = stage or Stage(0, 1, range(len(kinds)))
    parts = [(f"layer {i} ({kinds[i]})", kinds[i]) for i in stage.layers]
    parts = [("embedding", "embedding")] * stage.is_first + parts + [("the loss", "output")] * stage.is_last
    pieces: Pieces = []
    measured = {kind: measure(config, kind) for kind in sorted({kind for _, kind in parts})}
    for name, kind in parts:
        piece = measured[kind]
        end = kind in ("embedding", "output")
        tied = end and config.model.tie_embeddings
        unit = pieces[0][3] if tied and pieces else Unit(piece.shapes, ranks, root=tied, unread=end and not tied)
        pieces.append((name, kind, piece, unit))
    return pieces


def units_of(pieces: Pieces) -> list[Unit]:
    """Each unit once."""
    return list({id(unit): unit for *_, unit in pieces}.values())


def step_memory(
    config: Config, ranks: int, micro_batches: int, stages: Sequence[Stage] = (), pp_rank: int = 0
) -> StepMemory:
    """What torch's CUDA allocator holds on a rank in a step of `micro_batches` (any but a run's first step).

    `ranks`: that share each weight, those of dp_shard and cp. `stages`: of a pipeline, all of them; `pp_rank`'s are looked at.
    """
    if len(stages) > 1:
        return _pipelined(config, ranks, micro_batches, stages, pp_rank)
    step = _Step(config, model_pieces(config, ranks))
    # After the second, one micro-batch is as the other but for the last.
    count = min(micro_batches, 3)
    for i in range(count):
        step.forward()
        step.memory.mark("forward")
        step.backward(last=i == count - 1)
        step.memory.mark("backward")
    step.memory.milestones["after step"] = step.memory.milestones["optimizer"] + WORKSPACE
    return step.memory


def _pipelined(config: Config, ranks: int, micro_batches: int, stages: Sequence[Stage], pp_rank: int) -> StepMemory:
    """A rank of a pipeline goes through its schedule, as torch/distributed/pipelining/stage.py of torch 2.11 to 2.15 does: until
    2.14 a stage has a buffer for every micro-batch that it receives, and for every gradient; weights once gathered for a
    backward pass stay until a forward pass has used them."""
    parallel = config.parallel
    here = [stage for stage in stages if rank_of(stage.index, parallel) == pp_rank]
    steps: dict[int, _Step] = {}
    memory = StepMemory()
    for stage in here:
        steps[stage.index] = _Step(config, model_pieces(config, ranks, stage), memory, stage)
    memory.milestones = {"optimizer": memory.now.total()}
    memory.hold("between steps", LIBRARIES, WORKSPACE)
    buffers = sum(step.receive(micro_batches) for step in steps.values())
    memory.milestones["after step"] = memory.milestones["optimizer"] + WORKSPACE + buffers
    # A schedule goes on as it began.
    count = min(micro_batches, ROUNDS * parallel.pp)
    to_come = Counter({index: count for index in steps})
    for kind, index, _ in pipeline_actions(parallel.schedule, parallel.pp, len(stages), count)[pp_rank]:
        step = steps[index]
        if kind == "F":
            step.forward()
        elif kind in ("B", "I"):
            step.backward(last=False)
        elif kind == "UNSHARD":
            step.gather_all()
        elif kind == "RESHARD":
            step.reshard_all()
        elif torch_private.FREES_EARLY:
            step.pass_on(kind)
        if kind == "W" or (kind == "B" and parallel.defers_weights):
            step.compute_weights()
        to_come[index] -= kind in ("B", "W")
        if not to_come[index]:
            to_come[index] = -1
            step.reduce_all()
    return memory


class _Step:
    """FSDP2 and autograd going through a step of the model, or of one stage of a pipeline."""

    def __init__(self, config: Config, pieces: Pieces, memory: StepMemory | None = None, stage: Stage | None = None) -> None:
        self.pieces, self.parallel, self.memory = pieces, config.parallel, memory or StepMemory()
        self.stage = stage or Stage(0, 1, range(len(config.model.layers)))
        ranks = [rank_of(i, self.parallel) for i in range(self.stage.count)]
        at = self.stage.index
        self.previous_is_here, self.next_is_here = ranks[at] in ranks[at - 1 : at], ranks[at] in ranks[at + 1 : at + 2]
        self.moment = "between steps"
        precision = config.trainer.precision
        self.tokens = config.trainer.micro_batch_size * config.data.seq_length // self.parallel.cp
        rows = self.tokens // (self.parallel.tp if self.parallel.sequence_parallel else 1)
        self.stream = allocated(rows * config.model.hidden_size * DTYPES[precision].itemsize)
        self.wide, self.narrow = master_dtype(precision).itemsize, DTYPES[precision].itemsize
        self.previous = self.reducing = self.sent = 0
        apart = [count for _, _, piece, _ in pieces for count in piece.apart]
        sizes = [allocated(count * self.wide) for count in [*apart, *(n for unit in units_of(pieces) for n in unit.shards)]]
        self.apart = sum(sizes[: len(apart)])
        self.hold(MASTERS, sum(sizes))
        self.memory.milestones["model"] = self.memory.now.total()
        # Two moments, and the number of steps taken.
        self.hold(MOMENTS, sum(2 * size + allocated(1) for size in sizes))
        self.memory.milestones["optimizer"] = self.memory.now.total()
        if memory is None:
            self.hold(LIBRARIES, WORKSPACE)

    def hold(self, what: str, size: int) -> None:
        self.memory.hold(self.moment, what, size)

    def touch(self, what: str, size: int) -> None:
        self.hold(what, size)
        self.hold(what, -size)

    def forward(self) -> None:
        units = [unit for *_, unit in self.pieces]
        held = 0 if self.stage.is_first else self.stream
        for (name, kind, piece, unit), following in zip(self.pieces, [*units[1:], None], strict=True):
            self.moment = f"forward pass of {name}"
            self.gather(unit)
            self.wait(unit, forward=True)
            if following is not None and not (unit.root or following.root):
                self.gather(following)
            self.touch(TRANSIENT, piece.forward - held)
            self.hold(_kept(kind), piece.kept - held)
            held = 0
            if self.parallel.reshard_after_forward and not unit.root:
                self.reshard(unit)
        self.hold(BORDERS, 0 if self.stage.is_last or (self.next_is_here and not torch_private.FREES_EARLY) else self.stream)
        self.release_previous()

    def backward(self, last: bool) -> None:
        left, units = 0, [unit for *_, unit in self.pieces]
        if not self.memory.now[GRADIENTS]:
            self.hold(GRADIENTS, self.apart)
        arrived = 0 if self.stage.is_last else self.stream
        for (name, kind, piece, unit), following in zip(self.pieces[::-1], [*units[-2::-1], None], strict=True):
            self.moment = f"backward pass of {name}"
            if not unit.unread:
                self.gather(unit)
                self.wait(unit, forward=False)
            if following is not None and not following.unread:
                self.gather(following)
            self.hold(TRANSIENT, -left)
            held = 0 if self.stage.is_first or unit is not units[0] else self.stream
            # Of tied embeddings autograd adds up the gradients of both uses first.
            adds = torch_private.FREES_EARLY and not unit.root and (unit.added > 0 or self.adds_up(last))
            most = piece.backward if not adds else piece.adding if unit.added else piece.widening
            self.touch(TRANSIENT, most - piece.kept - arrived)
            arrived = 0
            self.hold(_kept(kind), held - piece.kept)
            self.hold(DEFERRED, piece.deferred)
            left = piece.left
            self.hold(TRANSIENT, left)
            if piece.deferred:
                continue
            if adds:
                self.add_up(unit)
            elif unit.fresh:
                # Of tied embeddings: the gradients of both uses, and their sum.
                self.touch(UNSHARDED, 2 * piece.gradients)
            else:
                unit.fresh = piece.gradients
                self.hold(UNSHARDED, unit.fresh)
            if unit is not units[0]:
                self.reduce(unit, name, last)
        self.hold(TRANSIENT, -left)
        if units[0].fresh or (last and units[0].added > 0):
            # The embedding's input has no gradient whose computation would tell FSDP that it is done.
            self.reduce(units[0], self.pieces[0][0], last)
        self.hold(BUFFERS, -self.reducing)
        self.reducing = 0
        self.release_borders()
        # torch's 1F1B keeps what it sends to the stage before until the next one is there.
        self.hold(BORDERS, -self.sent)
        self.sent = left if self.parallel.schedule == "1f1b" and not self.stage.is_first else 0
        self.hold(BORDERS, self.sent)

    def compute_weights(self) -> None:
        """The gradients of weights that a backward pass has put off."""
        self.moment = "gradients of weights"
        put_off = [(name, piece, unit) for name, _, piece, unit in self.pieces[::-1] if piece.deferred]
        for _, piece, unit in put_off:
            self.touch(TRANSIENT, piece.weights)
            unit.fresh = piece.gradients
            self.hold(UNSHARDED, unit.fresh)
        self.hold(DEFERRED, -sum(piece.deferred for _, piece, _ in put_off))
        for name, _, unit in put_off:
            self.reduce(unit, name, last=False)

    def release_borders(self) -> None:
        """After a backward pass: what came from other stages, and what was kept for it."""
        kept_output = not self.stage.is_last
        if not torch_private.FREES_EARLY:
            self.hold(BORDERS, -self.stream * (kept_output and not self.next_is_here))
            return
        # A stage on the same rank goes on with the output; what puts gradients of weights off may need it.
        kept_output = kept_output and (self.next_is_here or self.parallel.defers_weights)
        received = (not self.stage.is_first and not self.previous_is_here) + (not self.stage.is_last)
        self.hold(BORDERS, -self.stream * (received + kept_output))
        if not self.stage.is_first and self.parallel.schedule != "1f1b":
            # The gradient of the input is sent, or it is what the stage before receives.
            self.hold(BORDERS, self.stream)

    def pass_on(self, kind: str) -> None:
        """From torch 2.15 on: begin to receive a residual stream or its gradient, or give up one that has been sent."""
        if kind in ("RECV_F", "RECV_B"):
            self.hold(BORDERS, self.stream)
        elif kind == "WAIT_SEND_B" or not self.parallel.defers_weights:
            self.hold(BORDERS, -self.stream)

    def receive(self, micro_batches: int) -> int:
        """Make what receives residual streams and their gradients from other stages, and stays: returns its bytes. Put all
        token ids and labels together."""
        count = 0 if torch_private.FREES_EARLY else micro_batches
        buffers = count * self.stream * (2 - self.stage.is_first - self.stage.is_last)
        self.hold(BORDERS, buffers)
        self.hold(BORDERS, micro_batches * self.tokens * torch.int64.itemsize * (1 + self.stage.is_first))
        return buffers

    def gather_all(self) -> None:
        """Gather the weights of the whole stage."""
        self.moment = "before the stage's first pass"
        for *_, unit in self.pieces:
            self.gather(unit)
        for *_, unit in self.pieces:
            self.wait(unit, forward=False)

    def reshard_all(self) -> None:
        """Give up the gathered weights of the whole stage."""
        for *_, unit in self.pieces:
            self.reshard(unit)

    def reduce_all(self) -> None:
        """Sum the gradients of all micro-batches over ranks."""
        self.hold(BORDERS, -self.sent)
        self.sent = 0
        for name, _, _, unit in self.pieces:
            self.reduce(unit, name, last=True)
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

    def adds_up(self, last: bool) -> bool:
        """Whether gradients are kept for those of later micro-batches, in the dtype in which they are summed."""
        return not last and self.parallel.reduce_gradients == "step"

    def add_up(self, unit: Unit) -> None:
        """Make room for the sum of a unit's gradients over micro-batches, if there is none yet."""
        if not unit.added:
            unit.added = sum(allocated(math.prod(shape) * self.wide) for shape in unit.shapes)
            self.hold(UNSHARDED, unit.added)

    def reduce(self, unit: Unit, name: str, last: bool) -> None:
        """FSDPParamGroup.post_backward and foreach_reduce: sum the unit's gradients over ranks, or keep them for later."""
        self.moment = f"sum of gradients of {name}"
        if last or (self.parallel.reshard_after_forward and self.stage.count == 1):
            self.reshard(unit)
        if unit.added:
            self.hold(UNSHARDED, -unit.fresh)
            unit.fresh = 0
        if self.adds_up(last):
            if unit.fresh and self.narrow < self.wide:
                self.add_up(unit)
                self.hold(UNSHARDED, -unit.fresh)
            elif unit.fresh:
                unit.added = unit.fresh
            unit.fresh = 0
            return
        self.hold(BUFFERS, -self.reducing)
        self.reducing = unit.whole * self.wide
        self.hold(BUFFERS, self.reducing)
        self.hold(UNSHARDED, -unit.fresh - unit.added)
        unit.fresh = unit.added = 0
        self.hold(GRADIENTS, unit.shard * self.wide)
        if unit.ranks == 1 and not torch_private.FREES_EARLY:
            self.touch(BUFFERS, unit.whole * self.wide)
        if unit.summed:
            self.hold(GRADIENTS, -unit.shard * self.wide)
        unit.summed = True


def _kept(kind: str) -> str:
    return {"output": LOSS}.get(kind, f"kept for backward, {kind}")
