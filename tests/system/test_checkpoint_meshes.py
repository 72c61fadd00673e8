"""A checkpoint of one mesh goes on on any other: every element where it belongs, and the same losses and gradient norms."""

from __future__ import annotations

import errno
import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_state import draw, manager
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import Shard, distribute_tensor

from harness import on_ranks, owned
from megatron_mamba.checkpoint import CheckpointError, load, read_metadata, resolve, storage, tokenizer_path
from megatron_mamba.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LoggingConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    ScheduleConfig,
    TrainerConfig,
    WandbConfig,
    from_dict,
    to_dict,
)
from megatron_mamba.model import build
from megatron_mamba.model.parameters import parameter_table
from megatron_mamba.optim import build_optimizer, optimizer_state
from megatron_mamba.parallel import fsdp
from megatron_mamba.parallel.context import ParallelContext
from megatron_mamba.train import loop
from megatron_mamba.train.metrics import read_records
from tiny import tiny

pytestmark = pytest.mark.ranks

TOOL = Path(__file__).parents[2] / "tools/consolidate.py"

# Two groups and two key/value heads, which four tp ranks share. No mesh of several ranks divides all dimensions: groups have 5
# rows, x_proj has 13, and three or five dp ranks leave the last of them none of the 4 or 8 rows of in_proj_dt.
MODEL = tiny("Mm*-", vocab_size=60, mamba2={"d_inner": 64, "state_size": 5})
MESHES: dict[str, dict[str, int]] = {
    "one": {},
    "tp2 dp2": {"tp": 2, "dp_shard": 2},
    "dp2": {"dp_shard": 2},
    "tp4": {"tp": 4},
    "dp4": {"dp_shard": 4},
    "replicas2 dp2": {"dp_replicate": 2, "dp_shard": 2},
    "dp5": {"dp_shard": 5},
    "tp2 dp3": {"tp": 2, "dp_shard": 3},
    "replicas3 tp2": {"dp_replicate": 3, "tp": 2},
    "pp2": {"pp": 2},
    "pp2 cp2": {"pp": 2, "cp": 2},
}
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "pp2 interleaved": ("pp2", {"schedule": "interleaved"}),
    "pp2 cp2 zbv": ("pp2 cp2", {"schedule": "zbv", "balance": "time"}),
}
"""Meshes with a schedule of their own, one of them with stages by measured time."""

# --------------------------------------------------------------------------------------------- every element in its place

STATE = ("", ".exp_avg", ".exp_avg_sq")


def global_tensors() -> dict[str, Tensor]:
    """What the checkpoint of the model must hold, by full name: another random tensor each, and numbers of steps."""
    tensors = {}
    for i, (name, row) in enumerate(parameter_table(MODEL).items()):
        tensors |= {f"{name}{key}": draw(f"{name}{key}", row.shape, 0).double() for key in STATE}
        tensors[f"{name}.step"] = torch.tensor(float(i))
    return tensors


def on_this_rank(context: ParallelContext) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, tuple[slice, ...]]]:
    """Model and optimizer as the trainer hands them over, this rank's part of each tensor, and where in the global one it
    lies, both by the name in :func:`global_tensors`."""
    model = build(MODEL, context, precision="fp64")
    named = dict(model.named_parameters())
    state = optimizer_state(build_optimizer(named.items(), parameter_table(MODEL), OptimConfig()))
    mine, slices = {}, {}
    for name, index in owned(model).items():
        for key, tensor in {"": named[name], **{f".{key}": value for key, value in state[name].items()}}.items():
            mine[f"{name}{key}"] = fsdp.local(tensor.detach())
            slices[f"{name}{key}"] = () if key == ".step" else index
    return {"model": named, "optimizer": state}, mine, slices


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Saves the global tensors on a mesh (once) and gives the checkpoint's path; for reading only."""

    def body(context: ParallelContext, folder: Path) -> None:
        tensors, mine, slices = on_this_rank(context)
        for name, value in global_tensors().items():
            mine[name].copy_(value[slices[name]])
        saver = manager(folder)
        saver.save(1, tensors, {"config": to_dict(Config(model=MODEL)), "step": 1, "tokenizer": "tokenizer.model"})
        saver.close()

    @lru_cache
    def save(mesh: str) -> Path:
        folder = tmp_path_factory.mktemp("saved")
        on_ranks(MESHES[mesh], lambda context: body(context, folder))
        (folder / "tokenizer.model").touch()
        return folder / "step_00000001"

    return save


