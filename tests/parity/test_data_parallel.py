"""N data-parallel ranks train as one rank does: loss, every gradient, gradient norm and the weights after two steps."""

from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from harness import on_ranks
from megatron_mamba.config import OptimConfig
from megatron_mamba.model import build
from megatron_mamba.model.parameters import parameter_table
from megatron_mamba.optim import build_optimizer, clip_, global_grad_norm, set_learning_rate
from megatron_mamba.parallel import fsdp
from megatron_mamba.parallel.context import ParallelContext
from tiny import tiny

pytestmark = pytest.mark.ranks

PATTERNS = ["mm", "MM", "*-", "M*-", "m-*"]
MESHES = {"dp2": {"dp_shard": 2}, "dp4": {"dp_shard": 4}, "hsdp": {"dp_replicate": 2, "dp_shard": 2}}
BATCH, STEPS = 4, 2


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def _train(pattern: str, context: ParallelContext, precision: str = "fp64") -> dict[str, torch.Tensor]:
    """Two steps of two micro-batches on this rank's share of a batch of four; everything that must not depend on the mesh."""
    config = tiny(pattern)
    model = build(config, context, precision=precision, seed=11)
    parameters = list(model.parameters())
    optimizer = build_optimizer(model.named_parameters(), parameter_table(config), OptimConfig(lr=1e-2))
    set_learning_rate(optimizer, 1e-2)
    found = {f"start {name}": _whole(p) for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(2)
    for step in range(STEPS):
        tokens = torch.randint(0, config.vocab_size, (BATCH, 34), generator=generator)
        share = BATCH // context.dp_size
        mine = tokens[context.dp_rank * share : (context.dp_rank + 1) * share]
        loss = torch.zeros((), dtype=torch.float64)
        halves = mine.split(max(share // 2, 1))
        for i, half in enumerate(halves):
            fsdp.last_backward(model, i == len(halves) - 1)
            part = model(half[:, :-1], labels_BS=half[:, 1:], scale=1 / (BATCH * 33), chunk_tokens=20)
            part.backward()
            loss += part.detach()
        fsdp.sum_replicated_gradients(model.apart(), context)
        found |= {f"gradient {step} {name}": _whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        found[f"loss {step}"] = context.sum_over_dp(loss)
        norm = global_grad_norm(parameters, context)
        found[f"norm {step}"] = norm.clone()
        clip_(parameters, norm, 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return found | {f"end {name}": _whole(p) for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """File with what one rank computes for every pattern."""
    file = tmp_path_factory.mktemp("one_rank") / "one.pt"

    def reference(context: ParallelContext) -> None:
        torch.save({pattern: _train(pattern, context) for pattern in PATTERNS}, file)

    on_ranks({}, reference)
    return file


@pytest.mark.parametrize("mesh", MESHES)
def test_ranks_train_as_one(mesh: str, one_rank: Path) -> None:
    def compare(context: ParallelContext) -> None:
        for pattern, one in torch.load(one_rank).items():
            ours = _train(pattern, context)
            assert ours.keys() == one.keys()
            assert len(one) > 20
            for name, expected in one.items():
                if name.startswith("start"):
                    assert torch.equal(ours[name], expected), (pattern, name)
                error = (ours[name] - expected).norm() / expected.norm().clamp(min=1e-30)
                assert error <= 1e-10, (pattern, name, float(error))

    on_ranks(MESHES[mesh], compare)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-2)])
def test_lower_precisions_train_on_ranks_too(precision: str, tolerance: float, one_rank: Path) -> None:
    """FSDP chooses its collectives by dtype: those of fp32 gradients are not those of fp64."""

    def compare(context: ParallelContext) -> None:
        ours, exact = _train("M*-", context, precision), torch.load(one_rank)["M*-"]
        for name in ("loss 0", "loss 1", "norm 0", "norm 1"):
            assert abs(ours[name] - exact[name]) <= tolerance * exact[name], (name, ours[name], exact[name])

    on_ranks({"dp_replicate": 2, "dp_shard": 2}, compare)
