"""Whole runs on a tiny model: resume, signals, kills, non-finite steps, refusals."""

import os
import signal
import time
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from mamba_kernels import backend
from megatron_mamba.checkpoint import CheckpointError, read_metadata, resolve
from megatron_mamba.config import (
    BatchRampConfig,
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    EvalConfig,
    LoggingConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    SpikeConfig,
    TrainerConfig,
    WandbConfig,
)
from megatron_mamba.data import build_datasets
from megatron_mamba.model import LanguageModel
from megatron_mamba.parallel import health
from megatron_mamba.train import loop
from megatron_mamba.train.loop import train
from megatron_mamba.train.metrics import read_records
from megatron_mamba.train.resilience import TrainingError
from tiny import tiny


def config_for(run_dir: Path, **changes: Any) -> Config:
    """A run of 12 steps; `changes` replace settings of a group (dicts) or groups."""
    config = Config(
        model=tiny("M-m*"),
        data=DataConfig(kind="synthetic", seq_length=24, split=(8.0, 1.0, 1.0)),
        optim=OptimConfig(lr=1e-2, min_lr=1e-3, schedule=ScheduleConfig(warmup_samples=8)),
        trainer=TrainerConfig(train_samples=48, global_batch_size=4, micro_batch_size=2, precision="fp32"),
        checkpoint=CheckpointConfig(interval=4),
        logging=LoggingConfig(interval=1, console=False, tensorboard=False, wandb=WandbConfig(mode="disabled")),
        eval=EvalConfig(interval=4, samples=5),
        run=RunConfig(dir=str(run_dir), name="test"),
    )
    groups = {k: replace(getattr(config, k), **v) if isinstance(v, dict) else v for k, v in changes.items()}
    return replace(config, **groups).validate()


def records(run_dir: Path, kind: str = "train") -> list[dict[str, Any]]:
    return [record for record in read_records(run_dir / "metrics.jsonl") if record["kind"] == kind]


def losses(run_dir: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in records(run_dir)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole")
    assert train(config_for(run_dir)) == 0
    return run_dir


def test_a_run_learns_and_leaves_its_folder(whole: Path) -> None:
    found = losses(whole)
    assert list(found) == list(range(1, 13))
    assert found[12] < found[1] - 0.1
    assert [r["step"] for r in records(whole, "valid")] == [4, 8, 12]
    assert [r["step"] for r in records(whole, "test")] == [12]
    assert (whole / "loss.png").stat().st_size > 1000
    assert {p.name for p in (whole / "checkpoints").glob("step_*")} == {"step_00000008", "step_00000012"}
    record = records(whole)[-1]
    assert record["tokens_per_second"] > 0
    assert record["seconds"].keys() >= {"data", "forward", "backward", "optimizer"}


@pytest.mark.parametrize("kernels", ["reference", "fused"])
def test_kernels_are_those_asked_for(kernels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "FUSED", kernels != "fused")
    train(config_for(tmp_path, trainer={"kernels": kernels, "stop_after_samples": 4}, eval={"interval": 0, "samples": 1}))
    assert backend.FUSED is (kernels == "fused")


def test_stopped_and_resumed_equals_uninterrupted(whole: Path, tmp_path: Path) -> None:
    train(config_for(tmp_path, trainer={"stop_after_samples": 22}))
    assert list(losses(tmp_path)) == [1, 2, 3, 4, 5]
    train(config_for(tmp_path))
    assert losses(tmp_path) == losses(whole)
    assert records(tmp_path, "test")[0]["loss"] == records(whole, "test")[0]["loss"]
    assert [r["event"] for r in records(tmp_path, "event")] == ["start", "resume"]


def test_micro_batches_only_change_rounding(whole: Path, tmp_path: Path) -> None:
    train(config_for(tmp_path, trainer={"micro_batch_size": 4}))
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=1e-4)


def test_batch_ramp_counts_samples(tmp_path: Path) -> None:
    ramp = BatchRampConfig(start=2, increment=2, samples=4)
    train(config_for(tmp_path, trainer={"batch_ramp": ramp, "train_samples": 16}))
    found = [(r["consumed_samples"], r["global_batch_size"]) for r in records(tmp_path)]
    assert found == [(2, 2), (4, 2), (8, 4), (12, 4), (16, 4)]


