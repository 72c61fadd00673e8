"""Checkpoints: bit-equal on any mesh, saved beside a running trainer, kept and found as configured."""

from __future__ import annotations

import json
import os
import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from checkpoint_state import (
    MARKS,
    MESHES,
    SHAPES,
    draw,
    leaves,
    loaded,
    manager,
    map_state,
    names,
    one_thread,  # noqa: F401  (a fixture that MARKS names)
    placer,
    run_ranks,
    same,
    save_steps,
    state_at,
    warned,
)
from safetensors.torch import load_file
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from megatron_mamba.checkpoint import (
    CheckpointError,
    CheckpointManager,
    load,
    read_metadata,
    resolve,
    rng_state,
    set_rng_state,
    storage,
)

pytestmark = MARKS

# ---------------------------------------------------------------------------------------------- round trip, resharding


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
    run_ranks(ranks[before], save)
    run_ranks(ranks[after], read)

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

    run_ranks(2, save)
    for world in (1, 4):
        run_ranks(world, resume)


def test_state_of_a_rank_that_is_not_plain_data_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not with torch's advice to load it all the same."""
    saver = manager(tmp_path / "checkpoints")
    # A harmless object, which is refused like any other.
    saver.save(1, state_at(1), {}, rank_state={"path": tmp_path})
    saver.save(2, state_at(2), {}, rank_state={"a": 1})
    saver.close()

    def refused(step: int, message: str) -> None:
        with pytest.raises(CheckpointError, match=rf"file rank_00000\.pt {message}.*use another checkpoint") as error:
            load(tmp_path / "checkpoints" / f"step_{step:08d}", state_at(0), rank_state={})
        assert "weights_only" not in str(error.value)
        assert "\n" not in str(error.value)

    refused(1, "holds objects that are not plain data")
    monkeypatch.setattr(torch, "load", lambda *_, **__: [1])
    refused(2, "holds a list")


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

    run_ranks(2, save)
    run_ranks(2, read)
    state: dict[str, Any] = {}
    load(tmp_path / "checkpoints" / "step_00000001", state_at(0), rank_state=state)
    assert state == {}
    assert "2 ranks saved it, 1 load it" in warned(caplog)


# ---------------------------------------------------------------------------------------- asynchronous save, retention


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


def test_retention(tmp_path: Path) -> None:
    save_steps(tmp_path, *range(10, 90, 10), keep_last=2, keep_every=30)
    assert names(tmp_path) == ["step_00000030", "step_00000060", "step_00000070", "step_00000080"]
    # A run that went back neither deletes what is ahead of it nor what it has just saved.
    save_steps(tmp_path, 65, keep_last=1, keep_every=0)
    assert names(tmp_path) == ["step_00000065", "step_00000070", "step_00000080"]


def test_retention_of_saves_that_were_put_off(tmp_path: Path) -> None:
    save_steps(tmp_path, 10, 20, 31, 40, 50, 72, 80, 95, 100, keep_last=1, keep_every=30)
    assert names(tmp_path) == ["step_00000031", "step_00000072", "step_00000095", "step_00000100"]


def test_a_checkpoint_on_another_disk_linked_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is resumed from; retention and a save of the same step remove the link and leave what it points to."""
    folder = tmp_path / "checkpoints"
    save_steps(folder, 1, 2)
    for step in ("step_00000001", "step_00000002"):
        (folder / step).rename(tmp_path / step)
        (folder / step).symlink_to(tmp_path / step)
    assert same(loaded(resolve(folder)), state_at(2))
    assert manager(folder).latest() == folder / "step_00000002"
    (folder / "step_00000003").symlink_to(tmp_path / "not mounted")
    (folder / ".tmp-step_00000004").symlink_to(tmp_path / "step_00000001")  # As a process leaves it that dies while it prunes.
    save_steps(folder, 2, 3, keep_last=1)
    assert names(folder) == ["step_00000003"]
    assert not [*folder.glob(".tmp-*"), *folder.glob(".old-*")]
    assert [same(loaded(tmp_path / f"step_0000000{n}"), state_at(n)) for n in (1, 2)] == [True, True]
    assert f"what it leads to, {tmp_path / 'step_00000001'}, stays" in caplog.text


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


# ---------------------------------------------------------------------------------------- other models, names of paths


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
    save_steps(run / "checkpoints", 99_999_999, 100_000_000)
    newest = run / "checkpoints" / "step_100000000"
    assert resolve(newest) == resolve(run / "checkpoints") == resolve(run) == newest
    monkeypatch.chdir(run / "checkpoints" / "step_99999999")
    assert resolve(".") == run / "checkpoints" / "step_99999999"
    with pytest.raises(CheckpointError, match=r"nowhere holds no checkpoint. Give a folder step_XXXXXXXX"):
        resolve(tmp_path / "nowhere")
    os.truncate(newest / "model_00000.safetensors", 10)
    with pytest.raises(CheckpointError, match=r"step_100000000 is damaged: file model.*Name another one in .*step_99999999"):
        resolve(run)
