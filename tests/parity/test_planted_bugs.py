"""What the comparison of a mesh with one rank is worth: mistakes of parallel code, planted one by one, must show in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from harness import Case, Result, compare_training, train_alone
from mamba_kernels.mamba2_mixer import reference as mixer_reference
from mamba_kernels.selective_scan import reference as scan_reference
from mamba_kernels.ssd import reference as ssd_reference
from megatron_mamba.model import LanguageModel, attention, lm, mamba, mamba2, mlp
from megatron_mamba.parallel import collectives, fsdp, linear, norms, ring_attention, sequence, tensor, vocab
from megatron_mamba.parallel.context import ParallelContext
from tiny import tiny

pytestmark = pytest.mark.ranks

MIXER_MODULES = {"m": mamba, "M": mamba2, "*": attention, "-": mlp}
MODELS = {
    pattern: tiny(pattern, vocab_size=60, mamba2={"d_inner": 64}, mlp={"activation": "swiglu"})
    for pattern in [*MIXER_MODULES, "M*-"]
} | {"four groups": tiny("M", vocab_size=60, mamba2={"d_inner": 64, "n_groups": 4})}
PLAIN = Case(MODELS["M"], batch=8, steps=1)
"""One step shows them all."""


def keep(x: Tensor, *_: object, **__: object) -> Tensor:
    """In place of a collective: what this rank has."""
    return x


def without(module: Any, **functions: Callable[..., Any]) -> AbstractContextManager[object]:
    """`module`, which calls its collectives by their module's name, with other ones for `functions`."""
    return patch.object(module, "collectives", SimpleNamespace(**vars(collectives) | functions))


def pending(x: Tensor, _: object) -> collectives.Pending:
    return collectives.Pending(x, None)


# ---------------------------------------------------------------------------------------------------------- gradients


def only_fsdp_sums(apart: object, partial_over_tp: Iterable[nn.Parameter], context: ParallelContext) -> None:
    SUM_REPLICATED([], partial_over_tp, context)


def sync_all_but_the_last(root: Any, last: bool, _: object) -> None:
    root.set_requires_gradient_sync(not last)


def no_replicas(root: Any, last: bool, context: ParallelContext) -> None:
    LAST_BACKWARD(root, last, context)
    root.set_requires_all_reduce(False)


SUM_REPLICATED, LAST_BACKWARD = fsdp.sum_replicated_gradients, fsdp.last_backward


# --------------------------------------------------------------------------------------------------- layers and slices


def own_rows(x: Tensor, group: Any) -> collectives.Pending:
    """A scatter that does not sum."""
    return collectives.Pending(x.chunk(group.size())[group.rank()].contiguous(), None)


def other_order(x: Tensor, group: Any) -> collectives.Pending:
    """A gather that puts this rank's rows last."""
    whole = START_GATHER(x, group).wait()
    return collectives.Pending(whole.roll(-(group.rank() + 1) * x.shape[0], 0), None)


def norm_of(size: Callable[[int, Tensor], int], sums: bool) -> Callable[..., Tensor]:
    """The gated norm with another group size, a function of the right one and the weight, and with no sums over parts."""

    def gated_norm(*tensors: Tensor, group_size: int, eps: float, sum_parts: Any) -> Tensor:
        parts = keep if sums else None
        return GATED_NORM(*tensors, group_size=size(group_size, tensors[2]), eps=eps, sum_parts=parts)

    return gated_norm


def first_unit(parameter: Tensor, split_dim: int | None, units: int, context: ParallelContext) -> Tensor:
    """Of B/C groups that ranks share, the first on every rank."""
    part = LOCAL_PART(parameter, split_dim, units, context)
    if split_dim is None or tensor.is_split(split_dim, units, context):
        return part
    return fsdp.local(parameter).narrow(split_dim, 0, part.shape[split_dim])


def dp_cuts_first(
    shape: tuple[int, ...], split_dim: int | None, units: int, context: ParallelContext, sharded: bool
) -> tuple[slice, ...]:
    """Slices of a parameter whose dimension 0 FSDP cuts before tp does."""
    if not (sharded and split_dim == 0):
        return OWNED_SLICES(shape, split_dim, units, context, sharded)
    rank = context.rank("dp_shard") * context.size("tp") + context.rank("tp")
    part = fsdp.shard_range(shape[0], rank, context.size("dp_shard") * context.size("tp"))
    return (slice(part.start, part.stop), *map(slice, shape[1:]))