def test_signal_saves_and_ends_well(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = loop.Trainer._train_step

    def signalled(self: loop.Trainer, batches: Any) -> dict[str, Any]:
        if self.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batches)

    save = loop.CheckpointManager.save

    def signalled_again(self: Any, step: int, *arguments: Any, **options: Any) -> None:
        if step == 6:
            os.kill(os.getpid(), signal.SIGUSR1)
        save(self, step, *arguments, **options)

    monkeypatch.setattr(loop.Trainer, "_train_step", signalled)
    monkeypatch.setattr(loop.CheckpointManager, "save", signalled_again)
    assert train(config_for(tmp_path)) == 0
    assert resolve(tmp_path).name == "step_00000006"
    monkeypatch.undo()
    train(config_for(tmp_path))
    assert losses(tmp_path) == losses(whole)


def test_a_signal_before_the_first_step(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = loop.build_pipeline

    def signalled(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGUSR1)
        return build(*arguments, **options)

    monkeypatch.setattr(loop, "build_pipeline", signalled)
    assert train(config_for(tmp_path)) == 0
    assert [r["message"] for r in records(tmp_path, "event")][1:] == [
        "stopping at step 0 on SIGUSR1; the same command continues from here"
    ]
    monkeypatch.undo()
    train(config_for(tmp_path))
    assert losses(tmp_path) == losses(whole)


def test_non_finite_steps_change_nothing_and_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 3 and 4 are poisoned: run again, skipped and counted. From step 6 on all are: the run stops with a checkpoint."""
    forward, train_step, seen = LanguageModel.forward, loop.Trainer._train_step, []

    def poisoned(self: LanguageModel, *args: Any, **kwargs: Any) -> torch.Tensor:
        return forward(self, *args, **kwargs) * (float("nan") if seen[-1] in (3, 4) or seen[-1] >= 6 else 1.0)

    def noted(self: loop.Trainer, *args: Any) -> dict[str, Any]:
        seen.append(self.step + 1)
        return train_step(self, *args)

    monkeypatch.setattr(LanguageModel, "forward", poisoned)
    monkeypatch.setattr(loop.Trainer, "_train_step", noted)
    with pytest.raises(TrainingError, match=r"3 steps in a row .* step 8.*optim\.lr.*max_skipped_steps"):
        train(config_for(tmp_path, trainer={"max_skipped_steps": 3}, eval={"interval": 0}, checkpoint={"keep_last": 9}))
    assert [r["skipped_steps"] for r in records(tmp_path)] == [0, 0, 1, 2, 2, 3, 4, 5]
    assert {r["transient_faults"] for r in records(tmp_path)} == {0}
    events = [r["message"] for r in records(tmp_path, "event") if "not finite" in r.get("message", "")]
    assert [int(message.split()[1]) for message in events] == [3, 4, 6, 7, 8]
    assert all("comes again" in message for message in events)
    four, eight = ({**read_metadata(tmp_path / f"checkpoints/step_0000000{n}")} for n in (4, 8))
    assert (four["skipped_in_a_row"], eight["skipped_in_a_row"]) == (2, 3)


def test_a_machine_that_computes_wrongly_trains_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_product", lambda device, size: (False, 1.0))
    with pytest.raises(TrainingError, match=r"a matrix product was wrong on rank 0 on .*trainer\.health_check"):
        train(config_for(tmp_path))
    assert not (tmp_path / "checkpoints").exists() or not list((tmp_path / "checkpoints").glob("step_*"))
    train(config_for(tmp_path, trainer={"health_check": False, "watchdog_seconds": None, "train_samples": 16}))
    assert list(losses(tmp_path)) == [1, 2, 3, 4]


def spoil_product(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Of the matrix products that tell whether a machine computes rightly, let one be wrong."""
    product, looks = health._product, []

    def spoiled(device: torch.device, size: int) -> tuple[bool, float]:
        looks.append(size)
        correct, rate = product(device, size)
        return correct and len(looks) != number, rate

    monkeypatch.setattr(health, "_product", spoiled)


def test_machines_are_looked_at_while_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first step, after 4 and after 8, when a product is wrong."""
    spoil_product(monkeypatch, 3)
    with pytest.raises(TrainingError, match=r"at step 8 a matrix product was wrong on rank 0 on .* right at step 4"):
        train(config_for(tmp_path, trainer={"health_interval": 4}, checkpoint={"interval": 100}))
    (event,) = (record for record in records(tmp_path, "event") if record.get("event") == "health")
    assert event["step"] == 4
    assert {"tflops", "data_seconds", "forward_seconds", "backward_seconds"} <= set(event["health"])
    assert not list((tmp_path / "checkpoints").glob("step_*"))


def test_machines_are_looked_at_when_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(config_for(tmp_path, trainer={"stop_after_samples": 16}))
    spoil_product(monkeypatch, 2)
    with pytest.raises(TrainingError, match=r"at step 8 a matrix product was wrong on .* right at step 4"):
        train(config_for(tmp_path, trainer={"health_interval": 8}))


def spikes(monkeypatch: pytest.MonkeyPatch, *passes: tuple[int, int]) -> list[tuple[int, int]]:
    """Add 100 to the loss of steps, at the first or second run of their passes; the list returned gets the steps and the first
    token of what they train on."""
    gradients, seen = loop.Trainer._gradients, list[tuple[int, int]]()

    def spiky(self: loop.Trainer, batches: Any, scale: float) -> loop.Passes:
        result = gradients(self, batches, scale)
        step = self.step + 1
        seen.append((step, int(batches[0].inputs_BS[0, 0])))
        runs = sum(s == step for s, _ in seen)
        return result._replace(loss=result.loss + 100.0) if (step, runs) in passes else result

    monkeypatch.setattr(loop.Trainer, "_gradients", spiky)
    return seen


def test_a_spike_that_does_not_come_again_costs_nothing(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spikes(monkeypatch, (7, 1))
    train(config_for(tmp_path, trainer={"spike": SpikeConfig("skip", window=4)}))
    assert losses(tmp_path) == losses(whole)
    assert [r["transient_faults"] for r in records(tmp_path)] == [0] * 6 + [1] * 6
    assert {r["spikes"] for r in records(tmp_path)} == {0}
    (event,) = (r["message"] for r in records(tmp_path, "event") if "is a spike" in r["message"])
    assert "step 7 is a spike (loss 1" in event
    assert "transient" in event


@pytest.mark.parametrize(("policy", "skipped"), [("report", 0), ("skip", 1)])
def test_a_spike_is_taken_or_skipped(
    policy: Any, skipped: int, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spikes(monkeypatch, (7, 1), (7, 2))
    train(config_for(tmp_path, trainer={"spike": SpikeConfig(policy, window=4)}))
    found, undisturbed = losses(tmp_path), losses(whole)
    assert [step for step in found if found[step] != undisturbed[step]] == ([7, 8, 9, 10, 11, 12] if skipped else [7])
    assert records(tmp_path)[-1]["skipped_steps"] == skipped
    assert records(tmp_path)[-1]["spikes"] == 1


@pytest.mark.parametrize("first", [5, 8])
def test_a_spike_sends_the_run_back_and_past_its_samples(first: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps spike: back to step 4, and not to step 8 which the first spike has made due for a save; on with the samples after
    them. Stopped after step 9, the run goes on all the same."""
    spike = {"spike": SpikeConfig("rewind", window=3, patience=2)}
    seen = spikes(monkeypatch, *((step, run) for step in (first, first + 1) for run in (1, 2)))
    train(config_for(tmp_path / "a", trainer=spike))
    data = build_datasets(config_for(tmp_path)).train
    steps = [*range(1, first), first, first, first + 1, first + 1]
    assert [step for step, _ in seen] == [*steps, *range(5, 13)]
    samples = [4 * (step - 1) for step in steps] + [4 * (step - 1) for step in range(first + 2, first + 10)]
    assert [token for _, token in seen] == [int(data[sample].tokens[0]) for sample in samples]
    assert [r["step"] for r in records(tmp_path / "a")] == list(range(1, 13))
    assert [records(tmp_path / "a")[-1][counter] for counter in ("rewinds", "spikes", "skipped_steps")] == [1, 2, 2]
    (event,) = (r for r in records(tmp_path / "a", "event") if r.get("event") == "rewind")
    assert event["cause"].startswith(f"step {first + 1} is a spike")
    passed_over = 4 * (first + 1 - 4)
    said = f"The run goes on with sample {4 * (first + 1)}; {passed_over} samples in all were passed over"
    assert event["message"].endswith(said)
    assert read_metadata(tmp_path / "a/checkpoints/step_00000008")["passed_over"] == passed_over
    seen.clear()
    train(config_for(tmp_path / "b", trainer={**spike, "stop_after_samples": 36}))
    train(config_for(tmp_path / "b", trainer=spike))
    assert losses(tmp_path / "b") == losses(tmp_path / "a")
    # Weights, moments and learning rates are those of a process that starts at step 4.
    resume = loop.Trainer._load
    train(config_for(tmp_path / "c", trainer={"stop_after_samples": 16}))
    monkeypatch.setattr(loop.Trainer, "_load", lambda self, start: (resume(self, start), setattr(self, "passed_over", passed_over)))
    train(config_for(tmp_path / "c"))
    assert losses(tmp_path / "c") == losses(tmp_path / "a")


def test_a_run_that_spikes_whatever_its_samples_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spikes(monkeypatch, *((6, run) for run in range(1, 9)))
    spike = SpikeConfig("rewind", window=3, max_rewinds=2)
    for _ in range(2):  # The second time it starts from what the last return has left, which is counted there.
        with pytest.raises(TrainingError, match=r"step 6 is a spike, .* a checkpoint 2 times already.* of step 4 .*max_rewinds"):
            train(config_for(tmp_path, trainer={"spike": spike}))
        assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*")) == ["step_00000004"]
        metadata = read_metadata(tmp_path / "checkpoints/step_00000004")
        assert (metadata["rewinds"], metadata["passed_over"], metadata["spikes"]) == (2, 16, 2)
    assert [step for step, _ in seen] == [1, 2, 3, 4, *[5, 6, 6] * 4]


def test_another_model_is_refused_and_nothing_is_lost(whole: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (whole / "checkpoints").rglob("*") if p.is_file() and p.name != ".lock"}
    text = (whole / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=r"model\.pattern = 'MM'.*another model, with 'M-m\*'.*run\.dir"):
        train(config_for(whole, model=tiny("MM")))
    assert before == {p: p.stat().st_mtime_ns for p in before}
    assert (whole / "config.yaml").read_text() == text


def test_init_from_takes_weights_and_nothing_else(whole: Path, tmp_path: Path) -> None:
    train(config_for(tmp_path, checkpoint={"init_from": str(whole)}, trainer={"train_samples": 12}))
    assert records(tmp_path)[0]["step"] == 1
    assert losses(tmp_path)[1] < losses(whole)[1] - 0.1


def test_a_damaged_checkpoint_is_named_and_the_previous_one_used_on_request(tmp_path: Path, whole: Path) -> None:
    train(config_for(tmp_path, trainer={"stop_after_samples": 32}))
    victim = max((tmp_path / "checkpoints" / "step_00000008").glob("*.safetensors"), key=lambda p: p.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    with pytest.raises(CheckpointError, match=victim.name):
        train(config_for(tmp_path))
    train(config_for(tmp_path, checkpoint={"on_damage": "previous"}))
    assert losses(tmp_path) == losses(whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainer": {"global_batch_size": 3, "micro_batch_size": 2}}, r"trainer\.micro_batch_size = 2"),
        ({"trainer": {"train_samples": 2}}, r"trainer\.train_samples = 2: shorter than one global batch of 4"),
        ({"optim": {"schedule": ScheduleConfig(warmup_samples=99)}}, r"optim\.schedule\.warmup_samples = 99"),
        ({"data": {"kind": "indexed", "path": "/nowhere/corpus"}}, r"/nowhere/corpus"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with pytest.raises(ValueError, match=message):
        train(config_for(run_dir, **changes))
    assert not (run_dir / "config.yaml").exists()


@pytest.mark.ranks
def test_kill_9_while_saving_loses_nothing(tmp_path: Path) -> None:
    """Killed at three moments among its asynchronous saves (one every step), the run ends with the same losses."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"

    def start(run_dir: Path) -> ForkProcess:
        process = get_context("fork").Process(target=train, args=[config_for(run_dir, checkpoint={"interval": 1, "keep_last": 1})])
        process.start()
        return process

    for after in (3, 6, 9):
        process = start(killed)
        while process.is_alive() and max(losses(killed), default=0) < after:
            time.sleep(0.002)
        assert process.is_alive()
        process.kill()
        process.join()
        assert resolve(killed).name >= f"step_{after - 2:08d}"
    for run_dir in (killed, whole):
        process = start(run_dir)
        process.join()
        assert process.exitcode == 0
    assert losses(killed) == losses(whole)
