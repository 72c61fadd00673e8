"""What the plan says of sequences over several ranks and of pipelines: bytes as real ranks send them, bubbles as in papers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from test_plan import SMALL, SMALL_SCANS, D, F, K, Q, run, small

from harness import on_ranks
from megatron_mamba.config import Config, ParallelConfig
from megatron_mamba.model import LanguageModel, memory
from megatron_mamba.model.cost import traffic
from megatron_mamba.model.memory import measure
from megatron_mamba.model.schedule import StageTime, pipeline_time
from megatron_mamba.model.stages import rank_of
from megatron_mamba.parallel.context import ParallelContext
from megatron_mamba.parallel.dry_run import Ledger, group_names, pipeline_actions
from megatron_mamba.parallel.fsdp import local

CP4 = ["parallel.cp=4", "data.seq_length=1024"]


def test_what_context_parallelism_sends():
    found = {kind: measure(small(*CP4), kind).sent for kind in ("attention", "mamba2", "mamba", "mlp")}
    assert found["mlp"] == {}
    # One of q, k and v: of the dealing, all of a piece; of the ring, keys and values three times, and back with their fp32
    # gradients four times. The output is dealt back, and so is its gradient, and the gradients of q, k and v.
    token = 2 * 256 * 2
    deal, ring = token * (Q + 2 * K), token * 2 * K
    assert found["attention"]["cp"]["forward"] == {"all-to-all": deal + 3 * ring + token * Q}
    assert found["attention"]["cp"]["backward"] == {"all-to-all": token * Q + 3 * ring + 4 * 2 * ring + deal}
    halo, channels = 3 * 2 * 2, {"mamba2": 512 + 2 * 2 * 64, "mamba": 256}
    for kind, width in channels.items():
        assert found[kind]["cp"]["forward"]["all-to-all"] == found[kind]["cp"]["backward"]["all-to-all"] == halo * width
        # States cross once in each direction, however long the pieces are.
        longer = measure(small("parallel.cp=4", "data.seq_length=2048"), kind).sent
        assert longer == found[kind]
        assert found[kind]["cp"]["forward"]["all-gather"] >= 3 * 4 * 2 * {"mamba2": 512 * 64, "mamba": 256 * 8}[kind]


@pytest.mark.parametrize("kind", ["attention", "mamba2"])
def test_context_parallelism_divides_what_is_kept(kind):
    whole, piece = measure(small("data.seq_length=1024"), kind), measure(small(*CP4), kind)
    assert piece.shapes == whole.shapes
    # Attention keeps its output twice: as it was computed, and as it was dealt back.
    assert whole.kept / 4 <= piece.kept < 1.3 * whole.kept / 4
    assert piece.backward < 0.5 * whole.backward


def _traffic(_: int, config: Config, folder: Path) -> None:
    # In a process of its own: DTensor would remember its process groups in other ranks tests.
    torch.save(traffic(config), folder / "planned")


@pytest.mark.ranks
@pytest.mark.parametrize("sizes", [{"cp": 4}, {"cp": 2, "tp": 2}], ids=str)
def test_the_plan_counts_what_ranks_send(sizes, tmp_path):
    overrides = ["model.pattern=M*m-", "data.seq_length=64", "trainer.micro_batch_size=1", *SMALL_SCANS]
    config = small(*overrides, *(f"parallel.{name}={size}" for name, size in sizes.items()))

    def body(context: ParallelContext) -> None:
        model = LanguageModel(config.model, context, torch.float32, config.recompute)
        model.to_empty(device="cpu")
        for parameter in model.parameters():
            local(parameter.detach()).fill_(0.01)
        memory.cast_weights(model, torch.bfloat16)
        tokens = torch.zeros(1, 64 // context.size("cp"), dtype=torch.int64)
        with Ledger(group_names(context)) as ledger:
            ledger.moment = "forward"
            loss = model(tokens, labels_BS=tokens, chunk_tokens=config.trainer.loss_chunk_tokens)
            ledger.moment = "backward"
            loss.backward()
        torch.save(ledger.sent, tmp_path / f"{context.global_rank}")

    on_ranks(sizes, body)
    mp.start_processes(_traffic, (config, tmp_path), nprocs=1, start_method="fork")
    planned: dict[str, dict[str, Counter[str]]] = {}
    for sent in torch.load(tmp_path / "planned", weights_only=False).values():
        for dimension, passes in sent.items():
            for when, ops in passes.items():
                planned.setdefault(dimension, {}).setdefault(when, Counter()).update(ops)
    ranks = [torch.load(tmp_path / f"{rank}", weights_only=False) for rank in range(4)]
    assert ranks[sizes.get("tp", 1)] == planned
    most = max(sum(ops.total() for ops in rank["cp"].values()) for rank in ranks)
    assert most == sum(ops.total() for ops in planned["cp"].values()) > 0


EQUAL = StageTime(1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("schedule", "each", "share"),
    [("1f1b", 1, 1.0), ("interleaved", 2, 1 / 2), ("interleaved", 4, 1 / 4), ("zero_bubble", 2, 1 / 6), ("zbv", 2, 1 / 6)],
)
@pytest.mark.parametrize(("pp", "micro_batches"), [(2, 8), (4, 8), (4, 48), (8, 256)])
def test_bubbles_of_equal_stages(schedule, each, share, pp, micro_batches):
    # (pp - 1) / m of the work (arXiv 2104.04473, section 2.2), by the stages of a rank less; of forward pass, gradient of the
    # input and of weights, equally long, zero-bubble schedules have a third (arXiv 2401.10241, where zbv wants 2 pp micro-batches).
    layout = ParallelConfig(pp=pp, schedule=schedule, stages_per_rank=each)
    found = pipeline_time(layout, micro_batches, [EQUAL] * (each * pp))
    work = 3 * each * micro_batches
    assert found.busy == pytest.approx([work] * pp)
    assert found.total / work - 1 == pytest.approx((pp - 1) / micro_batches * share)
    assert found.idle == pytest.approx(1 - work / found.total)


def test_a_slow_stage_decides_and_hops_cost():
    layout = ParallelConfig(pp=4)
    slow = pipeline_time(layout, 64, [EQUAL, EQUAL, StageTime(2.0, 2.0, 2.0), EQUAL])
    # Before it two forward passes, behind it two backward passes; and once it waits for the last stage's first, one unit.
    assert slow.total == pytest.approx(2 + 6 * 64 + 1 + 2 * 2)
    assert slow.busy[2] == pytest.approx(6 * 64)
    # Once through the pipeline and back at the least.
    alone = pipeline_time(layout, 1, [EQUAL] * 4, hop=0.5)
    assert alone.total == pytest.approx(4 * 3 + 6 * 0.5)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zero_bubble", "zbv"])
def test_orders_do_everything_once(schedule):
    stages = 4 if schedule == "1f1b" else 8
    orders = pipeline_actions(schedule, 4, stages, 8)
    done = Counter((a.kind, a.stage, a.micro_batch) for order in orders for a in order if a.kind in "FBIW")
    kinds = "FB" if schedule in ("1f1b", "interleaved") else "FIW"
    assert done == Counter({(kind, stage, batch): 1 for kind in kinds for stage in range(stages) for batch in range(8)})
    layout = ParallelConfig(pp=4, schedule=schedule)
    assert all(rank_of(a.stage, layout) == rank for rank, order in enumerate(orders) for a in order)


def test_a_pipeline_in_the_plan(capsys):
    base = ["model=hybrid_8b", "parallel.pp=4", "parallel.dp_shard=2", "trainer.global_batch_size=64", "--gpu", "h200"]
    result = run(capsys, *base)
    pipeline = result["pipeline"]
    assert (result["gpus"], result["mesh"]["pp"], result["mesh"]["micro_batches"]) == (8, 4, 32)
    assert [stage["layers"] for stage in pipeline["stages"]] == [[0, 16], [16, 32], [32, 49], [49, 56]]
    assert pipeline["imbalance"]["stages"] < 0.05 < 0.4 < pipeline["imbalance"]["equal layers"]
    assert pipeline["idle"]["equal stages"] == pytest.approx(3 / 35)
    assert pipeline["idle"]["equal stages"] < pipeline["idle"]["stages"] < pipeline["idle"]["equal layers"]
    assert max(pipeline["peaks"]) == result["memory"]["peak"] == pipeline["peaks"][result["memory"]["pipeline_rank"]]
    # The first rank keeps the most micro-batches, and sends a residual stream for each.
    assert result["memory"]["pipeline_rank"] == 0
    assert result["communication"]["pp, step"] == 32 * 4096 * 4096 * 2
    assert sum(result["seconds"].values()) > result["seconds"]["compute"] > 0
    assert result["seconds"]["waiting for other stages"] > 0
    zbv = run(capsys, *base, "parallel.schedule=zbv")
    assert zbv["pipeline"]["idle"]["stages"] < pipeline["idle"]["stages"]
    assert zbv["seconds"]["waiting for other stages"] < result["seconds"]["waiting for other stages"]
    assert zbv["communication"]["pp, step"] == 2 * 32 * 4096 * 4096 * 2


def test_weights_stay_between_backward_passes_of_a_pipeline(capsys):
    base = [*SMALL, "model.pattern=--------", "parallel.pp=2", "parallel.dp_shard=2", "trainer.global_batch_size=32"]
    kept = run(capsys, *base, "parallel.reshard_after_forward=false")["communication"]["dp, step"]
    again = run(capsys, *base)["communication"]["dp, step"]
    stage = 4 * 2 * D * F
    assert kept["all-gather, backward"] == 0
    # The last rank alternates: a forward pass uses what the backward pass before it left, and gives it up.
    assert again["all-gather, backward"] > 4 * stage > kept["all-gather, forward"] / 2
    assert kept["reduce-scatter"] == again["reduce-scatter"]


def test_search_spreads_long_sequences_and_makes_pipelines(capsys):
    # 1021 words are not shared out over tp.
    base = [*SMALL, "model.pattern=----", "model.vocab_size=1021", "--gpu", "a100-40", "--top", "1000"]
    long = run(capsys, *base, "--search", "4", "data.seq_length=32768", "trainer.global_batch_size=4")
    assert {row["cp"] for row in long} == {1, 2, 4}
    assert {row["pp"] for row in long} == {1}
    nodes = run(capsys, *base, "--search", "16", "trainer.global_batch_size=16")
    assert {row["pp"] for row in nodes} == {1, 2, 4}
    assert {row["schedule"] for row in nodes if row["pp"] > 1} == {"1f1b", "interleaved", "zbv"}
    assert {row["cp"] for row in nodes} == {1}
    # Shorter sequences are spread where one fits no GPU whole.
    wide = [*base, "model.hidden_size=4096", "model.mlp.ffn_size=131072", "trainer.global_batch_size=8", "--search", "8"]
    for length, sizes in ((32000, {2, 4}), (8000, {1})):
        assert {row["cp"] for row in run(capsys, *wide, f"data.seq_length={length}")} == sizes
