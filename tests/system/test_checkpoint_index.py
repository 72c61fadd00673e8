"""Checkpoints that say something else than was saved: refused, with tensor, file and remedy, before a tensor is touched."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_mamba.checkpoint import CheckpointError, CheckpointManager, load, read_metadata, storage, tokenizer_path, verify
from megatron_mamba.checkpoint.consolidated import consolidate
from megatron_mamba.checkpoint.coverage import check_cover
from megatron_mamba.checkpoint.hf_source import checkpoint_tensors
from megatron_mamba.config import Config, ModelConfig, to_dict
from megatron_mamba.files import plain_name

JsonObject = dict[str, Any]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Step 1 of a run: a matrix, a vector and a scalar, and the state of a rank."""
    manager = CheckpointManager(tmp_path / "run", keep_last=2, keep_every=0, async_save=False, on_damage="error")
    tensors = {"a": torch.arange(12.0).view(4, 3), "b": torch.ones(2), "empty": torch.ones(0, 2)}
    manager.save(1, {"model": tensors, "optimizer": {"step": torch.tensor(3.0)}}, {"config": {}}, rank_state={"x": 1})
    manager.close()
    return manager.path(1)


def targets() -> JsonObject:
    model = {"a": torch.full((4, 3), -7.0), "b": torch.full((2,), -7.0), "empty": torch.ones(0, 2)}
    return {"model": model, "optimizer": {"step": torch.tensor(-7.0)}}


def rewrite(path: Path, change_index: Callable[[JsonObject], Any], change_files: Callable[[JsonObject], Any]) -> None:
    """Change the index and the manifest's files, with checksums that fit."""
    index, manifest = json.loads((path / "index.json").read_text()), storage.read_manifest(path)
    change_index(index)
    (path / "index.json").unlink()
    manifest["files"]["index.json"] = storage.write_file(path / "index.json", [json.dumps(index).encode()])
    change_files(manifest["files"])
    (path / "manifest.json").unlink()
    facts = {name: manifest[name] for name in ("step", "world_size", "torch")}
    storage.write_manifest(path, facts, manifest["files"])


def same(_: Any) -> None:
    """Change nothing."""


OFFSETS, SIZES, FILE, START = range(4)


def put(tensor: str, field: int, value: Any) -> Callable[[JsonObject], None]:
    """Another value in the first chunk of a tensor."""
    return lambda index: index[tensor]["chunks"][0].__setitem__(field, value)


A, B, SHARD = "model.a", "model.b", "model_00000.safetensors"
INDEX: dict[str, tuple[Callable[[JsonObject], Any], str]] = {
    "no chunk": (lambda i: i[A]["chunks"].clear(), r"model.a: 12 of the 12 elements .* are in no chunk"),
    "no chunk of a scalar": (lambda i: i["optimizer.step"]["chunks"].clear(), r"optimizer.step: 1 of the 1 elements"),
    "half the rows": (put(A, SIZES, [2, 3]), r"model.a: 6 of the 12 elements"),
    "beyond the rows": (put(B, OFFSETS, [1]), r"model.b: the chunk at \[1\] of sizes \[2\] does not lie in its shape \[2\]"),
    "before the rows": (put(B, OFFSETS, [-1]), r"model.b: the chunk at \[-1\]"),
    "twice": (lambda i: i[B]["chunks"].append(i[B]["chunks"][0]), r"model.b: the chunks at .* overlap"),
    "other dimensions": (put(A, SIZES, [12]), r"model.a: the chunk at \[0, 0\] of sizes \[12\]"),
    "no whole number": (put(B, SIZES, [2.0]), r"model.b: the chunk at \[0\] of sizes \[2\.0\]"),
    "no shape": (lambda i: i[B].update(shape="2"), r"model.b: '2' is not a shape"),
    "bytes before the file": (put(B, START, -8), rf"model.b: file {SHARD} of \d+ bytes does not hold bytes -8 to 0"),
    "bytes after the file": (put(B, START, 10**6), rf"model.b: file {SHARD} of .* 1000000 to 1000008"),
    "another's bytes": (lambda i: put(B, START, i[A]["chunks"][0][START])(i), rf"model.[ab]: shares bytes of file {SHARD}"),
    "another group's file": (put(B, FILE, "optimizer_00000.safetensors"), r"model.b: file optimizer_00000\S* is none that"),
    "a file that is not listed": (put(B, FILE, "model_00009.safetensors"), r"model.b: file model_00009\S* is none that"),
    "a path": (put(B, FILE, f"../{SHARD}"), rf"model.b: file: '\.\./{SHARD}' is not the plain name"),
    "a chunk without a place": (lambda i: i[B]["chunks"][0].pop(), r"model.b: not enough values"),
    "another kind of number": (lambda i: i[B].update(dtype="F31"), r"KeyError\('F31'\)"),
}


