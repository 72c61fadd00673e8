"""Initial weights are the same bits on every mesh."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from harness import on_ranks
from megatron_mamba.model import build
from megatron_mamba.model.parameters import parameter_table
from megatron_mamba.parallel.context import ParallelContext
from tiny import tiny

pytestmark = pytest.mark.ranks

# Four tp ranks share two groups and two key/value heads; dp ranks get unequal parts of the 13 rows of x_proj.
MODEL = tiny("mM*-", vocab_size=60, mamba2={"d_inner": 64}, mlp={"activation": "swiglu"}, norm="layernorm")
MESHES = {
    "tp2": {"tp": 2},
    "tp4": {"tp": 4},
    "dp4": {"dp_shard": 4},
    "dp_replicate2 dp_shard2": {"dp_replicate": 2, "dp_shard": 2},
    "tp2 dp2": {"tp": 2, "dp_shard": 2},
}


def digest(context: ParallelContext, seed: int) -> str:
    """sha256 over the global tensors of all parameters, in the order of their names; gathered by their DTensor placements,
    not by the slices that were drawn."""
    model = build(MODEL, context, seed=seed)
    found = dict(model.named_parameters())
    assert found.keys() == parameter_table(MODEL).keys()
    total = hashlib.sha256()
    for name, parameter in sorted(found.items()):
        assert isinstance(parameter, DTensor)
        whole = parameter.detach().full_tensor()
        assert whole.shape == parameter_table(MODEL)[name].shape
        total.update(name.encode() + whole.contiguous().numpy().tobytes())
    return total.hexdigest()


def digests(sizes: dict[str, int], folder: Path, seeds: list[int]) -> list[str]:
    """For each seed, the digest that all ranks of a mesh find."""

    def body(context: ParallelContext) -> None:
        lines = "\n".join(digest(context, seed) for seed in seeds)
        (folder / str(context.global_rank)).write_text(lines)
        dist.barrier()

    on_ranks(sizes, body)
    found = {(folder / str(rank)).read_text() for rank in range(math.prod(sizes.values()))}
    assert len(found) == 1, f"ranks hold different weights: {found}"
    return found.pop().split()


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> str:
    seed_3, other = digests({}, tmp_path_factory.mktemp("one"), [3, 4])
    assert seed_3 != other
    return seed_3


@pytest.mark.parametrize("mesh", MESHES)
def test_same_bits_on_every_mesh(mesh: str, one_rank: str, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    record_property("initial weights", one_rank)
    assert digests(MESHES[mesh], tmp_path, [3]) == [one_rank]
