"""What a run may change from one start to the next, and what it refuses because the samples would be others."""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_train import config_for, losses, records

from harness import on_ranks
from megatron_mamba.checkpoint import read_metadata, resolve
from megatron_mamba.checkpoint.hf_source import checkpoint_tensors, write_checkpoint
from megatron_mamba.config import BatchRampConfig, ConfigError, DataConfig, InitConfig, ParallelConfig, ScheduleConfig
from megatron_mamba.data.indexed import IndexedWriter, bin_path, idx_path
from megatron_mamba.data.packing import PackedDataset, Sample
from megatron_mamba.parallel.context import ParallelContext
from megatron_mamba.train import loop, resume
from megatron_mamba.train.loop import train
from tiny import tiny

STOPPED = {"stop_after_samples": 24}
TOKENS = 48 * 24


@pytest.fixture(scope="module", autouse=True)
def no_plots() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "draw_run", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpora a, b and c, which differ in their tokens only, and the tokenizers that are said to have made a and b."""
    folder = tmp_path_factory.mktemp("corpora")
    for seed, name in enumerate("abc"):
        rng = np.random.default_rng(seed)
        with IndexedWriter(folder / name, np.uint16) as writer:
            for _ in range(40):
                writer.add_document(rng.integers(0, 61, 25))
    return folder


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Which samples of which corpora are read to train on."""
    seen: list[tuple[str, int]] = []
    read = PackedDataset.__getitem__

    def noted(self: PackedDataset, number: int) -> Sample:
        if self._split == "train":
            seen.append((Path(self._reader.prefix).name, number))
        return read(self, number)

    monkeypatch.setattr(PackedDataset, "__getitem__", noted)
    return seen


def data(folder: Path, **changes: Any) -> DataConfig:
    """Of corpora of `folder`: changes are those of settings, or corpora and their weights."""
    blend = {str(folder / name): changes.pop(name) for name in [*changes] if name in "abc"}
    return DataConfig(**{"seq_length": 24, "split": (8.0, 1.0, 1.0), "blend": blend} | changes)


def test_a_changed_blend_reads_each_corpus_on(
    folder: Path, tmp_path: Path, seen: list[tuple[str, int]], caplog: pytest.LogCaptureFixture
) -> None:
    train(config_for(tmp_path, data=data(folder, a=3.0, b=1.0), trainer=STOPPED))
    train(config_for(tmp_path, data=data(folder, c=1.0, b=1.0, a=1.0)))
    counts = Counter(corpus for corpus, _ in seen)
    assert counts == {"a": 18 + 8, "b": 6 + 8, "c": 8}
    assert sorted(seen) == [(corpus, number) for corpus in "abc" for number in range(counts[corpus])]
    assert f"{folder}/a: share 0.75 -> 0.3333 after 18 samples" in caplog.text
    assert f"{folder}/c begins at its first sample" in caplog.text


