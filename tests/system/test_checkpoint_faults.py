"""Checkpoints under kill -9, damage and full disks: the latest one is always whole, and every fault is named."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import random
import re
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from checkpoint_state import (
    MARKS,
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

from megatron_mamba.checkpoint import CheckpointError, load, read_metadata, storage, verify

pytestmark = MARKS

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
    done = mp.get_context("fork").Value("i", 0, lock=False)

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
    # Without a lock: a child that is killed while it holds one takes it along.
    done = mp.get_context("fork").Value("i", 0, lock=False)
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


def test_without_file_locks_it_works_and_left_overs_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    (tmp_path / ".tmp-step_00000009-0badcafe").mkdir()
    save_steps(tmp_path, 1)
    assert names(tmp_path) == [".tmp-step_00000009-0badcafe", "step_00000001"]
    assert same(loaded(tmp_path / "step_00000001"), state_at(1))


# -------------------------------------------------------------------------------------------------------------- damage


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
        with pytest.raises(CheckpointError, match=r"model_00000.safetensors: expected .*model_00001.safetensors: exp") as strict:
            manager(folder).latest()
        (tmp_path / f"error-{rank}").write_text(str(strict.value))
        assert manager(folder, on_damage="previous").latest() == folder / "step_00000001"
        with pytest.raises(CheckpointError, match=r"file model_00001.safetensors"):
            load(folder / "step_00000002", state_at(0, placer("dp2")))
        optimizer = {"optimizer": state_at(0, placer("dp2"))["optimizer"]}  # whose files are whole
        load(folder / "step_00000002", optimizer)
        assert same(optimizer["optimizer"], state_at(2, placer("dp2"))["optimizer"])

    run_ranks(2, save)
    for rank in range(2):  # of equal size, so each is in another rank's share
        flip(folder / "step_00000002" / f"model_{rank:05d}.safetensors", -1)
    run_ranks(2, choose)
    assert (tmp_path / "error-0").read_text() == (tmp_path / "error-1").read_text()


# ----------------------------------------------------------------------------------------------------------- full disk


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

    run_ranks(2, save)
    assert names(folder) == ["step_00000001", "step_00000002"]
    verify(folder / "step_00000002")


def test_nesting_too_deep_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_deep(_: object) -> None:
        raise RecursionError("nested too deep")

    for name in ("manifest.json", "a.safetensors"):
        (tmp_path / name).write_bytes(bytes(8))
    monkeypatch.setattr("megatron_mamba.checkpoint.storage.json.loads", too_deep)
    with pytest.raises(CheckpointError, match="is not a manifest: RecursionError"):
        storage.read_manifest(tmp_path)
    with pytest.raises(CheckpointError, match="is not a safetensors file: RecursionError"):
        storage.read_safetensors_header(tmp_path / "a.safetensors")
