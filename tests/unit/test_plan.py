"""tools/plan.py: what it counts is what a hand counts, what it lists can be trained, and what a user reads."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

import bench_memory
import plan
from megatron_mamba.config import Config, ParallelConfig, TrainerConfig, from_dict
from megatron_mamba.model import memory
from megatron_mamba.model.cost import GPUS, Gpu, Mesh, bandwidth
from megatron_mamba.model.flops import recomputed_flops
from megatron_mamba.model.layouts import _is_larger
from megatron_mamba.model.memory import measure
from megatron_mamba.model.parameters import count
from megatron_mamba.model.step_memory import step_memory
from megatron_mamba.parallel import torch_private
from megatron_mamba.parallel.dry_run import Ledger
from megatron_mamba.train.__main__ import compose_tree

SMALL = ["model=hybrid_tiny", "model.hidden_size=128", "model.mlp.ffn_size=512", "model.vocab_size=1024", "data.seq_length=256",
         "model.attention.n_heads=8", "model.attention.n_kv_heads=4", "model.attention.head_dim=32", "trainer.micro_batch_size=2",
         "model.mamba.d_inner=256", "model.mamba.state_size=8", "model.mamba.dt_rank=16"]  # fmt: skip
T, D, F, V, Q, K, H = 512, 128, 512, 1024, 256, 128, 8
SMALL_SCANS = ["model.mamba2.d_inner=128", "model.mamba2.head_dim=16", "model.mamba2.state_size=8"]
TP2, SP2 = ["parallel.tp=2"], ["parallel.tp=2", "parallel.sequence_parallel=true"]


@cache
def small(*overrides: str) -> Config:
    return from_dict(Config, compose_tree([*SMALL, *overrides]))


# ------------------------------------------------------------------------------------------------------- what is counted


def test_ledger_counts_storages_once_while_they_live():
    with Ledger() as ledger:
        a = torch.empty(1000, device="meta")  # 4000 bytes, allocated as 4096
        b = a.view(10, 100)[2:].T
        assert ledger.now == 4096
        del a
        assert ledger.now == 4096
        ledger.moment = "later"
        c = b * b
        assert ledger.now == 4096 + 3584
        del b
        assert ledger.now == 3584
        c.add_(c.sum())
    assert ledger.now == 3584
    assert ledger.peaks == {"start": 4096, "later": 4096 + 3584}
    c.mul_(2.0) + 1.0
    assert ledger.now == 3584


KEPT = [
    # The residual, its norm, what the up projection wrote, its activation.
    ("mlp", [], 2 * (T * D + T * D + T * F + T * F)),
    ("mlp", ["recompute=selective"], 2 * (T * D + T * D + T * F)),
    ("mlp", ["recompute=full"], 2 * T * D),
    ("mlp", TP2, 2 * (T * D + T * D + T * F)),
    # Tokens are split over the ranks, but what the projection read is kept whole unless it is to be gathered again.
    ("mlp", SP2, 2 * (T * D // 2 + T * D + T * F)),
    ("mlp", [*SP2, "recompute=selective"], 2 * (T * D // 2 + T * D // 2 + T * F // 2)),
    ("mlp", [*SP2, "recompute=full"], 2 * T * D // 2),
    # Queries, keys and values share one storage; the kernel keeps its output and an fp32 a head and token.
    ("attention", [], 2 * (2 * T * D + T * (Q + 2 * K) + T * Q) + 4 * T * H),
    ("attention", ["recompute=selective"], 2 * (2 * T * D + T * (Q + 2 * K))),
    ("attention", TP2, 2 * (2 * T * D + T * (Q + 2 * K) // 2 + T * Q // 2) + 2 * T * H),
    # The norm's input, the gradient of the hidden states, and that of the weights.
    ("output", [], 2 * 2 * T * D + 2 * V * D),
    ("output", SP2, 2 * 2 * T * D // 2 + 2 * V * D // 2),
]


@pytest.mark.parametrize(("kind", "overrides", "size"), KEPT, ids=lambda value: "-".join(value) if isinstance(value, list) else "")
def test_bytes_kept_for_the_backward_pass(kind, overrides, size):
    piece = measure(small(*overrides), kind)
    assert piece.kept == size + (512 if kind == "output" else 0)  # the loss
    assert piece.kept <= piece.forward
    assert piece.kept < piece.backward


@pytest.mark.parametrize("kind", ["mamba2", "mamba", "attention", "mlp"])
def test_recomputing_keeps_less_and_tp_divides_it(kind):
    kept = [measure(small(f"recompute={how}"), kind).kept for how in ("none", "selective", "full")]
    assert kept[0] > kept[1] > kept[2]
    assert kept[2] == 2 * T * D
    whole, split, tokens = (measure(small(*options), kind) for options in ([], TP2, SP2))
    assert tokens.kept < split.kept < whole.kept
    assert whole.kept / 2 < split.kept
    assert tokens.left == whole.left / 2
    assert whole.gradients / 2 <= split.gradients < 0.6 * whole.gradients


def test_weights_and_their_gradients():
    piece = measure(small(*TP2), "mlp")
    assert piece.shapes == ((F // 2, D), (D, F // 2))
    assert piece.gradients == 2 * F * D
    assert piece.apart == (D,)
    assert measure(small(), "mlp").left == 2 * T * D


@pytest.mark.parametrize(("kind", "batch", "length"), [("mamba2", 1, 8192), ("mamba2", 2, 16384), ("mamba", 2, 512)])
def test_scans_grow_linearly_with_the_sequence(kind, batch, length, monkeypatch):
    options = [f"trainer.micro_batch_size={batch}", f"data.seq_length={length}"]
    # On a CPU, where the reference kernels run.
    config = from_dict(Config, compose_tree(["model=hybrid_8b", "trainer.device=cpu", *options]))
    short = measure(config, kind)
    monkeypatch.setattr(memory, "SCANS", {})
    whole = measure(config, kind)
    assert short.kept == whole.kept
    assert (short.gradients, short.left, short.shapes, short.sent) == (whole.gradients, whole.left, whole.shapes, whole.sent)
    assert (short.forward, short.backward) == (whole.forward, whole.backward)


def test_the_kernels_asked_for_are_counted():
    fused, reference, cpu = (
        measure(from_dict(Config, compose_tree(["model=hybrid_8b", "data.seq_length=2048", *options])), "mamba2")
        for options in ([], ["trainer.kernels=reference"], ["trainer.device=cpu"])
    )
    assert reference == cpu
    assert fused.kept != reference.kept


def test_attention_on_meta_tensors_makes_no_square_matrix():
    one, two = (measure(small(f"data.seq_length={length}"), "attention") for length in (4096, 8192))
    assert two.backward < 2.1 * one.backward
    # In fp32 with fewer key/value heads there is no fused kernel, and the matrix is there.
    assert measure(small("data.seq_length=4096", "trainer.precision=fp32"), "attention").kept > 10 * one.kept


def test_fused_attention_makes_keys_gradients_for_every_query_head():
    q, k, v = (torch.empty(2, heads, 256, 32, dtype=torch.bfloat16, device="meta", requires_grad=True) for heads in (8, 2, 2))
    grad = memory._like(q)
    with Ledger() as ledger:
        out = memory._FusedAttention.apply(q, k, v)
        assert ledger.now == q.nbytes + 4 * 2 * 8 * 256
        kept, ledger.moment = ledger.now, "backward"
        out.backward(grad)
    # The fp32 sum of q's gradient and a number a row; k's and v's for each of 8 heads, and summed; q's own.
    assert ledger.peaks["backward"] - kept == 2 * q.nbytes + 4 * 2 * 8 * 256 + 2 * q.nbytes + k.nbytes + v.nbytes + q.nbytes


def test_traffic_of_tensor_parallelism():
    half = T * D * 2 // 2  # bytes of [T, D] that a ring of two sends from each rank, once
    reduced = T * (16 + 2 * 8) * 2
    found = {kind: measure(small(*TP2), kind).sent["tp"] for kind in ("mlp", "mamba")}
    assert found["mlp"] == {"forward": {"all-reduce": 2 * half}, "backward": {"all-reduce": 2 * half}}
    # S6's second reduction: dt, B and C of every token, and their gradients.
    assert found["mamba"] == {when: {"all-reduce": 2 * half + reduced} for when in ("forward", "backward")}
    both = {"all-gather": half, "reduce-scatter": half}
    assert measure(small(*SP2), "mlp").sent == {"tp": {"forward": both, "backward": both}}
    assert measure(small(*SP2, "recompute=selective"), "mlp").sent["tp"]["backward"] == both | {"all-gather": 2 * half}
    assert measure(small(), "mamba").sent == {}


def test_recomputed_flops():
    assert recomputed_flops(small("recompute=selective"), "mlp") == 0
    assert recomputed_flops(small("recompute=selective"), "attention") == 2 * Q * 256
    assert recomputed_flops(small("recompute=full"), "mlp") == 2 * D * F
    assert recomputed_flops(small("recompute=full"), "attention") == 2 * D * (Q + 2 * K) + 2 * Q * 256
    assert recomputed_flops(small(), "mamba2") == 0


def test_a_ring_over_nodes_is_as_fast_as_the_adapters_in_it():
    gpu = Gpu(memory_gib=80, tflops=1, memory_gb=1, nvlink_gb=400, network_gb=50)
    inside, all_of_a_node, one_of_a_node = bandwidth(gpu, 1, 8), bandwidth(gpu, 4, 8), bandwidth(gpu, 8, 2)
    assert (inside / all_of_a_node, inside / one_of_a_node) == (4, 8)


# ------------------------------------------------------------------------------------------------------- the whole step


@pytest.mark.parametrize(("frees_early", "copies"), [(False, 2), (True, 1)])
def test_peak_of_a_step_by_hand(frees_early, copies, monkeypatch):
    monkeypatch.setattr(torch_private, "FREES_EARLY", frees_early)
    config = small("model.pattern=-", "data.seq_length=8", "model.vocab_size=65536")
    found, tokens = step_memory(config, 1, 1), 16
    # So large a vocabulary decides: masters, moments and gradients of everything; to sum those of the embedding one rank
    # holds them once more in fp32, and until torch 2.14 another time to divide them by one.
    embedding, layer = 4 * 65536 * D, 4 * 2 * D * F
    assert found.moment == "sum of gradients of embedding"
    assert found.peak == pytest.approx(4 * (2 * embedding + layer) + copies * embedding + (64 << 20), rel=1e-3)
    assert found.milestones["optimizer"] == pytest.approx(3 * (2 * embedding + layer), rel=1e-3)
    assert found.largest["weights, gathered"] == embedding / 2
    assert found.largest["kept for backward, mlp"] < 10 * 2 * tokens * F
    assert sum(found.at_peak.values()) == found.peak


@pytest.mark.parametrize(
    ("less", "more"),
    [
        (["recompute=selective"], []),
        (["recompute=full"], ["recompute=selective"]),
        (["trainer.micro_batch_size=1"], []),
        (SP2, TP2),
        (TP2, []),
        ([], ["parallel.reshard_after_forward=false"]),
    ],
    ids=str,
)
def test_what_saves_memory(less, more):
    base = ["model.pattern=*-*-M-*-m-*-"]
    assert step_memory(small(*base, *less), 4, 1).peak < step_memory(small(*base, *more), 4, 1).peak


@pytest.mark.parametrize("frees_early", [False, True])
def test_gradients_kept_for_the_last_micro_batch(frees_early, monkeypatch):
    monkeypatch.setattr(torch_private, "FREES_EARLY", frees_early)
    base = small("model.pattern=----", "data.seq_length=8")
    each = small("model.pattern=----", "data.seq_length=8", "parallel.reduce_gradients=micro_batch")
    whole = 4 * (4 * 2 * D * F + 2 * V * D)
    kept = step_memory(base, 4, 2).largest["gradients, not yet summed"]
    # In fp32 for all of the model; until torch 2.14 those of a layer in bf16 as well.
    assert kept == whole if frees_early else kept > whole
    assert step_memory(each, 4, 2).largest["gradients, not yet summed"] < whole / 4
    assert step_memory(base, 4, 8).peak == step_memory(base, 4, 3).peak


# ---------------------------------------------------------------------------------------------------- the command line


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert plan.main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_plan_counts_the_hybrid(capsys):
    result = run(capsys, "model=hybrid_8b", "parallel.tp=4", "data.seq_length=512")
    per_layer = {kind: part["parameters"] // part["layers"] for kind, part in result["parts"].items() if part["layers"]}
    assert per_layer == {"mamba2": 109_640_064, "attention": 41_947_136, "mlp": 134_221_824}
    assert result["parameters"] == count(from_dict(Config, compose_tree(["model=hybrid_8b"])).model) == 8_654_517_248
    ends = result["parts"]["embedding"]["parameters"] + result["parts"]["output"]["parameters"]
    assert ends == 2_097_152_000
    assert sum(p["forward_flops_per_token"] for p in result["parts"].values()) == result["flops_per_token"]["forward"]
    assert (result["parallel"]["tp"], result["gpus"]) == (4, 4)
    assert result["memory"]["milestones"]["optimizer"] == pytest.approx(3 * 4 * 8_654_517_248 / 4, rel=1e-3)


def test_training_flops_of_the_hybrid(capsys):
    result = run(capsys, "model=hybrid_8b", "model.pattern=M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-")
    assert result["flops_per_token"]["training"] == pytest.approx(46.5e9, rel=2e-3)
    assert result["flops_per_token"]["training with recomputation"] == result["flops_per_token"]["training"]


def test_verdict(capsys):
    shard = ["model=transformer_8b", "recompute=full"]
    # 16 bytes a parameter make 127 GiB, more than one GPU but the largest has.
    assert run(capsys, *shard)["fits"] == {"a100-40": False, "a100-80": False, "h100": False, "h200": False, "b200": True}
    result = run(capsys, *shard, "--gpus", "8")
    assert result["fits"] == {name: result["memory"]["peak"] <= gpu.usable for name, gpu in GPUS.items()}
    assert result["fits"]["h200"]
    assert not result["fits"]["a100-40"]
    assert result["mesh"] == {"dp_replicate": 1, "dp_shard": 8, "tp": 1, "micro_batches": 32, "cp": 1, "pp": 1}
    assert "seconds" not in result


def test_traffic_of_data_parallelism(capsys):
    options = [*SMALL, "model.pattern=----", "parallel.dp_replicate=2", "trainer.global_batch_size=24", "--gpus", "6"]
    weights, apart = 4 * 2 * D * F + 2 * V * D, 5 * D
    found = run(capsys, *options)
    assert found["mesh"] == {"dp_replicate": 2, "dp_shard": 3, "tp": 1, "micro_batches": 2, "cp": 1, "pp": 1}
    # 2 micro-batches gather bf16 over 3 ranks, for the backward pass the layers only; fp32 gradients are scattered once, then
    # summed over 2 replicas.
    layers, gather = 4 * 2 * D * F, 2 * 2 / 3 * 2
    expected = {
        "all-gather, forward": gather * weights,
        "all-gather, backward": gather * layers,
        "reduce-scatter": 2 / 3 * weights * 4,
        "all-reduce": weights / 3 * 4,
    }
    for name, size in expected.items():
        assert found["communication"]["dp, step"][name] == pytest.approx(size, rel=0.01), name
    assert found["communication"]["dp, step"]["all-reduce, parameters kept whole"] == int(2 * (2 / 3 + 1 / 2) * 4 * apart)
    kept = run(capsys, *options, "parallel.reshard_after_forward=false")
    assert kept["communication"]["dp, step"]["all-gather, forward"] == pytest.approx(expected["all-gather, forward"] / 2, rel=0.01)
    assert kept["communication"]["dp, step"]["all-gather, backward"] == 0


def test_search_lists_what_can_be_trained_fastest_first(capsys):
    base = ["model=transformer_8b", "model.pattern=*-*-*-*-"]
    found = run(capsys, *base, "--search", "8", "--gpu", "a100-40", "--top", "18")
    assert len(found) == 18
    assert [row["seconds"] for row in found] == sorted(row["seconds"] for row in found)
    assert len({row["recompute"] for row in found}) > 1
    # Sums of gradients after each micro-batch are listed where nothing fits without them.
    kinds = [{k: v for k, v in row.items() if k not in ("seconds", "peak")} for row in found]
    sums = [row for row in kinds if row["reduce_gradients"] == "micro_batch"]
    assert sums
    assert not [row for row in sums if row | {"reduce_gradients": "step"} in kinds]
    for row in found:
        options = [f"parallel.{name}={row[name]}" for name in ("tp", "cp", "pp", "schedule", "dp_shard", "dp_replicate",
                   "sequence_parallel", "reshard_after_forward", "reduce_gradients")]  # fmt: skip
        options += [f"trainer.micro_batch_size={row['micro_batch_size']}", f"recompute={row['recompute']}"]
        again = run(capsys, *base, *options, "--gpus", "8", "--gpu", "a100-40")
        assert again["fits"] == {"a100-40": True}
        assert (again["memory"]["peak"], sum(again["seconds"].values())) == (row["peak"], pytest.approx(row["seconds"]))


def test_search_leaves_out_what_does_not_fit(capsys):
    base = ["model=transformer_8b", "model.pattern=*-*-*-*-", "trainer.global_batch_size=8"]
    large = run(capsys, *base, "--search", "2", "--gpu", "b200", "--top", "1000")
    small_one = run(capsys, *base, "--search", "2", "--gpu", "a100-40", "--top", "1000")
    limit = GPUS["a100-40"].usable
    assert 0 < len(small_one) < len(large)
    assert max(row["peak"] for row in small_one) <= limit
    settings = [{k: v for k, v in row.items() if k != "seconds"} for row in small_one]
    for row in large:
        row = {k: v for k, v in row.items() if k != "seconds"}
        assert (row in settings) == (row["peak"] <= limit)


def test_search_passes_over_what_holds_more_than_what_is_too_large():
    def of(tp=1, shard=4, micro=2, reshard=True, again="none", batches=4):
        parallel = ParallelConfig(tp=tp, dp_shard=shard, reshard_after_forward=reshard)
        trainer = TrainerConfig(micro_batch_size=micro)
        return replace(small(f"recompute={again}"), parallel=parallel, trainer=trainer), Mesh(1, shard, tp, batches)

    for more in (of(), of(shard=2), of(micro=4), of(reshard=False), of(batches=2), of(shard=1, micro=8)):
        assert _is_larger(*more, *of())
    for other in (of(shard=8), of(micro=1), of(tp=2), of(again="full"), of(batches=1), of(shard=8, micro=4)):
        assert not _is_larger(*other, *of())
    assert not _is_larger(*of(), *of(reshard=False))


@pytest.mark.parametrize(
    "arguments",
    [
        ["model=mamba_8b", "data.seq_length=128", "--gpu", "h100", "--gpus", "16", "parallel.tp=2"],
        ["model=transformer_8b", "model.pattern=*-", "--search", "4096", "--top", "3", "trainer.global_batch_size=8192"],
    ],
    ids=("plan", "search"),
)
def test_tables_fit_a_terminal_of_80_columns(capsys, monkeypatch, arguments):
    monkeypatch.setenv("COLUMNS", "80")
    assert plan.main(arguments) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.split("\n"))) <= 80
    assert "…" not in shown
    for word in ("8,148,783,104", "108,064,768") if "--search" not in arguments else ("4096 h200", "40% of 989 TFLOP/s"):
        assert word in " ".join(shown.split())


@pytest.mark.parametrize(
    ("arguments", "named", "remedy"),
    [
        (["parallel.tp=0"], "parallel.tp = 0", "Set parallel.tp"),
        (["model.pattern=MXM"], "model.pattern = 'MXM'", "Use M"),
        (["data.seq_length=0"], "data.seq_length = 0", "Use 1 or more"),
        (["trainer.micro_batch_size=0"], "trainer.micro_batch_size = 0", "Use 1 or more"),
        (["parallel.tp=3"], "parallel.tp = 3", "Set parallel.tp="),
        (["--gpus", "0"], "--gpus = 0", "Use 1 or more"),
        (["--gpus", "3", "parallel.tp=2"], "parallel.dp_shard = -1", "multiple of 2"),
        (["--gpus", "3"], "trainer.global_batch_size = 256", "Use a multiple of 3"),
        (["--gpu", "v100"], "--gpu = 'v100'", "Choose from a100-40"),
        (["--search", "0"], "--search = 0", "Use 1 or more"),
        (["--search", "4", "--gpus", "4"], "--gpus = 4", "Give one of the two"),
        (["--search", "4", "data.seq_length=0"], "data.seq_length = 0", "Use 1 or more"),
        (["parallel.pp=2", "model.tie_embeddings=true"], "model.tie_embeddings = True", "Set model.tie_embeddings=false"),
        (["parallel.pp=2", "model.pattern='M|M|M'"], "model.pattern = 'M|M|M'", "Write 1 borders"),
        (["parallel.pp=4", "trainer.global_batch_size=2"], "trainer.global_batch_size = 2", "Make it a batch of 4"),
        (["parallel.schedule=zbv"], "parallel.schedule = 'zbv'", "Set parallel.schedule=1f1b"),
        (["parallel.cp=3"], "parallel.cp = 3", "a multiple of 3"),
        (["--search", "7"], "--search = 7", "Use a number of GPUs"),
        (["--efficiency", "2"], "--efficiency = 2.0", "For example 0.4"),
        (["--top", "0", "--search", "2"], "--top = 0", "Use 1 or more"),
        (["trainer.precision=fp32", "--gpu", "h100"], "trainer.precision = 'fp32'", "bf16"),
        (["optim.lrr=1"], "optim.lrr = 1", "optim.lr"),
    ],
    ids=str,
)
def test_plan_refuses_what_cannot_be(capsys, arguments, named, remedy):
    assert plan.main(["model=mamba2_8b", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"error: {named}: ")
    assert remedy in shown.err


def test_a_plan_leaves_the_process_as_it_was(capsys):
    before = sys.excepthook, torch.nn.functional.scaled_dot_product_attention, memory.mamba_kernels.common.DEVICE_BLOCK_ELEMENTS
    run(capsys, *SMALL, "data.seq_length=2048")
    after = sys.excepthook, torch.nn.functional.scaled_dot_product_attention, memory.mamba_kernels.common.DEVICE_BLOCK_ELEMENTS
    assert after == before
    assert not torch.distributed.is_initialized()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_bench_memory_needs_a_gpu(capsys):
    assert bench_memory.main(["model=hybrid_tiny"]) == 2
    assert capsys.readouterr().err.startswith("error: trainer.device = 'cuda': no CUDA device")
