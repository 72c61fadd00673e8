"""How a model is laid over devices: the mesh's sizes, what is sharded when, and what is recomputed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from megatron_mamba.schema import ConfigError, require, require_positive

Recompute = Literal["none", "selective", "full"]
Schedule = Literal["1f1b", "interleaved", "zero_bubble", "zbv"]
Sums = Literal["step", "micro_batch"]


class SplitUnits(NamedTuple):
    """Something that tensor parallelism shares out: `units` whole pieces of the setting `field`.

    `shared`: with more ranks than units, the ranks of one unit share it. `pads`: what is added to it goes unused.
    """

    field: str
    value: int
    units: int
    what: str
    shared: bool = False
    pads: bool = False

    def fits(self, tp: int) -> bool:
        """Whether `tp` ranks can share the units out evenly."""
        return self.units % tp == 0 or (self.shared and tp % self.units == 0)


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the device mesh's dimensions (tp fastest, pp slowest), and what FSDP keeps between its uses."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = -1
    """Ranks over which FSDP2 shards parameters; -1: all that the other dimensions leave."""
    cp: int = 1
    tp: int = 1
    sequence_parallel: bool = False
    """Split the residual stream over the tp ranks by tokens, between the layers' gather and scatter."""
    reshard_after_forward: bool = True
    """Free gathered weights after a layer's forward pass and gather them again for its backward pass (ZeRO-3); false
    keeps them through the step (ZeRO-2)."""
    reduce_gradients: Sums = "step"
    """Sum gradients over data-parallel ranks once a step (least communication; between micro-batches a rank holds
    whole gradients) or after each micro-batch (a rank holds its shard only)."""
    schedule: Schedule = "1f1b"
    """Order of forward and backward passes over the pipeline. "1f1b": one stage a rank; "interleaved": several, round after
    round, and so shorter waits for more messages; "zero_bubble": the same with gradients of weights put off to where a rank
    would wait; "zbv": two stages a rank, first and last on the same one, and put off likewise."""
    stages_per_rank: int | None = None
    """Pipeline stages on each rank; default: 1 for "1f1b", 2 for the others."""
    balance: Literal["flops", "time"] = "flops"
    """What stages without borders in the pattern have alike: counted FLOPs, or seconds measured at the start."""

    def validate(self) -> None:
        require_positive(self, "parallel", "pp", "dp_replicate", "cp", "tp")
        self._validate_pipeline()
        require(self.dp_shard == -1 or self.dp_shard > 0, "parallel.dp_shard", self.dp_shard, "must be -1 or positive",
                "Use -1 to take every rank that is left")  # fmt: skip
        require(not self.sequence_parallel or self.tp > 1, "parallel.sequence_parallel", True,
                f"has nothing to split over parallel.tp = {self.tp}",
                "Set parallel.sequence_parallel=false, or parallel.tp=2 or more")  # fmt: skip

    @property
    def stages(self) -> int:
        """Number of stages of the whole pipeline."""
        return self.pp * (self.stages_per_rank or (1 if self.schedule == "1f1b" else 2))

    @property
    def defers_weights(self) -> bool:
        """Whether the schedule puts the gradients of weights off."""
        return self.schedule in ("zero_bubble", "zbv")

    def _validate_pipeline(self) -> None:
        where = f"over parallel.pp = {self.pp}"
        require(self.pp > 1 or self.schedule == "1f1b", "parallel.schedule", self.schedule, f"there is nothing to order {where}",
                "Set parallel.schedule=1f1b, or parallel.pp=2 or more")  # fmt: skip
        few, many = {"1f1b": (1, 1), "interleaved": (2, None), "zero_bubble": (1, None), "zbv": (2, 2)}[self.schedule]
        each = few if self.stages_per_rank is None else self.stages_per_rank
        require(few <= each <= (many or each), "parallel.stages_per_rank", each,
                f"parallel.schedule = {self.schedule} takes {few} on each rank{'' if many else ' or more'}",
                f"Set parallel.stages_per_rank={few}, or another parallel.schedule")  # fmt: skip
        require(self.pp == 1 or self.reduce_gradients == "step", "parallel.reduce_gradients", self.reduce_gradients,
                f"the pipeline {where} sums gradients once a step", "Set parallel.reduce_gradients=step")  # fmt: skip

    def check_micro_batches(self, field: str, value: object, size: int, count: int) -> None:
        """Refuse a batch of `size`, which the setting `field` = `value` leads to, for its `count` micro-batches, if the
        schedule cannot order them.

        "1f1b" wants one for each stage; "interleaved" and "zero_bubble" go in rounds of pp or more, equally long.
        """
        if self.pp == 1 or self.schedule == "zbv":
            return
        plain = self.schedule == "1f1b"
        fits = [n for n in range(1, 2 * max(count, self.pp)) if (n >= self.pp if plain else n % max(n // self.pp, 1) == 0)]
        near = min(fits, key=lambda n: (abs(n - count), n))
        rounds = f"one round of up to {2 * self.pp - 1}, or equally long rounds of {self.pp} or more"
        require(count in fits, field, value,
                f"a batch of {size} makes {count} micro-batches a step, where parallel.schedule = {self.schedule} over "
                f"parallel.pp = {self.pp} takes {f'{self.pp} or more' if plain else rounds}",
                f"Make it a batch of {near * (size // count)}, which makes {near}")  # fmt: skip

    def sizes(self, world_size: int) -> tuple[int, ...]:
        """Sizes of (pp, dp_replicate, dp_shard, cp, tp) on `world_size` ranks. Raises :class:`ConfigError`, with numbers
        that would do, if they do not multiply to it."""
        fixed = self.pp * self.dp_replicate * self.cp * self.tp
        dp_shard = self.dp_shard if self.dp_shard != -1 else max(world_size // fixed, 1)
        if fixed * dp_shard != world_size:
            if world_size % fixed == 0:
                remedy = f"Set parallel.dp_shard={world_size // fixed} (or -1)"
            else:
                ranks = f"a multiple of {fixed}" if self.dp_shard == -1 else f"{fixed * dp_shard}"
                remedy = f"Start {ranks} ranks, or choose sizes whose product divides {world_size}"
            raise ConfigError(
                "parallel.dp_shard",
                self.dp_shard,
                f"pp {self.pp} x dp_replicate {self.dp_replicate} x dp_shard {dp_shard} x cp {self.cp} x tp {self.tp} "
                f"= {fixed * dp_shard} ranks, but {world_size} are running",
                remedy,
            )
        return (self.pp, self.dp_replicate, dp_shard, self.cp, self.tp)

    def check_split(self, units: Iterable[SplitUnits], micro_batch_size: int, seq_length: int, halo: int) -> None:
        """Refuse a tp that cannot share out the model's `units`, a cp that cannot share out the tokens of a sequence in pieces
        of `halo` (what a convolution sees of the piece before) or more, and a piece that sequence parallelism cannot split."""
        units = list(units)
        works = [tp for tp in range(1, 2 * self.tp) if all(unit.fits(tp) for unit in units)]
        nearest = max((tp for tp in works if tp <= self.tp), default=1)
        others = [str(tp) for tp in (nearest, *[tp for tp in works if tp > self.tp][:1])]
        for unit in units:
            how = "a divisor or a multiple" if unit.shared else "a divisor"
            padded = -(-unit.value // self.tp) * self.tp
            padding = f" (a new model may pad it to {padded})" if unit.pads else ""
            require(unit.fits(self.tp), "parallel.tp", self.tp,
                    f"{unit.what} ({unit.field} = {unit.value}) cannot be shared out evenly: it takes {how} of {unit.units}",
                    f"Set parallel.tp={' or '.join(others)}, or change {unit.field}{padding}")  # fmt: skip
        require(seq_length % self.cp == 0, "parallel.cp", self.cp, f"data.seq_length = {seq_length} is not a multiple of it",
                f"Make data.seq_length a multiple of {self.cp}")  # fmt: skip
        piece = seq_length // self.cp
        require(self.cp == 1 or piece >= halo, "parallel.cp", self.cp,
                f"its pieces of {piece} tokens are shorter than the {halo} that a convolution sees of the piece before",
                f"Set parallel.cp={max(seq_length // max(halo, 1), 1)} or less")  # fmt: skip
        tokens = micro_batch_size * piece
        require(not self.sequence_parallel or tokens % self.tp == 0, "parallel.sequence_parallel", True,
                f"trainer.micro_batch_size x data.seq_length / parallel.cp = {tokens} tokens is not a multiple of "
                f"parallel.tp = {self.tp}", f"Make data.seq_length a multiple of {self.tp * self.cp}")  # fmt: skip


@dataclass(frozen=True)
class RecomputeConfig:
    """What the backward pass computes again instead of keeping (activation checkpointing), for each kind of layer.

    ``none`` keeps everything; ``selective`` keeps what the input projections wrote and computes the rest of the mixer
    again (conv, scan and gated norm; attention's core; the activation), and under sequence parallelism keeps the layer's
    input split and gathers it again; ``full`` keeps the layer's input only.
    """

    mamba: Recompute = "none"
    mamba2: Recompute = "none"
    attention: Recompute = "none"
    mlp: Recompute = "none"