@pytest.mark.parametrize("kind", INDEX)
def test_an_index_must_cover_every_tensor_exactly(checkpoint: Path, kind: str) -> None:
    change, expected = INDEX[kind]
    rewrite(checkpoint, change, same)
    found, before = targets(), targets()
    manager = CheckpointManager(checkpoint.parent, keep_last=2, keep_every=0, async_save=False, on_damage="error")
    for use in (
        lambda: load(checkpoint, found), lambda: load(checkpoint, found, verified=True), lambda: verify(checkpoint),
        lambda: checkpoint_tensors(checkpoint), manager.latest,
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=rf"{checkpoint} is damaged: file index\.json, (tensor )?{expected}.*\. \w+ "):
            use()
    assert all(torch.equal(found["model"][name], value) for name, value in before["model"].items())
    assert found["optimizer"]["step"] == -7


def test_cover_of_pieces_in_two_dimensions() -> None:
    """Rows and columns cut on a mesh cover; as many elements in pieces that overlap and leave a hole do not."""
    quarters = [([row, column], [2, 3]) for row in (0, 2) for column in (0, 3)]
    check_cover([4, 6], quarters)
    check_cover([4, 6], [([0, 0], [4, 1]), ([0, 1], [1, 5]), ([1, 1], [3, 5])])
    with pytest.raises(ValueError, match="6 of the 24 elements"):
        check_cover([4, 6], quarters[1:])
    for last in ([2, 2], [1, 3]):
        with pytest.raises(ValueError, match="overlap"):
            check_cover([4, 6], [*quarters[:3], (last, [2, 3])])


def link(path: Path, name: str) -> None:
    (path / name).rename(path.parent / name)
    (path / name).symlink_to(path.parent / name)


def listed(change: Callable[[JsonObject], Any]) -> Callable[[Path], None]:
    """Change what the manifest lists."""
    return lambda path: rewrite(path, same, change)


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a path": (listed(lambda files: files.update({"../x": files["index.json"]})), r"manifest.json.*'\.\./x' is not the plain"),
    "no size": (listed(lambda files: files["index.json"].__dict__.update(size="9")), "manifest.json is not a manifest: .*size"),
    "no index": (listed(lambda files: files.pop("index.json")), "file manifest.json does not list index.json"),
    "no metadata": (listed(lambda files: files.pop("metadata.json")), "file manifest.json does not list metadata.json"),
    "a linked file": (lambda path: link(path, SHARD), rf"file {SHARD} cannot be read: it is a link"),
    "a linked index": (lambda path: link(path, "index.json"), r"file index.json cannot be read: it is a link"),
    "a linked manifest": (lambda path: link(path, "manifest.json"), r"file manifest.json cannot be read: it is a link"),
}


@pytest.mark.parametrize("kind", FILES)
def test_only_files_that_the_manifest_lists_are_read(checkpoint: Path, kind: str) -> None:
    change, expected = FILES[kind]
    change(checkpoint)
    with pytest.raises(CheckpointError, match=rf"is damaged: .*{expected}.*Load another one"):
        load(checkpoint, targets())