def test_a_reordered_blend_of_moved_corpora_changes_nothing(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(config_for(tmp_path / "whole", data=data(folder, a=1.0, b=1.0, c=1.0)))
    shutil.copytree(folder, tmp_path / "elsewhere")
    train(config_for(tmp_path / "run", data=data(folder, a=1.0, b=1.0, c=1.0), trainer=STOPPED))
    caplog.clear()
    train(config_for(tmp_path / "run", data=data(tmp_path / "elsewhere", c=2.0, a=2.0, b=2.0)))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert records(tmp_path / "run", "valid")[-1]["loss"] == records(tmp_path / "whole", "valid")[-1]["loss"]
    assert f"{folder}/c is now {tmp_path}/elsewhere/c" in caplog.text


def test_other_data_is_refused_or_begins_anew(folder: Path, tmp_path: Path, seen: list[tuple[str, int]]) -> None:
    shutil.copytree(folder, tmp_path / "data")
    train(config_for(tmp_path / "run", data=data(tmp_path / "data", a=1.0), trainer=STOPPED))
    changes: list[tuple[dict[str, Any], str]] = [
        ({"seed": 5}, r"data\.seed = 5: 1234 -> 5"),
        ({"split": (5.0, 4.0, 1.0)}, r"data\.split = \[5\.0, 4\.0, 1\.0\]: \[8\.0, 1\.0, 1\.0\] -> \[5"),
        ({"seq_length": 12}, r"data\.seq_length = 12: 24 -> 12"),
    ]
    for change, message in changes:
        with pytest.raises(ConfigError, match=message):
            train(config_for(tmp_path / "run", data=data(tmp_path / "data", a=1.0, **change)))
    for path in (bin_path, idx_path):  # As large, and with the same times.
        shutil.copy2(path(folder / "b"), path(tmp_path / "data" / "a"))
    with pytest.raises(ConfigError, match=r"data\.path = '.*/a': its contents .* 24 samples .*data\.on_change=restart"):
        train(config_for(tmp_path / "run", data=data(tmp_path / "data", a=1.0)))
    seen.clear()
    again = {"data": data(tmp_path / "data", a=1.0, on_change="restart")}
    train(config_for(tmp_path / "run", **again, trainer={"stop_after_samples": 36}))
    train(config_for(tmp_path / "run", **again))
    assert seen == [("a", number) for number in range(24)]


def test_tokens_are_counted_where_the_length_of_sequences_changes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the tokens in sequences of 24, half in sequences of 48 of another corpus; the learning rate follows the tokens."""
    optim = {"schedule": ScheduleConfig(warmup_tokens=8 * 24)}
    trainer = {"train_samples": None, "train_tokens": TOKENS}
    train(config_for(tmp_path / "whole", data=data(folder, a=1.0), trainer=trainer, optim=optim))
    for run_dir in ("new", "old"):
        train(config_for(tmp_path / run_dir, data=data(folder, a=1.0), trainer=trainer | STOPPED, optim=optim))
        if run_dir == "old":  # A checkpoint that counted samples only.
            monkeypatch.setattr(resume, "read_metadata", lambda path: without(read_metadata(path), "consumed_tokens", "data"))
        longer = data(folder, b=1.0, seq_length=48, on_change="restart" if run_dir == "old" else "error")
        train(config_for(tmp_path / run_dir, data=longer, trainer=trainer, optim=optim))
        found, whole = ({r["consumed_tokens"]: r["lr"] for r in records(tmp_path / name)} for name in (run_dir, "whole"))
        assert list(found) == [*range(96, 577, 96), 768, 960, TOKENS]
        assert [found[96 * n] for n in range(1, 7)] == [whole[96 * n] for n in range(1, 7)]
        # The rate of a step is that of where it begins.
        assert [found[n] for n in (768, 960, TOKENS)] == pytest.approx([whole[n] for n in (672, 864, 1056)], rel=1e-12)
        monkeypatch.undo()
        monkeypatch.setattr(loop, "draw_run", lambda *_: None)
    message = r"optim\.schedule\.warmup_samples = 8: .*train_tokens.*Give it as optim\.schedule\.warmup_tokens"
    with pytest.raises(ConfigError, match=message):
        train(config_for(tmp_path / "new", data=data(folder, b=1.0, seq_length=48), trainer=trainer))


def without(metadata: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in metadata.items() if key not in keys}


def test_a_checkpoint_without_fingerprints_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blend = {"a": 2.0, "b": 1.0}
    train(config_for(tmp_path / "whole", data=data(folder, **blend)))
    train(config_for(tmp_path / "run", data=data(folder, **blend), trainer=STOPPED))
    monkeypatch.setattr(resume, "read_metadata", lambda path: without(read_metadata(path), "data"))
    train(config_for(tmp_path / "run", data=data(folder, **dict(reversed(blend.items())))))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    kept = read_metadata(resolve(tmp_path / "run"))["data"]["corpora"]
    assert [Path(corpus["prefix"]).name for corpus in kept] == ["a", "b"]
    assert all(corpus["contents"] for corpus in kept)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stopped in the middle, behind a ramp of the batch."""
    run_dir = tmp_path_factory.mktemp("run")
    train(config_for(run_dir, trainer=STOPPED | {"batch_ramp": BatchRampConfig(2, 2, 4)}))
    return run_dir


@pytest.mark.parametrize(
    "changes",
    [
        {"model": tiny("M-m*", init={"std": 0.5, "depth": 7})},
        {"model": tiny("M-|m*")},
        {"trainer": {"micro_batch_size": 4}},
    ],
    ids=["model.init", "stage border", "ramp"],
)
def test_what_makes_no_difference_may_change(changes: dict[str, Any], run: Path, tmp_path: Path) -> None:
    trainer = {"batch_ramp": BatchRampConfig(2, 2, 4), **changes.pop("trainer", {})}
    for name in ("as it was", "changed"):
        shutil.copytree(run, tmp_path / name)
    train(config_for(tmp_path / "as it was", trainer=trainer))
    train(config_for(tmp_path / "changed", trainer=trainer, **changes))
    assert losses(tmp_path / "changed") == losses(tmp_path / "as it was")


def test_a_ramp_that_is_still_to_come_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.batch_ramp\.start = 2: not a multiple of micro_batch_size 4"):
        train(config_for(tmp_path, trainer={"batch_ramp": BatchRampConfig(2, 2, 4), "micro_batch_size": 4}))
    shutil.copytree(run, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"trainer\.batch_ramp\.increment = 2: not a multiple"):
        train(config_for(tmp_path / "run", trainer={"batch_ramp": BatchRampConfig(2, 2, 40), "micro_batch_size": 4,
                                                    "global_batch_size": 8}))  # fmt: skip


def test_weights_of_elsewhere_start_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An import does not know how new weights are drawn; a longer context may want another base of RoPE."""
    model = tiny("*-*-", init={"std": 0.01, "depth": 9}, attention={"rope_base": 100.0})
    train(config_for(tmp_path / "source", model=model, trainer=STOPPED))
    tensors = checkpoint_tensors(resolve(tmp_path / "source"))
    names = [name for name, _ in loop.parameter_table(model).items()]
    imported = replace(model, name="imported", init=InitConfig())
    write_checkpoint(tmp_path / "import", imported, ((name, tensors(name)) for name in names), None)
    caplog.clear()
    longer = replace(model, attention=replace(model.attention, rope_base=500.0))
    for number, chosen in enumerate((model, longer)):
        train(config_for(tmp_path / str(number), model=chosen, checkpoint={"init_from": str(tmp_path / "import")}, trainer=STOPPED))
        assert losses(tmp_path / str(number))[1] < losses(tmp_path / "source")[1]
        assert ("model.attention.rope_base 100.0 -> 500.0" in caplog.text) == (number == 1)
    with pytest.raises(ConfigError, match=r"model\.attention\.rope_base = 500\.0.* run\.dir"):
        train(config_for(tmp_path / "source", model=longer))


@pytest.mark.ranks
def test_one_rank_reads_fingerprints_and_more_ranks_may_follow_a_ramp(folder: Path, tmp_path: Path) -> None:
    trainer = {"batch_ramp": BatchRampConfig(1, 1, 4), "micro_batch_size": 1}
    one = config_for(tmp_path, data=data(folder, a=1.0, b=1.0), trainer=trainer | STOPPED)
    settings: dict[str, Any] = {"data": data(folder, b=1.0, a=1.0), "parallel": ParallelConfig(dp_shard=2)}
    config, takes = config_for(tmp_path, **settings, trainer=trainer), resume.fingerprints

    def alone(context: ParallelContext) -> None:
        trainer = loop.Trainer(one, context, loop.StopRequest())
        trainer.run()
        trainer.close()

    def body(context: ParallelContext) -> None:
        def taken(readers: Any) -> dict[str, str]:
            assert context.global_rank == 0
            return takes(readers)

        resume.fingerprints = taken
        logging.disable()
        own = ParallelContext.over(context.mesh, context.device, config.parallel)
        trainer = loop.Trainer(config, own, loop.StopRequest())
        assert trainer.data.standing.read(24) == [12, 12]
        trainer.run()
        trainer.close()

    on_ranks({}, alone)
    on_ranks({"dp_shard": 2}, body)
    assert read_metadata(resolve(tmp_path))["consumed_samples"] == 48