START_GATHER, GATED_NORM = collectives.start_gather, mamba2.gated_norm
LOCAL_PART, OWNED_SLICES = tensor.local_part, tensor.owned_slices


# --------------------------------------------------------------------------------------------- loss and gradient norm


def keep_high(x: Tensor, group: Any, op: str = "sum") -> Tensor:
    return x if op == "max" else collectives.reduce_(x, group, op)


def keep_row(row: int) -> Callable[..., Tensor]:
    """A sum that leaves one row of the loss's two (normaliser, target's logit) as it is on this rank."""

    def reduce_(x: Tensor, group: Any, op: str = "sum") -> Tensor:
        own = x[row].clone()
        collectives.reduce_(x, group, op)
        if op == "sum":
            x[row] = own
        return x

    return reduce_


def all_groups(parameter: Any) -> dict[str, Any]:
    """Every group of the parameter's mesh, as if replicas were shards."""
    groups = [parameter.device_mesh.get_group(i) for i in range(parameter.device_mesh.ndim)]
    return {group.group_name: group for group in groups if group.size() > 1}


def first_group(parameter: Any) -> dict[str, Any]:
    return dict(list(SHARDING_GROUPS(parameter).items())[:1])


SHARDING_GROUPS = norms.sharding_groups


# --------------------------------------------------------------------------------------------------- pieces of sequences


def no_halo(x: Tensor, *_: object) -> tuple[Tensor, None]:
    """In place of a convolution's view of the piece before."""
    return x, None


def uncut_halo(
    x: Tensor, width: int, _: object, context: ParallelContext, *channels: slice
) -> tuple[Tensor, Tensor | None]:
    return WITH_HALO(x, width, None, context, *channels)


def shift_inputs_only(x: Tensor, group: Any, by: int, *, around: bool) -> collectives.Pending:
    """A shift that brings no gradient back."""
    shifted = START_SHIFT(x, group, by, around=around).wait()
    return pending(shifted if by > 0 else torch.zeros_like(shifted), group)


def shift_backwards(x: Tensor, group: Any, by: int, *, around: bool) -> collectives.Pending:
    return START_SHIFT(x, group, -by, around=around)


def nothing_carried(_: object, __: object, state: Tensor, ___: object) -> Callable[[], Tensor]:
    return lambda: torch.zeros_like(state)


