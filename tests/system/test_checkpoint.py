"""Checkpoints: bit-equal on any mesh, whole after kill -9 and full disks, damage found and named."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo  # DTensor imports it at its first use, which would cost every forked rank three seconds
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from megatron_mamba.checkpoint import (
    CheckpointError,
    CheckpointManager,
    load,
    read_metadata,
    resolve,
    rng_state,
    set_rng_state,
    sharded,
    storage,
    verify,
)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

SHAPES = {"embed.weight": (7, 5), "layers.0.in_proj": (8, 6), "layers.0.A_log": (3,), "layers.0.D": (2,), "norm": (6,)}
"""7 rows do not divide by 2 or 4; 3 and 2 leave ranks of dp4 with nothing."""


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Forked children must not inherit a pool of OpenMP threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------------- material


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


def _rank(rank: int, world: int, store: str, function: Callable[[int], None]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    function(rank)
    dist.destroy_process_group()


_stores = itertools.count()


def run_ranks(world: int, folder: Path, function: Callable[[int], None]) -> None:
    """Call `function(rank)` in forked processes that form a gloo group; an exception in one fails the test."""
    store = str(folder / f"store-{next(_stores)}")
    mp.start_processes(_rank, (world, store, function), nprocs=world, start_method="fork")


# ----------------------------------------------------------------------------------------- round trip, resharding


@pytest.mark.parametrize("async_save", [False, True])
def test_round_trip_is_bit_equal(tmp_path: Path, async_save: bool) -> None:
    odd = {
        "bf16": torch.tensor([[1.0, -0.0], [float("nan"), float("inf")]], dtype=torch.bfloat16),
        "flag": torch.tensor([True, False]), "f64": torch.randn(3, dtype=torch.float64), "long": torch.arange(5),
        "scalar": torch.tensor(3.5),
        "transposed": torch.randn(4, 3).t(), "part": torch.randn(9)[2:5], "nothing": torch.empty(0, 4),
        "big": torch.randn(5, 1 << 20),  # several blocks of 16 MB
    }  # fmt: skip
    saved = state_at(7) | {"odd": odd}
    metadata = {"config": {"lr": 1e-4, "name": "ü"}, "consumed_samples": 2**40, "loss": [0.1, 1e-300]}
    saver = manager(tmp_path, async_save=async_save)
    saver.save(7, saved, metadata)
    path = saver.latest()
    assert path == tmp_path / "step_00000007"
    target = map_state(saved, torch.zeros_like)
    assert load(path, target) == metadata == read_metadata(path)
    assert same(target, saved)
    saver.close()
    # Any safetensors reader opens what one rank wrote.
    assert torch.equal(load_file(path / "model_00000.safetensors")["embed.weight"], saved["model"]["embed.weight"])


def test_floating_point_converts_to_the_target(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    target = map_state(state_at(1), lambda t: torch.zeros_like(t, dtype=torch.float64))
    load(tmp_path / "step_00000001", target)
    assert same(target, map_state(state_at(1), torch.Tensor.double))


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


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("dp2", "one"), ("one", "dp4"), ("dp4", "dp2"), ("dp2", "dp2"),
        ("replicate2 x shard2", "dp4"), ("columns4", "dp2"), ("dp2", "shard2 x columns2"), ("shard2 x columns2", "one"),
    ],
)  # fmt: skip
def test_saved_on_one_mesh_loads_on_another(tmp_path: Path, before: str, after: str) -> None:
    def save(rank: int) -> None:
        saver = manager(tmp_path / "checkpoints")
        saver.save(3, state_at(3, placer(before)), {"step": 3})
        saver.close()

    def read(rank: int) -> None:
        place = placer(after)
        target = state_at(0, place)
        assert load(tmp_path / "checkpoints" / "step_00000003", target) == {"step": 3}
        assert same(target, state_at(3, place))

    ranks = {name: int(np.prod(MESHES[name][0])) for name in (before, after)}
    run_ranks(ranks[before], tmp_path, save)
    run_ranks(ranks[after], tmp_path, read)

    # Each element is written exactly once, whoever holds copies of it, and no rank writes much more than its share.
    files = list((tmp_path / "checkpoints" / "step_00000003").glob("*.safetensors"))
    per_rank = {rank: 0 for rank in range(ranks[before])}
    for file in files:
        data = file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little")
        per_rank[int(file.stem.rpartition("_")[2])] += data
    whole = sum(t.nbytes for t in leaves(state_at(3)).values())
    assert sum(per_rank.values()) == whole
    assert max(per_rank.values()) <= 1.7 * whole / ranks[before]


def test_fsdp2_training_continues_on_another_mesh(tmp_path: Path) -> None:
    def trained(mesh: DeviceMesh, steps: int) -> tuple[torch.nn.Module, torch.optim.Optimizer, dict[str, Any]]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)).double()
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        train(model, optimizer, range(steps))
        state = {n: {k: optimizer.state[p][k] for k in optimizer.state[p]} for n, p in model.named_parameters()}
        return model, optimizer, {"model": dict(model.named_parameters()), "optimizer": state}

    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            x = draw("x", (6, 5), step).double()  # the same on every rank, so every mesh trains alike
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    def save(rank: int) -> None:
        model, optimizer, state = trained(init_device_mesh("cpu", (2,)), 2)
        saver = manager(tmp_path / "checkpoints")
        saver.save(2, state, {})
        train(model, optimizer, range(2, 4))  # while the save runs
        saver.close()
        full = {name: p.full_tensor() for name, p in model.named_parameters()}
        if rank == 0:
            torch.save(full, tmp_path / "expected.pt")

    def resume(rank: int) -> None:
        model, optimizer, state = trained(init_device_mesh("cpu", (dist.get_world_size(),)), 1)
        load(tmp_path / "checkpoints" / "step_00000002", state)
        train(model, optimizer, range(2, 4))
        expected = torch.load(tmp_path / "expected.pt")
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.full_tensor(), expected[name], rtol=1e-12, atol=1e-12)
            assert isinstance(parameter, DTensor)

    run_ranks(2, tmp_path, save)
    for world in (1, 4):
        run_ranks(world, tmp_path, resume)


def test_rank_state_returns_to_its_rank(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def save(rank: int) -> None:
        saver = manager(tmp_path / "checkpoints")
        random.seed(rank), np.random.seed(rank), torch.manual_seed(rank)
        np.random.standard_normal()  # leaves a cached second draw behind
        saver.save(1, state_at(1), {}, rank_state=rng_state())
        draws = (random.random(), np.random.standard_normal(3).tolist(), torch.rand(3).tolist())
        (tmp_path / f"draws-{rank}").write_text(json.dumps(draws))
        saver.close()

    def read(rank: int) -> None:
        state: dict[str, Any] = {}
        load(tmp_path / "checkpoints" / "step_00000001", state_at(0), rank_state=state)
        set_rng_state(state)
        draws = (random.random(), np.random.standard_normal(3).tolist(), torch.rand(3).tolist())
        assert json.loads((tmp_path / f"draws-{rank}").read_text()) == list(draws)

    run_ranks(2, tmp_path, save)
    run_ranks(2, tmp_path, read)
    state: dict[str, Any] = {}
    load(tmp_path / "checkpoints" / "step_00000001", state_at(0), rank_state=state)
    assert state == {}
    assert "2 ranks saved it, 1 load it" in warned(caplog)


# ------------------------------------------------------------------------------------------------ asynchronous save


def test_staging_isolates_a_running_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    write = storage.write_file

    def held(*args: Any) -> Any:
        assert go.wait(30)
        return write(*args)

    monkeypatch.setattr(storage, "write_file", held)
    saver, state = manager(tmp_path), state_at(1)
    saver.save(1, state, {"step": 1})
    map_state(state, lambda t: t.fill_(-1.0))
    assert not (tmp_path / "step_00000001").exists()
    go.set()
    saver.wait()
    assert same(loaded(tmp_path / "step_00000001"), state_at(1))
    # The next save reuses the staging memory: it waits for the one before it.
    go.clear()
    saver.save(2, state_at(2), {})
    threading.Timer(0.05, go.set).start()
    saver.save(3, state_at(3), {})
    assert same(loaded(tmp_path / "step_00000002"), state_at(2))
    saver.close()
    assert same(loaded(tmp_path / "step_00000003"), state_at(3))


# ------------------------------------------------------------------------------------------------- kill -9, left-overs


def _in_child(function: Callable[[], None]) -> mp.Process:
    process = mp.get_context("fork").Process(target=lambda: (torch.set_num_threads(1), function()))
    process.start()
    return process


def pointer(directory: Path) -> Path:
    return directory / (directory / "latest").read_text().strip()


def test_kill_at_every_system_call_of_a_save(tmp_path: Path) -> None:
    """SIGKILL before each mkdir, fsync, rename and unlink of two saves: a new one that deletes an old one, then another
    of the same step."""
    template = tmp_path / "template"
    save_steps(template, 1, 2)
    done = mp.get_context("fork").Value("i", 0)

    def saves(directory: Path, fatal: int) -> None:
        calls, sync = itertools.count(), os.fsync

        def deadly(call: Callable[..., Any]) -> Callable[..., Any]:
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                if next(calls) == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)
                # What was written outlives the process without a sync; leaving it out makes the test fast.
                return None if call is sync else call(*args, **kwargs)

            return wrapper

        for name in ("mkdir", "fsync", "rename", "replace", "unlink", "rmdir"):
            setattr(os, name, deadly(getattr(os, name)))
        saver = manager(directory, keep_last=2)
        for version in (3, 4):
            saver.save(3, state_at(version), {"version": version})
            saver.wait()
            done.value = version

    for fatal in itertools.count():
        directory = tmp_path / f"kill-{fatal}"
        shutil.copytree(template, directory)
        done.value = 2
        child = _in_child(lambda at=directory, n=fatal: saves(at, n))  # type: ignore[misc]
        child.join()
        moved_away = (directory / ".old-step_00000003").exists() and not (directory / "step_00000003").exists()
        if not moved_away:
            verify(pointer(directory))
        survivor = manager(directory, keep_last=2)
        path = survivor.latest()
        assert path is not None
        verify(pointer(directory))
        version = read_metadata(path).get("version", 2)
        assert done.value <= version
        assert same(loaded(path), state_at(version))
        assert all(name.startswith("step_") for name in names(directory))
        survivor.close()
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        shutil.rmtree(directory)
    assert fatal > 40
    assert names(directory) == ["step_00000002", "step_00000003"]


def test_kill_at_random_moments(tmp_path: Path) -> None:
    rng = random.Random(0)
    shapes = {"w": (256, 1024), "v": (1000,)}
    done = mp.get_context("fork").Value("i", 0)
    in_a_save = 0
    for _ in range(10):
        start = done.value

        def train(first: int = start + 1) -> None:
            saver = manager(tmp_path, keep_last=2)
            for step in itertools.count(first):
                saver.save(step, state_at(step, shapes=shapes), {"step": step})
                done.value = max(done.value, step - 1)

        child = _in_child(train)
        while done.value == start:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join()
        in_a_save += any(name.startswith(".") for name in names(tmp_path))
        survivor = manager(tmp_path, keep_last=2)
        path = survivor.latest()
        assert path is not None
        step = read_metadata(path)["step"]
        target = map_state(state_at(step, shapes=shapes), torch.zeros_like)
        load(path, target)
        assert same(target, state_at(step, shapes=shapes))
        assert step >= done.value > start
        verify(pointer(tmp_path))
        done.value = step
        survivor.close()
    assert in_a_save >= 3


def test_left_overs_are_removed_unless_a_save_is_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_steps(tmp_path, 1)
    stale = tmp_path / ".tmp-step_00000002-0badcafe"
    stale.mkdir()
    (stale / "model_00000.safetensors").write_bytes(b"half")
    (tmp_path / ".tmp-latest-0badcafe").write_text("step_")
    (tmp_path / "notes.txt").write_text("mine")

    started, go = threading.Event(), threading.Event()
    write = storage.write_file

    def held(*args: Any) -> Any:
        started.set()
        assert go.wait(30)
        return write(*args)

    monkeypatch.setattr(storage, "write_file", held)
    alive = manager(tmp_path)
    assert names(tmp_path) == ["notes.txt", "step_00000001"]
    stale.mkdir()
    alive.save(2, state_at(2), {})
    assert started.wait(30)
    manager(tmp_path).close()
    assert len([name for name in names(tmp_path) if name.startswith(".tmp-step_00000002")]) == 2
    go.set()
    alive.close()
    assert same(loaded(tmp_path / "step_00000002"), state_at(2))
    manager(tmp_path).close()
    assert names(tmp_path) == ["notes.txt", "step_00000001", "step_00000002"]


# ------------------------------------------------------------------------------------------------------- retention


def test_retention(tmp_path: Path) -> None:
    save_steps(tmp_path, *range(10, 90, 10), keep_last=2, keep_every=30)
    assert names(tmp_path) == ["step_00000030", "step_00000060", "step_00000070", "step_00000080"]
    # A run that went back neither deletes what is ahead of it nor what it has just saved.
    save_steps(tmp_path, 65, keep_last=1, keep_every=0)
    assert names(tmp_path) == ["step_00000065", "step_00000070", "step_00000080"]


def test_old_ones_go_only_after_the_new_one_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    present = []
    publish = CheckpointManager._publish

    def watched(self: CheckpointManager, folder: Path, step: int) -> None:
        present.append(names(tmp_path))
        publish(self, folder, step)

    monkeypatch.setattr(CheckpointManager, "_publish", watched)
    save_steps(tmp_path, 1, 2, keep_last=1)
    assert "step_00000001" in present[1]
    assert names(tmp_path) == ["step_00000002"]


# ---------------------------------------------------------------------------------------------------------- damage


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (
        lambda p: os.truncate(p / "optimizer_00000.safetensors", 100),
        r"file optimizer_00000.safetensors: expected \d+ bytes, found 100",
    ),
    "flipped": (
        lambda p: flip(p / "model_00000.safetensors", -1),
        r"file model_00000.safetensors: expected xxh3_128 [0-9a-f]{32}, found [0-9a-f]{32}",
    ),
    "index flipped": (lambda p: flip(p / "index.json", 30), r"file index.json: expected xxh3_128 .*, found "),
    "missing file": (
        lambda p: (p / "model_00000.safetensors").unlink(),
        r"file model_00000.safetensors is missing: expected \d+ bytes",
    ),
    "missing manifest": (lambda p: (p / "manifest.json").unlink(), r"file manifest.json is missing"),
    "truncated manifest": (lambda p: os.truncate(p / "manifest.json", 90), r"file manifest.json is not a manifest"),
    "changed manifest": (
        lambda p: (p / "manifest.json").write_text((p / "manifest.json").read_text().replace('"step": 2', '"step": 3')),
        r"file manifest.json: expected xxh3_128 .*, found ",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_the_policy_followed(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    save_steps(tmp_path, 1, 2)
    newest = tmp_path / "step_00000002"
    inflict, expected = DAMAGE[kind]
    inflict(newest)
    for check in (lambda: verify(newest), lambda: loaded(newest)):
        with pytest.raises(CheckpointError, match=f"{re.escape(str(newest))} is damaged.*{expected}"):
            check()
    strict = manager(tmp_path)
    remedy = f"{re.escape(str(newest))} is damaged.*{expected}.*checkpoint.on_damage=previous, or delete {re.escape(str(newest))}"
    with pytest.raises(CheckpointError, match=remedy):
        strict.latest()
    assert not warned(caplog)
    assert manager(tmp_path, on_damage="previous").latest() == tmp_path / "step_00000001"
    assert re.search(expected, warned(caplog))
    shutil.rmtree(newest)
    assert strict.latest() == tmp_path / "step_00000001"


def test_no_checkpoint_is_none_but_all_damaged_is_an_error(tmp_path: Path) -> None:
    lenient = manager(tmp_path / "new", on_damage="previous")
    assert lenient.latest() is None
    save_steps(tmp_path / "new", 1, 2)
    for step in (1, 2):
        flip(tmp_path / "new" / f"step_{step:08d}" / "model_00000.safetensors", -1)
    with pytest.raises(CheckpointError, match=r"every checkpoint in .*new is damaged \(2 of them\)"):
        lenient.latest()


def test_ranks_agree_on_damage(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"

    def save(rank: int) -> None:
        saver = manager(folder)
        for step in (1, 2):
            saver.save(step, state_at(step, placer("dp2")), {})
        saver.close()

    def choose(rank: int) -> None:
        with pytest.raises(CheckpointError, match=r"file model_00001.safetensors: expected .* found ") as strict:
            manager(folder).latest()
        (tmp_path / f"error-{rank}").write_text(str(strict.value))
        assert manager(folder, on_damage="previous").latest() == folder / "step_00000001"
        with pytest.raises(CheckpointError, match=r"file model_00001.safetensors"):
            load(folder / "step_00000002", state_at(0, placer("dp2")))
        optimizer = {"optimizer": state_at(0, placer("dp2"))["optimizer"]}  # whose files are whole
        load(folder / "step_00000002", optimizer)
        assert same(optimizer["optimizer"], state_at(2, placer("dp2"))["optimizer"])

    run_ranks(2, tmp_path, save)
    flip(folder / "step_00000002" / "model_00001.safetensors", -1)
    run_ranks(2, tmp_path, choose)
    assert (tmp_path / "error-0").read_text() == (tmp_path / "error-1").read_text()


# ------------------------------------------------------------------------------------------------------- full disk


def test_full_disk_is_reported_and_leaves_the_previous_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = manager(tmp_path, keep_last=1)
    saver.save(1, state_at(1), {})
    saver.wait()
    fsync, calls = os.fsync, itertools.count()

    def full(descriptor: int) -> None:
        if next(calls) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    message = (
        r"saving step 2 to .*step_00000002 failed: .*No space left on device: '.*optimizer_00000.safetensors'.*"
        r"previous checkpoint step_00000001 is intact; the partial folder was removed.*lower checkpoint.keep_last"
    )
    for report in (saver.wait, lambda: saver.save(3, state_at(3), {})):
        monkeypatch.setattr(os, "fsync", full)
        calls = itertools.count()
        saver.save(2, state_at(2), {})
        with pytest.raises(CheckpointError, match=message):
            report()
        assert names(tmp_path) == ["step_00000001"]
        assert saver.latest() == tmp_path / "step_00000001"
    monkeypatch.undo()
    saver.save(2, state_at(2), {})
    saver.close()
    assert same(loaded(tmp_path / "step_00000002"), state_at(2))
    assert names(tmp_path) == ["step_00000002"]


def test_a_file_size_limit_of_the_system_stops_a_save(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)

    def child() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        saver = manager(tmp_path)
        saver.save(2, {"model": {"w": torch.zeros(100_000)}}, {})
        with pytest.raises(CheckpointError, match=r"File too large: '.*model_00000.safetensors'.*step_00000001 is intact"):
            saver.wait()

    process = _in_child(child)
    process.join()
    assert process.exitcode == 0
    assert names(tmp_path) == ["step_00000001"]


def test_a_failure_on_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"

    def save(rank: int) -> None:
        saver = manager(folder)
        saver.save(1, state_at(1, placer("dp2")), {})
        saver.wait()
        whole = storage.write_file
        if rank == 1:
            storage.write_file = lambda path, _: whole(Path("/proc/version"), [])  # not writable, not even for root
        saver.save(2, state_at(2, placer("dp2")), {})
        with pytest.raises(CheckpointError, match=r"rank 1: .*/proc/version.*step_00000001 is intact"):
            saver.wait()
        storage.write_file = whole
        assert saver.latest() == folder / "step_00000001"
        saver.save(2, state_at(2, placer("dp2")), {})
        saver.close()

    run_ranks(2, tmp_path, save)
    assert names(folder) == ["step_00000001", "step_00000002"]
    verify(folder / "step_00000002")


# ------------------------------------------------------------------------------------- other models, names of paths


def test_checkpoint_of_another_model_is_refused_with_names(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    other = {name: shape for name, shape in SHAPES.items() if name != "norm"} | {"embed.weight": (7, 6), "layers.1.D": (2,)}
    target = state_at(0, shapes=other)
    untouched = map_state(target, torch.clone)
    with pytest.raises(CheckpointError) as refused:
        load(tmp_path / "step_00000001", target)
    message = str(refused.value)
    assert "step_00000001 is a checkpoint of another model" in message
    assert "missing in it: model.layers.1.D, optimizer.layers.1.D.exp_avg" in message
    assert "only in it: model.norm, optimizer.norm.exp_avg" in message
    assert "model.embed.weight (checkpoint (7, 5), here (7, 6))" in message
    assert same(target, untouched)
    with pytest.raises(CheckpointError, match=r"model.norm \(checkpoint torch.float32, here torch.int64\)"):
        load(tmp_path / "step_00000001", {"model": state_at(0)["model"] | {"norm": torch.zeros(6, dtype=torch.int64)}})
    weights = {"model": map_state(state_at(0)["model"], torch.zeros_like)}  # groups that are not asked for are no misfit
    load(tmp_path / "step_00000001", weights)
    assert same(weights["model"], state_at(1)["model"])
    with pytest.raises(TypeError, match=r"optimizer.lr is a float"):
        manager(tmp_path).save(2, {"optimizer": {"lr": 0.1}}, {})


def test_resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    save_steps(run / "checkpoints", 5, 100_000_000)
    newest = run / "checkpoints" / "step_100000000"
    assert resolve(newest) == resolve(run / "checkpoints") == resolve(run) == newest
    monkeypatch.chdir(run / "checkpoints" / "step_00000005")
    assert resolve(".") == run / "checkpoints" / "step_00000005"
    with pytest.raises(CheckpointError, match=r"nowhere holds no checkpoint. Give a folder step_XXXXXXXX"):
        resolve(tmp_path / "nowhere")
    os.truncate(newest / "model_00000.safetensors", 10)
    with pytest.raises(CheckpointError, match=r"step_100000000 is damaged: file model.*Name another one in .*step_00000005"):
        resolve(run)


def test_without_file_locks_it_works_and_left_overs_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(sharded.fcntl, "flock", unsupported)
    (tmp_path / ".tmp-step_00000009-0badcafe").mkdir()
    save_steps(tmp_path, 1)
    assert names(tmp_path) == [".tmp-step_00000009-0badcafe", "step_00000001"]
    assert same(loaded(tmp_path / "step_00000001"), state_at(1))
