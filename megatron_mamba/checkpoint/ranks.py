"""The ranks that save and load together."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")

TIMEOUT = timedelta(hours=2)
"""How long a rank waits for the slowest writer before it gives the save up."""


class Ranks:
    """A gloo group of its own over the ranks of `process_group` (default: all), so that a save in the background never
    meets the trainer's collectives. Without torch.distributed it is one rank."""

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        self.group: dist.ProcessGroup | None = None
        self.rank, self.size = 0, 1
        if dist.is_available() and dist.is_initialized():
            members = None if process_group is None else dist.get_process_group_ranks(process_group)
            group = dist.new_group(members, timeout=TIMEOUT, backend="gloo", use_local_synchronization=members is not None)
            assert not isinstance(group, int), "torch's answer to a rank that is no member"
            self.group = group
            self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)

    def reduce(self, value: Any, combine: Callable[[list[Any]], T]) -> T:
        """Gather `value` to the first rank, run `combine` on the list there; every rank gets its result or error."""
        if self.group is None:
            return combine([value])
        first = dist.get_global_rank(self.group, 0)
        values = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, values, dst=first, group=self.group)
        outcome: list[Any] = [None, None]
        if values is not None:
            try:
                outcome[0] = combine(values)
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=first, group=self.group)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def on_first(self, function: Callable[[], T]) -> T:
        """Run `function` on the first rank and give every rank its result, or its error."""
        return self.reduce(None, lambda _: function())

    def close(self) -> None:
        if self.group is not None and dist.is_initialized():
            dist.destroy_process_group(self.group)
        self.group = None