@pytest.mark.parametrize(("before", "after"), [("tp2 dp3", "dp5"), ("replicas3 tp2", "tp2 dp3"), ("dp5", "tp4")])
def test_every_element_goes_where_it_belongs(before: str, after: str, saved: Callable[[str], Path]) -> None:
    """The ranks' parts are cut out of global tensors by the rule that the model is built by, not by the one that saves."""
    path, expected = saved(before), global_tensors()
    whole = {
        "model": {name: torch.zeros(row.shape, dtype=torch.float64) for name, row in parameter_table(MODEL).items()},
        "optimizer": {
            name: {key: torch.zeros_like(expected[f"{name}.{key}"]) for key in ("exp_avg", "exp_avg_sq", "step")}
            for name in parameter_table(MODEL)
        },
    }
    load(path, whole)
    for name, value in whole["model"].items():
        assert torch.equal(value, expected[name]), name
        for key, moment in whole["optimizer"][name].items():
            assert torch.equal(moment, expected[f"{name}.{key}"]), f"{name}.{key}"

    def read(context: ParallelContext) -> None:
        tensors, mine, slices = on_this_rank(context)
        load(path, tensors)
        wrong = [name for name, value in expected.items() if not torch.equal(mine[name], value[slices[name]])]
        assert not wrong, wrong
        empty = context.sum_over_tokens(torch.tensor(float(any(part.numel() == 0 for part in mine.values()))))
        assert (empty > 0) == ("dp3" in after or "dp5" in after), "the model is to leave a rank of these meshes without rows"

    on_ranks(MESHES[after], read)


@pytest.mark.parametrize("mesh", ["tp2 dp3", "replicas3 tp2", "replicas2 dp2"])
def test_ranks_share_the_writing_evenly(mesh: str, saved: Callable[[str], Path]) -> None:
    """Each element is written once, and no rank writes much more than its share, whoever holds copies."""
    written: dict[str, int] = {}
    for file in saved(mesh).glob("*.safetensors"):
        with safe_open(file, framework="pt") as content:
            size = sum(content.get_tensor(key).nbytes for key in content.keys())  # noqa: SIM118
        rank = file.stem.rpartition("_")[2]
        written[rank] = written.get(rank, 0) + size
    total = sum(value.nbytes for value in global_tensors().values())
    assert sum(written.values()) == total
    share = total / len(written)
    assert max(written.values()) <= 1.1 * share, {rank: size / share for rank, size in written.items()}


@pytest.mark.parametrize("state", ["copies", "copies beside own parts"])
def test_large_copies_do_not_pile_up(state: str, tmp_path: Path) -> None:
    """Of eight small tensors and as much in large ones behind them, each of two ranks writes one half."""

    def save(context: ParallelContext) -> None:
        if state == "copies":
            tensors = {f"small{i}": torch.zeros(1, 100) for i in range(8)} | {"large": torch.zeros(800)}
        else:
            first = [Shard(0)]  # one row: the first rank's
            tensors = {f"small{i}": distribute_tensor(torch.zeros(1, 100), context.mesh["dp_shard"], first) for i in range(8)}
            tensors = {"large0": torch.zeros(400), "large1": torch.zeros(400)} | tensors
        saver = manager(tmp_path)
        saver.save(1, {"model": tensors}, {})
        saver.close()

    on_ranks({"dp_shard": 2}, save)
    for rank in (0, 1):
        assert sum(t.numel() for t in load_file(tmp_path / f"step_00000001/model_0000{rank}.safetensors").values()) == 800


# ----------------------------------------------------------------------------------------------------------- one file


