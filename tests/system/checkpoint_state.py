"""Training state, managers and forked ranks for the tests of checkpoints."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from harness import on_ranks
from megatron_mamba.checkpoint import CheckpointManager, load

MARKS = [
    pytest.mark.ranks,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),  # the ranks are forked
]

SHAPES = {"embed.weight": (7, 5), "layers.0.in_proj": (8, 6), "layers.0.A_log": (3,), "layers.0.D": (2,), "norm": (6,)}
"""7 rows do not divide by 2 or 4; 3 and 2 leave ranks of dp4 with nothing."""


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Forked children must not inherit a pool of OpenMP threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def draw(name: str, shape: tuple[int, ...], step: int) -> torch.Tensor:
    """The global tensor `name` at `step`."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + step)
    return torch.randn(shape, generator=generator)


def state_at(
    step: int, place: Callable[[torch.Tensor], torch.Tensor] = lambda t: t, shapes: dict[str, tuple[int, ...]] = SHAPES
) -> dict[str, Any]:
    """Model and optimizer state as the trainer hands it over."""

    def moments(name: str, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
        pair = {key: place(draw(f"{name}.{key}", shape, step)) for key in ("exp_avg", "exp_avg_sq")}
        return pair | {"step": torch.tensor(float(step))}

    return {
        "model": {name: place(draw(name, shape, step)) for name, shape in shapes.items()},
        "optimizer": {name: moments(name, shape) for name, shape in shapes.items()},
    }


def map_state(state: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    return {k: map_state(v, function) for k, v in state.items()} if isinstance(state, dict) else function(state)


def leaves(state: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    if not isinstance(state, dict):
        return {prefix: state}
    return {name: leaf for key, value in state.items() for name, leaf in leaves(value, f"{prefix}/{key}").items()}


def same(a: Any, b: Any) -> bool:
    """Bit for bit, local shards of DTensors."""
    found, expected = leaves(a), leaves(b)

    def local(t: torch.Tensor) -> torch.Tensor:
        return (t.to_local() if isinstance(t, DTensor) else t).detach().contiguous().view(-1).view(torch.uint8)

    return found.keys() == expected.keys() and all(torch.equal(local(found[k]), local(expected[k])) for k in found)


def manager(directory: Path, **settings: Any) -> CheckpointManager:
    defaults: dict[str, Any] = {"keep_last": 100, "keep_every": 0, "async_save": True, "on_damage": "error"}
    return CheckpointManager(directory, **(defaults | settings))


def loaded(path: Path, step_like: int = 0) -> dict[str, Any]:
    state = map_state(state_at(step_like), torch.zeros_like)
    load(path, state)
    return state


def save_steps(directory: Path, *steps: int, **settings: Any) -> None:
    saver = manager(directory, **settings)
    for step in steps:
        saver.save(step, state_at(step), {"step": step})
    saver.close()


def warned(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(r.getMessage() for r in caplog.records if r.levelname == "WARNING" and "megatron_mamba" in r.name)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name not in (".lock", "latest"))


def run_ranks(world: int, function: Callable[[int], None]) -> None:
    """Call `function(rank)` in forked processes that form a gloo group; an exception in one fails the test."""
    on_ranks({"dp_shard": world}, lambda context: function(context.global_rank))


# -------------------------------------------------------------------------------------------------------------- meshes

MESHES: dict[str, tuple[tuple[int, ...], list[Any]]] = {
    "one": ((1,), [Shard(0)]),
    "dp2": ((2,), [Shard(0)]),
    "dp4": ((4,), [Shard(0)]),
    "columns4": ((4,), [Shard(1)]),
    "replicate2 x shard2": ((2, 2), [Replicate(), Shard(0)]),
    "shard2 x columns2": ((2, 2), [Shard(0), Shard(1)]),
}


def placer(mesh_name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    shape, placements = MESHES[mesh_name]
    mesh = init_device_mesh("cpu", shape)

    def place(tensor: torch.Tensor) -> torch.Tensor:
        fitting = [p if not isinstance(p, Shard) or p.dim < tensor.dim() else Replicate() for p in placements]
        return distribute_tensor(tensor, mesh, fitting, src_data_rank=None)

    return place