def test_a_rank_s_state_that_is_not_listed_is_not_read(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    rewrite(checkpoint, same, lambda files: files.pop("rank_00000.pt"))
    state: JsonObject = {}
    load(checkpoint, targets(), rank_state=state)
    assert state == {}
    assert "none was saved" in caplog.text


def test_a_checkpoint_s_folder_may_be_a_link(checkpoint: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    checkpoint.rename(moved)
    checkpoint.symlink_to(moved)
    found, state = targets(), {"x": 0}
    load(checkpoint, found, rank_state=state)
    assert found["model"]["a"].flatten().tolist() == list(range(12))
    assert state == {"x": 1}


@pytest.mark.parametrize("saved", ["/etc/x.model", "../x.model", "tokenizer/../../x.model", "", "tokenizer//x.model", 7])
def test_a_tokenizer_lies_beside_its_checkpoint(checkpoint: Path, saved: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"tokenizer {re.escape(repr(saved))}, which does not lie below .*--tokenizer PATH"):
        tokenizer_path(checkpoint, {"tokenizer": saved})


def test_a_tokenizer_is_no_link(checkpoint: Path) -> None:
    (checkpoint.parent / "tokenizer").mkdir()
    file = checkpoint.parent / "tokenizer/tokenizer.model"
    file.touch()
    record = {"tokenizer": "tokenizer/tokenizer.model"}
    assert tokenizer_path(checkpoint, record) == file
    file.rename(checkpoint.parent / "x.model")
    file.symlink_to(checkpoint.parent / "x.model")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model is a link. Put the file itself there"):
        tokenizer_path(checkpoint, record)


def single_file(path: Path, tensors: JsonObject, size: int, metadata: JsonObject) -> Path:
    header = json.dumps({"__metadata__": metadata, **tensors}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    return path


@pytest.mark.parametrize(
    ("offsets", "size", "message"),
    [
        ([4, 12], 12, r"tensor b: expected data_offsets \[8, 16\], found \[4, 12\]"),
        ([12, 20], 20, r"tensor b: expected data_offsets \[8, 16\], found \[12, 20\]"),
        ([8, 12], 12, r"tensor b: expected data_offsets \[8, 16\], found \[8, 12\]"),
        ([-8, 0], 8, r"not a safetensors file: .*tensor b: shape \[2\], data_offsets \[-8, 0\]"),
        ([8, 16], 12, r"expected \d+ bytes, found \d+"),
    ],
)
def test_a_single_file_s_tensors_follow_each_other(tmp_path: Path, offsets: list[int], size: int, message: str) -> None:
    entries = {name: {"dtype": "F32", "shape": [2], "data_offsets": at} for name, at in (("a", [0, 8]), ("b", offsets))}
    file = single_file(tmp_path / "m.safetensors", entries, size, {"config": "{}"})
    target = {"model": {"a": torch.full((2,), -7.0), "b": torch.full((2,), -7.0)}}
    with pytest.raises(CheckpointError, match=message):
        load(file, target)
    assert target["model"]["a"].tolist() == [-7, -7]


def test_a_single_file_s_metadata_is_json(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"m\.safetensors: its metadata is not JSON"):
        read_metadata(single_file(tmp_path / "m.safetensors", {}, 0, {"config": "{"}))


@pytest.mark.parametrize("config", [None, "5", "{}", '{"model": {}, "trainer": null}'], ids=str)
def test_a_single_file_holds_a_configuration(config: str | None, tmp_path: Path) -> None:
    metadata: Any = 5 if config is None else {"config": config}
    with pytest.raises(CheckpointError, match=r"m\.safetensors (holds no configuration|is not a safetensors file)"):
        read_metadata(single_file(tmp_path / "m.safetensors", {}, 0, metadata))


def test_a_file_that_is_cut_while_it_is_exported_is_one_line(checkpoint: Path) -> None:
    get = checkpoint_tensors(checkpoint)
    (checkpoint / SHARD).write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"step_00000001 could not be read: .*{SHARD} ends at byte"):
        get("a")


def test_a_parameter_that_is_not_there_is_named(checkpoint: Path, tmp_path: Path) -> None:
    metadata = {"config": to_dict(Config(model=ModelConfig("tiny", "M", 64)))}
    manager = CheckpointManager(checkpoint.parent, keep_last=2, keep_every=0, async_save=False, on_damage="error")
    manager.save(2, {"model": {"a": torch.ones(2)}}, metadata)
    with pytest.raises(CheckpointError, match=r"step_00000002 has no parameter \S+: it is of another model than its configuration"):
        consolidate(manager.path(2), tmp_path / "m.safetensors")
    assert not list(tmp_path.glob("*m.safetensors*"))


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a\\b", "a\0", None, 3])
def test_plain_names(name: object) -> None:
    assert plain_name("model_00000.safetensors", "file") == "model_00000.safetensors"
    with pytest.raises(ValueError, match=r"^here: .* is not the plain name of a file"):
        plain_name(name, "here")
