"""How a model is laid over devices: the mesh's sizes, what is sharded when, and what is recomputed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from megatron_mamba.schema import ConfigError, require, require_positive

Recompute = Literal["none", "selective", "full"]


class SplitUnits(NamedTuple):
    """Something that tensor parallelism shares out: `units` whole pieces of the setting `field`.

    `shared`: with more ranks than units, the ranks of one unit share it.
    """

    field: str
    value: int
    units: int
    what: str
    shared: bool = False

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
    reduce_gradients: Literal["step", "micro_batch"] = "step"
    """Sum gradients over data-parallel ranks once a step (least communication; between micro-batches a rank holds
    whole gradients) or after each micro-batch (a rank holds its shard only)."""

    def validate(self) -> None:
        require_positive(self, "parallel", "pp", "dp_replicate", "cp", "tp")
        require(self.dp_shard == -1 or self.dp_shard > 0, "parallel.dp_shard", self.dp_shard, "must be -1 or positive",
                "Use -1 to take every rank that is left")  # fmt: skip
        for name in ("pp", "cp"):
            value = getattr(self, name)
            require(value == 1, f"parallel.{name}", value, "this release runs on tensor- and data-parallel ranks only",
                    f"Set parallel.{name}=1 and raise parallel.tp, parallel.dp_shard or parallel.dp_replicate")  # fmt: skip
        require(not self.sequence_parallel or self.tp > 1, "parallel.sequence_parallel", True,
                f"has nothing to split over parallel.tp = {self.tp}",
                "Set parallel.sequence_parallel=false, or parallel.tp=2 or more")  # fmt: skip

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

    def check_split(self, units: Iterable[SplitUnits], micro_batch_tokens: int) -> None:
        """Refuse a tp that cannot share out the model's `units`, or a micro-batch's tokens under sequence parallelism."""
        units = list(units)
        works = [tp for tp in range(1, 2 * self.tp) if all(unit.fits(tp) for unit in units)]
        nearest = max((tp for tp in works if tp <= self.tp), default=1)
        others = [str(tp) for tp in (nearest, *[tp for tp in works if tp > self.tp][:1])]
        for unit in units:
            how = "a divisor or a multiple" if unit.shared else "a divisor"
            require(unit.fits(self.tp), "parallel.tp", self.tp,
                    f"{unit.what} ({unit.field} = {unit.value}) cannot be shared out evenly: it takes {how} of {unit.units}",
                    f"Set parallel.tp={' or '.join(others)}, or change {unit.field}")  # fmt: skip
        require(not self.sequence_parallel or micro_batch_tokens % self.tp == 0, "parallel.sequence_parallel", True,
                f"trainer.micro_batch_size x data.seq_length = {micro_batch_tokens} tokens is not a multiple of "
                f"parallel.tp = {self.tp}", f"Make data.seq_length a multiple of {self.tp}")  # fmt: skip


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
