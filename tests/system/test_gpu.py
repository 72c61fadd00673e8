"""The same code on a CUDA device: losses and gradients of the CPU, and a bf16 run that resumes bit for bit."""

from pathlib import Path

import pytest
import torch

from megatron_mamba.config import (
    AttentionConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LoggingConfig,
    Mamba2Config,
    MambaConfig,
    MLPConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainerConfig,
    WandbConfig,
)
from megatron_mamba.model import build
from megatron_mamba.parallel import fsdp
from megatron_mamba.parallel.context import ParallelContext
from megatron_mamba.train.loop import train
from megatron_mamba.train.metrics import read_records

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

MODEL = ModelConfig(
    "gpu_test",
    "Mm*-M-",
    64,
    vocab_size=512,
    mamba=MambaConfig(128, 16, 8),
    mamba2=Mamba2Config(128, 16, 16, 2),
    attention=AttentionConfig(4, 2, 16, 0.5),
    mlp=MLPConfig(256, "squared_relu"),
)


def _loss_and_gradients(device: str, precision: str) -> dict[str, torch.Tensor]:
    context = ParallelContext.create(ParallelConfig(), device)
    model = build(MODEL, context, precision=precision, seed=3)
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, 512, (2, 130), generator=generator).to(context.device)
    starts = (torch.rand(2, 129, generator=generator) < 0.05).to(context.device)
    loss = model(tokens[:, :-1], labels_BS=tokens[:, 1:], document_start_BS=starts, scale=1 / 258, chunk_tokens=50)
    loss.backward()
    found = {name: fsdp.local(p.grad).double().cpu() for name, p in model.named_parameters()}
    found["loss"] = loss.detach().double().cpu()
    context.close()
    return found


@pytest.mark.parametrize(("precision", "tolerance"), [("fp64", 1e-10), ("bf16", 5e-2)])
def test_cuda_gives_the_loss_and_every_gradient_of_the_cpu(precision: str, tolerance: float) -> None:
    ours, reference = _loss_and_gradients("cuda", precision), _loss_and_gradients("cpu", "fp64")
    errors = {name: float((ours[name] - ref).norm() / ref.norm()) for name, ref in reference.items()}
    worst = max(errors, key=lambda name: errors[name])
    print(f"{precision}: largest relative error {errors[worst]:.2e} ({worst})")
    assert errors[worst] <= tolerance, errors


def test_gradients_are_the_same_ten_times() -> None:
    """Bit for bit, of every parameter of a model with every mixer, in deterministic mode."""
    torch.use_deterministic_algorithms(True)
    try:
        first, *others = (_loss_and_gradients("cuda", "bf16") for _ in range(10))
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(others) == 9
    assert [name for other in others for name in first if not torch.equal(other[name], first[name])] == []


def _losses(run_dir: Path, stop_after: int | None = None) -> list[float]:
    config = Config(
        model=MODEL,
        data=DataConfig(kind="synthetic", seq_length=128, document_reset=True),
        optim=OptimConfig(lr=1e-3, min_lr=1e-4),
        trainer=TrainerConfig(train_samples=96, global_batch_size=8, micro_batch_size=4, stop_after_samples=stop_after,
                              deterministic=True),
        checkpoint=CheckpointConfig(interval=4),
        logging=LoggingConfig(interval=1, console=False, tensorboard=False, wandb=WandbConfig(mode="disabled")),
        eval=EvalConfig(interval=0, samples=8),
        run=RunConfig(dir=str(run_dir)),
    )  # fmt: skip
    assert train(config.validate()) == 0
    records = read_records(run_dir / "metrics.jsonl")
    return [record["loss"] for record in records if record["kind"] == "train"]


def test_a_bf16_run_learns_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = _losses(tmp_path / "whole")
    _losses(tmp_path / "stopped", stop_after=40)
    assert _losses(tmp_path / "stopped") == whole
    assert len(whole) == 12
    assert whole[-1] < whole[0] - 0.05
