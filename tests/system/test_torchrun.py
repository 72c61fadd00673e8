"""The command line under torchrun: a run on two tensor-parallel GPUs, and its continuation on one. On CPUs, test_launch.py."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_mamba.train.metrics import read_records

MODEL = ["model=hybrid_tiny", "model.pattern=Mm*-", "model.hidden_size=64", "model.vocab_size=120", "model.mamba.d_inner=64",
         "model.mamba.state_size=8", "model.mamba2.d_inner=64", "model.mamba2.head_dim=16", "model.mlp.ffn_size=96"]  # fmt: skip
RUN = ["data=synthetic", "data.seq_length=32", "trainer.global_batch_size=4", "trainer.micro_batch_size=2", "optim.lr=3e-3",
       "trainer.precision=fp64", "checkpoint.interval=3", "eval.samples=0", "logging=minimal", "logging.interval=1"]  # fmt: skip
STEPS = 6


def run(folder: Path, ranks: int, device: str, *settings: str) -> dict[int, float]:
    """Train on `ranks` ranks; the losses by step."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    start = [sys.executable] if ranks == 1 else torchrun
    length = f"trainer.train_samples={4 * STEPS}"
    arguments = [*MODEL, *RUN, length, f"run.dir={folder}", f"trainer.device={device}", *settings]
    done = subprocess.run([*start, "-m", "megatron_mamba.train", *arguments], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    lines = read_records(folder / "metrics.jsonl")
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_ranks_and_then_one_equal_one(tmp_path: Path) -> None:
    device = "cuda"
    alone = run(tmp_path / "alone", 1, device)
    assert list(alone) == list(range(1, STEPS + 1))
    assert alone[STEPS] < alone[1]
    together = run(tmp_path / "together", 2, device, "parallel=tp2", "recompute=selective", "trainer.stop_after_samples=12")
    assert list(together) == [1, 2, 3]
    finished = run(tmp_path / "together", 1, device)
    assert finished == pytest.approx(alone, rel=1e-10)
