"""The context that all tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from megatron_mamba.config import ParallelConfig
from megatron_mamba.parallel.context import ParallelContext


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    """One rank on the CPU."""
    ours = not dist.is_initialized()
    made = ParallelContext.create(ParallelConfig(), "cpu")
    yield made
    if ours:
        made.close()