def undecayed(ranks: Any, decay: Tensor, state: Tensor, as_decay: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    return START_STATE_BEFORE(ranks, decay, state, lambda sent: torch.ones_like(as_decay(sent)))


def other_neighbours(self: Any, x: Tensor) -> Callable[[], Tensor]:
    """Ranks in reverse order."""
    whole = START_GATHER_OF_RANKS(self, x)
    return lambda: whole().flip(0)


def from_zero(positions: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    return ROPE_TABLES(positions - positions[0], *settings)


def own_documents(x: Tensor, context: ParallelContext) -> Tensor:
    """Every rank's document starts as if they were this one's."""
    return x.repeat(1, context.size("cp"))


def average(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """A merge by equal weights."""
    seen = torch.isfinite(lse).unsqueeze(-1)
    out.copy_(torch.where(seen, (out + part) / 2, part))
    lse.copy_(torch.logaddexp(lse, part_lse))


def own_keys_only(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of keys and values of this rank's own chunks, none of those that pass by."""
    g_q, g_k, g_v = CORE_BACKWARD(*arguments)
    return (g_q, g_k, g_v) if arguments[-1] else (g_q, torch.zeros_like(g_k), torch.zeros_like(g_v))


def over_dp_shard_only(self: ParallelContext, value: Tensor) -> Tensor:
    return collectives.reduce_(value, self.group("dp_shard"))


WITH_HALO, START_SHIFT, ROPE_TABLES = sequence.with_halo, sequence.start_shift, lm.rope_tables
START_STATE_BEFORE, START_GATHER_OF_RANKS = ssd_reference.start_state_before, sequence.Ranks.start_gather
CORE_BACKWARD = ring_attention._core_backward


# -------------------------------------------------------------------------------------------------------------- tests


@dataclass(frozen=True)
class Bug:
    """A mistake planted by a patch, the training in which it is made, and the figure that must show it."""

    planted: AbstractContextManager[object]
    model: str
    shows: str = "gradient"
    sequence_parallel: bool = False
    reduce_every_micro_batch: bool = False

    @property
    def case(self) -> Case:
        settings = {name: getattr(self, name) for name in ("sequence_parallel", "reduce_every_micro_batch")}
        return replace(PLAIN, model=MODELS[self.model], **settings)


BUGS: dict[str, dict[str, Bug]] = {
    "tp2": {
        f"{kind}: output not summed": Bug(patch.object(module, "sum_partial", keep), kind, "loss")
        for kind, module in MIXER_MODULES.items()
    }
    | {
        "gradient of a layer's input not summed": Bug(without(linear, start_sum=pending), "M"),
        "m: x_proj's output not summed": Bug(
            patch.object(mamba, "shared_sum", lambda x, context: collectives.copy(x, context.group("tp"))), "m", "loss"
        ),
        "m: gradient of x_proj's output not summed": Bug(
            patch.object(mamba, "shared_sum", lambda x, context: collectives.all_reduce(x, context.group("tp"))), "m"
        ),
        "M: norm over two groups at once": Bug(
            patch.object(mixer_reference, "gated_norm", norm_of(lambda size, _: 2 * size, False)), "four groups", "loss"
        ),
        "embedding not summed": Bug(patch.object(vocab, "sum_partial", keep), "-", "loss"),
        "loss: largest logit of this rank only": Bug(without(vocab, reduce_=keep_high), "-", "loss"),
        "loss: normaliser of this rank only": Bug(without(vocab, reduce_=keep_row(0)), "-", "loss"),
        "loss: target's logit of this rank only": Bug(without(vocab, reduce_=keep_row(1)), "-", "loss"),
        "loss: gradient of hidden states not summed": Bug(without(vocab, start_sum=pending), "-"),
        "gradient norm: replicas counted": Bug(patch.object(norms, "sharding_groups", all_groups), "M", "norm"),
        "gradient norm: shards not added up": Bug(patch.object(norms, "sharding_groups", lambda _: {}), "M", "norm"),
        "sequence parallelism: norms' gradients not summed": Bug(
            patch.object(LanguageModel, "partial_over_tp", lambda _: []), "-", sequence_parallel=True
        ),
        "sequence parallelism: scatter without a sum": Bug(
            patch.object(collectives, "start_scatter", own_rows), "-", "loss", sequence_parallel=True
        ),
        "sequence parallelism: gather in another order": Bug(
            patch.object(collectives, "start_gather", other_order), "M", "loss", sequence_parallel=True
        ),
    },
    "tp4": {
        "M: norm over the channels here only": Bug(
            patch.object(mixer_reference, "gated_norm", norm_of(lambda _, weight: len(weight), False)), "M", "loss"
        ),
        "M: norm's sums of the channels here only": Bug(
            patch.object(mixer_reference, "gated_norm", norm_of(lambda size, _: size, True)), "M", "loss"
        ),
        "M: norm's sums over all groups": Bug(
            patch.object(mamba2, "group_sum", lambda x, groups, context: collectives.reduce_(x, context.group("tp"))), "M", "loss"
        ),
        "M: first group on every rank": Bug(patch.object(tensor, "local_part", first_unit), "M", "loss"),
        "M: gradients of shared groups not summed": Bug(patch.object(LanguageModel, "partial_over_tp", lambda _: []), "M"),
        "*: gradients of shared keys and values not summed": Bug(patch.object(LanguageModel, "partial_over_tp", lambda _: []), "*"),
    },
    "dp2": {
        "replicated gradients not summed": Bug(patch.object(fsdp, "sum_replicated_gradients", only_fsdp_sums), "M"),
        "no sum after the last micro-batch": Bug(patch.object(fsdp, "last_backward", sync_all_but_the_last), "M"),
        "gradients averaged": Bug(
            patch.object(torch.distributed.fsdp.FSDPModule, "set_gradient_divide_factor", lambda *_: None), "-"
        ),
    },
    "dp_replicate2 dp_shard2": {
        "no sum over replicas": Bug(patch.object(fsdp, "last_backward", no_replicas), "M"),
        "a sum each micro-batch, but over replicas": Bug(
            patch.object(fsdp, "last_backward", no_replicas), "M", reduce_every_micro_batch=True
        ),
    },
    "cp4": {
        f"{kind}: {what}": Bug(patch.object(where, name, planted), kind, shows)
        for kind, module, scan in (("M", mamba2, ssd_reference), ("m", mamba, scan_reference))
        for what, where, name, planted, shows in (
            ("convolution sees its piece only", module, "with_halo", no_halo, "loss"),
            ("convolution sees the document before", module, "with_halo", uncut_halo, "loss"),
            ("gradient of the piece before not returned", sequence, "start_shift", shift_inputs_only, "gradient"),
            ("scan from a zero state", module, "sequence_ranks", lambda _: None, "loss"),
            ("ranks' states without the decay between", scan, "start_state_before", undecayed, "gradient"),
            ("states of ranks in reverse order", sequence.Ranks, "start_gather", other_neighbours, "loss"),
            ("gradient of the final state not passed", scan, "start_gradient_after", nothing_carried, "gradient"),
        )
    }
    | {
        "*: positions from 0 on every rank": Bug(patch.object(lm, "rope_tables", from_zero), "*", "loss"),
        "*: documents of the own piece on every rank": Bug(patch.object(sequence, "whole_sequence", own_documents), "*", "loss"),
        "*: a ring in the other direction": Bug(patch.object(ring_attention, "start_shift", shift_backwards), "*", "loss"),
        "*: partial results with equal weights": Bug(patch.object(ring_attention, "_merge", average), "*", "loss"),
        "*: gradient of keys that pass by left out": Bug(patch.object(ring_attention, "_core_backward", own_keys_only), "*"),
    },
    "cp2 dp2": {
        "loss and replicated gradients not summed over cp": Bug(
            patch.object(ParallelContext, "sum_over_tokens", over_dp_shard_only), "M", "loss"
        ),
    },
    "tp2 dp2": {
        "initial weights cut over dp before tp": Bug(patch.object(tensor, "owned_slices", dp_cuts_first), "M*-", "loss"),
        "gradient norm: shards of one mesh dimension added up": Bug(
            patch.object(norms, "sharding_groups", first_group), "M*-", "norm"
        ),
    },
}
MESHES = {
    "tp2": {"tp": 2},
    "tp4": {"tp": 4},
    "dp2": {"dp_shard": 2},
    "dp_replicate2 dp_shard2": {"dp_replicate": 2, "dp_shard": 2},
    "tp2 dp2": {"tp": 2, "dp_shard": 2},
    "cp4": {"cp": 4},
    "cp2 dp2": {"cp": 2, "dp_shard": 2},
}


@pytest.fixture(scope="module")
def one_rank() -> dict[str, Result]:
    return dict(zip(MODELS, train_alone(replace(PLAIN, model=model) for model in MODELS.values()), strict=True))


@pytest.mark.parametrize("mesh", BUGS)
def test_planted_bugs_show(mesh: str, one_rank: dict[str, Result], record_property: Callable[[str, object], None]) -> None:
    """Each bug by more than 1e-6 where it must; the same training without it by no more than 1e-10."""
    bugs = BUGS[mesh]
    cases = {name: bug.case for name, bug in bugs.items()}
    expected = {name: one_rank[bug.model] for name, bug in bugs.items()}
    for name, bug in bugs.items():
        sound = next((known for known in cases.keys() - bugs.keys() if cases[known] == bug.case), f"sound: {name}")
        cases[sound], expected[sound] = bug.case, one_rank[bug.model]
    found = compare_training(cases, MESHES[mesh], expected, {name: bug.planted for name, bug in bugs.items()})
    record_property("planted", {f"{name} ({mesh})": found[name] for name in bugs})
    wrong = {name: found[name] for name in cases.keys() - bugs.keys() if not max(found[name].values()) <= 1e-10}
    missed = {name: found[name] for name, bug in bugs.items() if not found[name][bug.shows] > 1e-6}
    assert not wrong, f"without a bug: {wrong}"
    assert not missed, f"planted, but not seen: {missed}"
