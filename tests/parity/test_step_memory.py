"""The memory of a step as it is predicted, and as it is counted while FSDP2 trains one rank of a mesh, allocation by allocation.

The other ranks are not there: collectives of torch's fake backend move nothing (with real ones a thread of gloo gives up its
tensors a little later, or not).
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_mamba.config import Config, from_dict
from megatron_mamba.model import build, step_memory
from megatron_mamba.model.parameters import parameter_table
from megatron_mamba.optim import build_optimizer, clip_, global_grad_norm
from megatron_mamba.parallel.context import MESH_DIMENSIONS, ParallelContext
from megatron_mamba.parallel.dry_run import Ledger, allocated
from megatron_mamba.train.__main__ import compose_tree

# As many key/value heads as query heads: the CPU has no fused kernel for fewer. Sizes at which its kernels work in one block.
MODEL = [
    "model=hybrid_tiny", "model.hidden_size=64", "model.vocab_size=512", "model.mamba2.d_inner=128", "model.mamba2.head_dim=16",
    "model.mamba2.state_size=16", "model.mamba2.n_groups=2", "model.mamba.d_inner=128", "model.mamba.state_size=8",
    "model.mamba.dt_rank=8", "model.attention.n_heads=4", "model.attention.n_kv_heads=4", "model.attention.head_dim=16",
    "model.mlp.ffn_size=256", "data.seq_length=64", "trainer.micro_batch_size=2", "trainer.loss_chunk_tokens=64",
]  # fmt: skip
ALL, SP = "model.pattern=M-*m-", "parallel.sequence_parallel=true"
TIED = ["model.tie_embeddings=true", "model.vocab_size=4096"]
CASES: list[tuple[dict[str, int], int, list[str]]] = [
    ({}, 1, [ALL]),
    ({}, 1, ["model.pattern=*-", "model.vocab_size=2048"]),
    ({}, 3, [ALL, "parallel.reshard_after_forward=false"]),
    ({}, 2, ["model.pattern=*-", "trainer.precision=fp32", *TIED]),
    ({"dp_shard": 2}, 1, [ALL]),
    ({"dp_shard": 3}, 2, [ALL, "parallel.reshard_after_forward=false"]),
    ({"dp_shard": 2}, 3, [ALL, "parallel.reduce_gradients=micro_batch"]),
    ({"dp_shard": 2}, 2, ["model.pattern=M-*-", *TIED]),
    ({"dp_shard": 2, "dp_replicate": 2}, 2, [ALL]),
    ({"tp": 2}, 1, [ALL]),
    ({"tp": 2, "dp_shard": 2}, 1, [ALL, SP]),
    ({"tp": 2, "dp_shard": 2}, 1, [ALL, SP, "recompute=selective"]),
    ({"tp": 4}, 2, [ALL, SP, "recompute=full"]),
]


class Counted(Ledger):
    """A ledger that also sees FSDP give up and take back the storage of gathered weights."""

    def __enter__(self) -> Counted:
        self.resize = torch.UntypedStorage.resize_
        torch.UntypedStorage.resize_ = self.resized  # type: ignore[method-assign, assignment]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self.resize  # type: ignore[method-assign]
        super().__exit__(*error)

    @property
    def resized(self) -> Any:
        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            done, key = self.resize(storage, size), storage._cdata
            if key in self._alive:
                self.now += allocated(size) - self._alive[key]
                self._alive[key] = allocated(size)
                self.peaks[self.moment] = max(self.peaks[self.moment], self.now)
            return done

        return resize


def trained(config: Config, context: ParallelContext, micro_batches: int) -> dict[str, int]:
    """Bytes alive at the milestones of the second step's last micro-batch, and the most at one time in the step."""
    batch, length, found = config.trainer.micro_batch_size, config.data.seq_length, {}
    tokens = torch.randint(0, config.model.vocab_size, (micro_batches, batch, length + 1))
    with Counted() as ledger:
        model = build(config.model, context, precision=config.trainer.precision, recompute=config.recompute)
        found["model"] = ledger.now
        optimizer = build_optimizer(model.named_parameters(), parameter_table(config.model), config.optim)
        found["optimizer"] = ledger.now
        parameters = list(model.parameters())
        for _ in range(2):
            found["peak"] = 0
            for i, t in enumerate(tokens):
                ledger.moment, ledger.peaks = "forward", Counter()
                model.last_backward(i == micro_batches - 1)
                chunk = config.trainer.loss_chunk_tokens
                loss = model(t[:, :-1], labels_BS=t[:, 1:], scale=1.0, chunk_tokens=chunk)
                found["after forward"] = ledger.now
                ledger.moment = "backward"
                loss.backward()
                found["peak"] = max(found["peak"], *ledger.peaks.values())
            found["after backward"] = ledger.now
            found |= {f"most in {name}": ledger.peaks[name] for name in ("forward", "backward")}
            ledger.moment = "rest"
            model.sum_gradients()
            clip_(parameters, global_grad_norm(parameters, context), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        del loss
        found["after step"] = ledger.now
    return found


@pytest.mark.parametrize(("sizes", "micro_batches", "overrides"), CASES, ids=str)
def test_prediction_is_what_training_allocates(sizes, micro_batches, overrides, monkeypatch):
    monkeypatch.setattr(step_memory, "WORKSPACE", 0)
    layout = [f"parallel.{name}={size}" for name, size in sizes.items()]
    config = from_dict(Config, compose_tree([*MODEL, *layout, *overrides]))
    world = math.prod(sizes.values())
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        mesh = init_device_mesh("cpu", config.parallel.sizes(world), mesh_dim_names=MESH_DIMENSIONS)
        found = trained(config, ParallelContext.over(mesh, torch.device("cpu"), config.parallel), micro_batches)
    finally:
        dist.destroy_process_group()
    step = step_memory.step_memory(config, sizes.get("dp_shard", 1), micro_batches)
    predicted = step.milestones | {"peak": step.peak}
    assert predicted == {name: pytest.approx(size, rel=0.003) for name, size in found.items()}