def consolidate(*arguments: str) -> int:
    """tools/consolidate.py with these arguments."""
    spec = importlib.util.spec_from_file_location("consolidate", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    result: int = module.main(list(arguments))
    return result


@pytest.mark.parametrize("dtype", [None, "fp32", "bf16"])
def test_one_file_has_the_global_tensors(dtype: str | None, saved: Callable[[str], Path], tmp_path: Path) -> None:
    file, expected = tmp_path / "new/model.safetensors", global_tensors()
    arguments = ["--checkpoint", str(saved("tp2 dp3").parent), "--output", str(file)]
    assert consolidate(*arguments, *(["--dtype", dtype] if dtype else [])) == 0
    found = load_file(file)
    assert found.keys() == parameter_table(MODEL).keys()
    for name, row in parameter_table(MODEL).items():
        wanted = {None: torch.float64, "fp32": torch.float32, "bf16": torch.float32 if row.fp32 else torch.bfloat16}[dtype]
        assert torch.equal(found[name], expected[name].to(wanted)), name
        assert found[name].dtype == wanted, name
    with safe_open(file, framework="pt") as content:
        metadata = content.metadata()
    assert from_dict(Config, json.loads(metadata["config"])).model == MODEL
    assert metadata["step"] == "1"
    assert {path.name for path in file.parent.iterdir()} == {"model.safetensors", "model.tokenizer"}
    # The file is a checkpoint of the model, without an optimizer.
    target = {"model": {name: torch.zeros_like(value) for name, value in found.items()}}
    kept = load(resolve(file), target)
    assert kept["step"] == 1
    assert tokenizer_path(file, kept) == file.parent / "model.tokenizer/tokenizer.model"
    assert all(torch.equal(target["model"][name], value) for name, value in found.items())
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a checkpoint of another model; missing in it: optimizer\.x"):
        load(file, target | {"optimizer": {"x": torch.zeros(1)}})


def full_disk(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_one_file_is_written_whole_or_not_at_all(
    saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(saved("dp5").parent, tmp_path, dirs_exist_ok=True)
    checkpoint, file = tmp_path / "step_00000001", tmp_path / "model.safetensors"
    with pytest.raises(CheckpointError, match=r"output = .*model\.bin: is not called \*\.safetensors"):
        consolidate("--checkpoint", str(checkpoint), "--output", str(tmp_path / "model.bin"))
    consolidate("--checkpoint", str(checkpoint), "--output", str(file))
    whole = file.read_bytes()
    with pytest.raises(CheckpointError, match=r"output = .*model\.safetensors: exists"):
        consolidate("--checkpoint", str(checkpoint), "--output", str(file))
    assert file.read_bytes() == whole
    for content, message in [
        (whole[:-1], rf"expected {len(whole)} bytes, found {len(whole) - 1}"),
        (whole + b"x", rf"expected {len(whole)} bytes, found {len(whole) + 1}"),
        (b"no such thing", "is not a safetensors file"),
    ]:
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            read_metadata(resolve(file))
        with pytest.raises(CheckpointError, match=message):
            load(file, {"model": {}})
    with pytest.raises(CheckpointError, match=r"holds no configuration. Give a file that tools/consolidate\.py wrote"):
        read_metadata(checkpoint / "model_00000.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "fsync", full_disk)
        with pytest.raises(CheckpointError, match=r"other\.safetensors cannot be written: .*No space left on device"):
            consolidate("--checkpoint", str(checkpoint), "--output", str(tmp_path / "other.safetensors"))
    assert not list(tmp_path.glob("*other*"))
    data = bytearray((checkpoint / "model_00000.safetensors").read_bytes())
    data[-1] ^= 1
    (checkpoint / "model_00000.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"is damaged: file model_00000\.safetensors"):
        consolidate("--checkpoint", str(checkpoint), "--output", str(tmp_path / "other.safetensors"))
    assert not list(tmp_path.glob("*other*"))


# ------------------------------------------------------------------------------------------------- training goes on alike

SAVED, STEPS, BATCH = 3, 4, 4
"""The step at which a run moves to another mesh, and over how many more steps of how many sequences it is compared."""


def config_for(
    run_dir: Path, mesh: str, last: int, model: ModelConfig = MODEL, *, reshard: bool = True, evaluate: int = 0, **checkpoint: Any
) -> Config:
    """A run on a mesh, up to step `last`, with a validation every `evaluate` steps."""
    mesh, schedule = LAYOUTS.get(mesh, (mesh, {}))
    sizes = {"dp_shard": 1} | MESHES[mesh]
    layout = ParallelConfig(**sizes, **schedule, sequence_parallel="tp" in sizes, reshard_after_forward=reshard)
    at_once = BATCH // (sizes["dp_shard"] * sizes.get("dp_replicate", 1))
    return Config(
        model=model,
        parallel=layout,
        data=DataConfig(kind="synthetic", seq_length=16),
        optim=OptimConfig(lr=1e-2, min_lr=1e-3, schedule=ScheduleConfig(warmup_samples=8)),
        trainer=TrainerConfig(
            train_samples=100 * BATCH,
            stop_after_samples=last * BATCH,
            global_batch_size=BATCH,
            micro_batch_size=1 if "pp" in sizes else at_once,
            precision="fp64",
        ),
        checkpoint=CheckpointConfig(**{"interval": SAVED, "keep_last": 100} | checkpoint),
        logging=LoggingConfig(interval=1, console=False, tensorboard=False, wandb=WandbConfig(mode="disabled")),
        eval=EvalConfig(interval=evaluate, samples=2 * BATCH),
        run=RunConfig(dir=str(run_dir)),
    ).validate()


def run_in_turn(mesh: str, *configs: Config) -> None:
    """Start or resume runs on a mesh."""

    def body(context: ParallelContext) -> None:
        log = logging.getLogger("megatron_mamba")
        for config in configs:
            run_dir = Path(config.run.dir)
            run_dir.mkdir(exist_ok=True)
            handler = logging.FileHandler(run_dir / f"{context.global_rank}.log")
            log.addHandler(handler)
            own = ParallelContext.over(context.mesh, context.device, config.parallel)
            trainer = loop.Trainer(config, own, loop.StopRequest())
            trainer.run()
            trainer.close()
            log.removeHandler(handler)

    on_ranks(MESHES[LAYOUTS.get(mesh, (mesh, {}))[0]], body)


def run(run_dir: Path, mesh: str, *settings: Any, **checkpoint: Any) -> None:
    """Start or resume the run of :func:`config_for`."""
    run_in_turn(mesh, config_for(run_dir, mesh, *settings, **checkpoint))


def figures(run_dir: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm by step."""
    lines = read_records(run_dir / "metrics.jsonl")
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in lines if line["kind"] == "train"}


def logged(run_dir: Path) -> str:
    """What all ranks had to say."""
    return "".join(file.read_text() for file in run_dir.glob("*.log"))


@pytest.fixture(scope="module", autouse=True)
def no_plots() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "draw_run", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run that is not interrupted, and the beginnings of the same on one rank and on pipelines; all saved step 3."""
    folder = tmp_path_factory.mktemp("runs")
    run(folder / "tp2 dp2", "tp2 dp2", SAVED + STEPS)
    others = ("one", "pp2 cp2 zbv", "pp2 interleaved")
    for mesh in others:
        run(folder / mesh, mesh, SAVED)
    return {mesh: folder / mesh for mesh in ("tp2 dp2", *others)}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("tp2 dp2", "tp4"),
        ("tp2 dp2", "dp4"),
        ("tp2 dp2", "one"),
        pytest.param("tp2 dp2", "replicas2 dp2", marks=pytest.mark.slow),
        ("one", "tp2 dp2"),
        ("tp2 dp2", "pp2"),
        ("pp2 cp2 zbv", "tp4"),
        pytest.param("pp2 cp2 zbv", "one", marks=pytest.mark.slow),
        ("pp2 interleaved", "pp2"),
        pytest.param("pp2 interleaved", "pp2 cp2 zbv", marks=pytest.mark.slow),
    ],
)
def test_training_continues_on_another_mesh(
    before: str, after: str, runs: dict[str, Path], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    shutil.copytree(runs[before] / "checkpoints/step_00000003", tmp_path / "checkpoints/step_00000003")
    run(tmp_path, after, SAVED + STEPS)
    expected, found = figures(runs["tp2 dp2"]), figures(tmp_path)
    assert list(found) == list(range(SAVED + 1, SAVED + STEPS + 1))
    errors = [abs(a - b) / abs(b) for step, values in found.items() for a, b in zip(values, expected[step], strict=True)]
    record_property("largest difference", max(errors))
    assert max(errors) <= 1e-10, errors
    # Said once, and not by every rank.
    names = {"tp2 dp2": "dp_shard 2 x tp 2", "replicas2 dp2": "dp_replicate 2 x dp_shard 2", "tp4": "tp 4", "dp4": "dp_shard 4"}
    names |= {"pp2": "pp 2", "pp2 interleaved": "pp 2", "pp2 cp2 zbv": "pp 2 x cp 2"}
    was, is_ = (names.get(mesh, "one rank") for mesh in (before, after))
    assert logged(tmp_path).count(f"was saved on {was} and is laid out anew over {is_}\n") == (was != is_)


def test_weights_of_another_mesh_start_a_run(runs: dict[str, Path], tmp_path: Path) -> None:
    """checkpoint.init_from, a checkpoint or one file: the first loss is that of the weights; another model is refused."""
    source = runs["tp2 dp2"] / "checkpoints/step_00000003"
    run(tmp_path / "a", "tp4", 1, init_from=str(source))
    run(tmp_path / "b", "one", 1, init_from=str(source))
    assert "step_00000003 was saved on dp_shard 2 x tp 2 and is laid out anew over tp 4\n" in logged(tmp_path / "a")
    (loss, norm), other = figures(tmp_path / "a")[1], figures(tmp_path / "b")[1]
    assert other == pytest.approx((loss, norm), rel=1e-10)
    assert loss < figures(runs["tp2 dp2"])[1][0]
    file = tmp_path / "model.safetensors"
    consolidate("--checkpoint", str(source), "--output", str(file))
    run(tmp_path / "c", "one", 1, init_from=str(file))
    assert figures(tmp_path / "c")[1] == other
    with pytest.raises(Exception, match=r"model\.mamba2\.state_size = 6: the checkpoint .* is of another model, with 5"):
        run(tmp_path / "d", "one", 1, tiny("Mm*-", vocab_size=60, mamba2={"d_inner": 64, "state_size": 6}), init_from=str(source))


@pytest.mark.parametrize(
    ("mesh", "tied", "reshard"),
    [("dp2", True, True), ("dp2", False, False), ("dp2", True, False), ("pp2 interleaved", False, True), ("pp2", False, False)],
)
def test_a_checkpoint_after_a_validation(mesh: str, tied: bool, reshard: bool, tmp_path: Path) -> None:
    """Validation gathers weights that no backward pass gives up (the root's of tied embeddings; every unit's, where they are
    kept through a step): a checkpoint of the same step is that of a run without it, and training goes on from it alike."""
    model = replace(MODEL, tie_embeddings=tied)
    run_in_turn(
        mesh,
        config_for(tmp_path / "plain", mesh, SAVED + 2, model, reshard=reshard),
        *(config_for(tmp_path / "validated", mesh, last, model, reshard=reshard, evaluate=SAVED) for last in (SAVED, SAVED + 2)),
    )
    lines = read_records(tmp_path / "validated/metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "valid"] == [SAVED]
    plain, validated = (tmp_path / name / f"checkpoints/step_{SAVED:08}" for name in ("plain", "validated"))
    files = sorted(file.name for file in plain.glob("*.safetensors"))
    assert files == sorted(file.name for file in validated.glob("*.safetensors"))
    for file in files:
        expected, found = load_file(plain / file), load_file(validated / file)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert figures(tmp_path / "validated") == figures(tmp_path / "plain")
