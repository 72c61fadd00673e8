"""Running a part of the program without devices: one of the tp and cp ranks on the meta device, and what it allocates and sends."""

from __future__ import annotations

import re
import sys
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mamba_kernels import backend
from megatron_mamba.layout import ParallelConfig
from megatron_mamba.parallel.context import MESH_DIMENSIONS, ParallelContext
from megatron_mamba.parallel.pipeline import SCHEDULES

COLLECTIVES = {"allgather": "all-gather", "reduce_scatter": "reduce-scatter", "allreduce": "all-reduce", "alltoall": "all-to-all"}
SHARE_SENT = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2}
"""How often a ring of n ranks sends (n - 1) / n of the whole tensor from each rank."""


@contextmanager
def dry_context(layout: ParallelConfig) -> Iterator[ParallelContext]:
    """The first tp rank of the second cp rank of `layout` (which has neighbours on both sides, and sends as much as any), on the
    meta device; its collectives move nothing. The process must not be in a process group."""
    hook = sys.excepthook  # torch puts a prefix with the rank before what is printed, and leaves it there
    rank = layout.tp * min(1, layout.cp - 1)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.cp * layout.tp)
    try:
        mesh = init_device_mesh("cpu", (1, 1, 1, layout.cp, layout.tp), mesh_dim_names=MESH_DIMENSIONS)
        yield ParallelContext.over(mesh, torch.device("meta"), layout)
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook


def allocated(size: int) -> int:
    """What torch's CUDA allocator takes for `size` bytes."""
    return -(-size // 512) * 512


class Ledger(TorchDispatchMode):
    """Counts the bytes that live in storages made while it is on, and the bytes that collectives send.

    `now`: bytes alive. `peaks`: the most alive at one time, for each `moment` the caller names. `peaks_at`: the same for each
    kind of allocation in it (operation, dtype, dimensions). `sent`: bytes that this rank sends to others, by process group,
    moment and collective; `groups` names process groups, which go by their own names otherwise.
    """

    def __init__(self, groups: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.groups = groups or {}
        self.now, self.moment = 0, "start"
        self.peaks: Counter[str] = Counter()
        self.peaks_at: dict[str, Counter[str]] = {}
        self.sent: dict[str, dict[str, Counter[str]]] = {}
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "mamba_kernels":
            with self:  # What its kernels allocate counts too.
                return backend.KERNELS[func._schema.name.removeprefix("mamba_kernels::")](*args)
        out = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            self._send(func, args)
        elif not func.is_view:
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, Tensor):
                    self._note(tensor, func)
        return out

    def _note(self, tensor: Tensor, func: Any) -> None:
        storage = (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        self._alive[key] = allocated(storage.nbytes())
        self.now += self._alive[key]
        self.peaks[self.moment] = max(self.peaks[self.moment], self.now)
        peaks, what = self.peaks_at.setdefault(self.moment, Counter()), f"{func} {tensor.dtype} {tensor.dim()}"
        peaks[what] = max(peaks[what], self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._alive.pop(key)

    def _send(self, func: Any, args: Any) -> None:
        name = next((name for key, name in COLLECTIVES.items() if key in func.name()), None)
        if name is None:
            return
        place = [argument.name for argument in func._schema.arguments].index("process_group")
        group = dist.ProcessGroup.unbox(args[place])
        if name == "all-to-all":
            _, given, _, _, rows, *_ = args
            sent = given.nbytes // max(given.shape[0], 1) * (sum(rows) - rows[group.rank()])
        else:
            whole = max(leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
            sent = SHARE_SENT[name] * whole * (group.size() - 1) // group.size()
        dimension = self.groups.get(group.group_name, group.group_name)
        self.sent.setdefault(dimension, {}).setdefault(self.moment, Counter())[name] += sent


def group_names(context: ParallelContext) -> dict[str, str]:
    """The names of the mesh's dimensions by those of their process groups, for a :class:`Ledger`."""
    return {context.group(name).group_name: name for name in MESH_DIMENSIONS if context.size(name) > 1}


class Action(NamedTuple):
    """What a pipeline rank does next with one of its stages: forward pass "F", backward pass "B" or in its place gradients of
    inputs "I" and of weights "W"; "UNSHARD" and "RESHARD" its weights (of no micro-batch). "RECV_F" and "RECV_B" begin to receive
    what a pass needs, "WAIT_SEND_F" and "WAIT_SEND_B" give up what it has sent (these two only from torch 2.15 on)."""

    kind: str
    stage: int
    micro_batch: int


@cache
def pipeline_actions(schedule: str, pp: int, stages: int, micro_batches: int) -> tuple[tuple[Action, ...], ...]:
    """What each rank does in a step, in order, as torch's schedules have it (and as its Schedule1F1B, which makes no list,
    goes about it)."""
    if schedule == "1f1b":
        return tuple(_one_forward_one_backward(pp - rank, rank, micro_batches) for rank in range(pp))
    each = [SimpleNamespace(num_stages=stages, group_size=pp, group_rank=0, submod=None) for _ in range(stages // pp)]
    orders = SCHEDULES[schedule](each, micro_batches).pipeline_order_with_comms
    # How they are written ("3F0", "1UNSHARD") is the same in all versions of torch.
    found = [[_ACTION.fullmatch(str(action)) for action in orders[rank]] for rank in range(pp)]
    return tuple(tuple(Action(m[2], int(m[1]), int(m[3] or -1)) for m in order if m) for order in found)


_ACTION = re.compile(r"(\d+)(F|B|I|W|UNSHARD|RESHARD|RECV_F|RECV_B|WAIT_SEND_F|WAIT_SEND_B)(\d*)")


def _one_forward_one_backward(ahead: int, stage: int, micro_batches: int) -> tuple[Action, ...]:
    first, last = stage == 0, ahead == 1
    ahead = min(ahead, micro_batches)

    def forward(i: int) -> list[Action]:
        return [Action("RECV_F", stage, i)] * (not first) + [Action("F", stage, i)]

    found: list[Action] = []
    for i in range(ahead):
        found += forward(i)
        found += [Action("WAIT_SEND_F", stage, i - 1)] * (i > 0)
    for i in range(micro_batches):
        if not last:
            found.append(Action("RECV_B", stage, i))
            # Sent with what is received here, or if there is none left, while the micro-batches before were.
            found += [Action("WAIT_SEND_F", stage, i + ahead - 1)] * (i + ahead <= micro_batches)
        found.append(Action("B", stage, i))
        found += forward(i + ahead) if i + ahead < micro_batches else []
    return tuple(found)
