"""Running a part of the program without devices: one rank of a tp group on the meta device, and what it allocates and sends."""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_mamba.layout import ParallelConfig
from megatron_mamba.parallel.context import MESH_DIMENSIONS, ParallelContext

COLLECTIVES = {"allgather": "all-gather", "reduce_scatter": "reduce-scatter", "allreduce": "all-reduce"}
SHARE_SENT = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2}
"""How often a ring of n ranks sends (n - 1) / n of the whole tensor from each rank."""


@contextmanager
def dry_context(layout: ParallelConfig) -> Iterator[ParallelContext]:
    """Rank 0 of the tp ranks of `layout`, on the meta device; its collectives move nothing. The process must not be in a
    process group."""
    hook = sys.excepthook  # torch puts a prefix with the rank before what is printed, and leaves it there
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=layout.tp)
    try:
        mesh = init_device_mesh("cpu", (1, 1, 1, 1, layout.tp), mesh_dim_names=MESH_DIMENSIONS)
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
    kind of allocation in it (operation, dtype, dimensions). `sent`: bytes a rank sends, by moment and collective.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now, self.moment = 0, "start"
        self.peaks: Counter[str] = Counter()
        self.peaks_at: dict[str, Counter[str]] = {}
        self.sent: dict[str, Counter[str]] = {}
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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
        name = next(name for key, name in COLLECTIVES.items() if key in func.name())
        whole = max(leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
        ranks = dist.get_world_size()
        self.sent.setdefault(self.moment, Counter())[name] += SHARE_SENT[name] * whole * (ranks - 1) // ranks
