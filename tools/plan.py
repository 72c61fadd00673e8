"""What a configuration costs, without a GPU and without allocating anything: parameters, memory of a rank, FLOPs, communication.

    python tools/plan.py model=hybrid_8b parallel.tp=2 parallel.sequence_parallel=true recompute=selective --gpus 16 --gpu h200
    python tools/plan.py model=hybrid_8b --search 64 --gpu h100

takes the options of training, and
    --gpus N        ranks (default: as many as the mesh needs, with parallel.dp_shard=-1 as 1)
    --gpu NAME      a100-40, a100-80, h100, h200 or b200: whether it fits, and a predicted time (default: whether it fits any)
    --search N      list the layouts on N GPUs (--gpu, default h200) that fit, the fastest predicted first; it varies parallel.tp,
                    sequence_parallel, dp_shard, dp_replicate, reshard_after_forward, micro_batch_size and recompute
    --top N         how many of them (default 20)
    --efficiency F  share of a GPU's peak FLOP/s that compute reaches, for predicted times (default 0.4)
    --json          print plain data
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from megatron_mamba.config import Config, ConfigError, ModelConfig, from_dict, require
from megatron_mamba.model.cost import GPUS, GPUS_PER_NODE, REACHED, dp_traffic, step_seconds, tp_bytes, tp_traffic, training_flops
from megatron_mamba.model.flops import flops_per_token, layer_flops
from megatron_mamba.model.layouts import check_speeds, mesh_of, search
from megatron_mamba.model.parameters import parameter_table
from megatron_mamba.model.step_memory import step_memory
from megatron_mamba.train.__main__ import compose_tree

GIB, MIB = 2**30, 2**20


def plan(config: Config, gpus: int | None = None, gpu: str | None = None, efficiency: float = 0.4) -> dict[str, Any]:
    """What `config` costs on `gpus` ranks: bytes, FLOPs, seconds. Raises :class:`ConfigError` for what cannot be."""
    mesh = mesh_of(config, gpus)
    parts = _parts(config.model, config.data.seq_length)
    forward = flops_per_token(config.model, config.data.seq_length)
    memory = step_memory(config, mesh.dp_shard, mesh.micro_batches)
    result = {
        "model": config.model.name,
        "pattern": config.model.pattern,
        "seq_length": config.data.seq_length,
        "micro_batch_size": config.trainer.micro_batch_size,
        "parallel": asdict(config.parallel),
        "recompute": asdict(config.recompute),
        "mesh": mesh._asdict(),
        "gpus": mesh.tp * mesh.dp_shard * mesh.dp_replicate,
        "parameters": sum(part["parameters"] for part in parts.values()),
        "flops_per_token": {"forward": forward, "training": 3 * forward, "training with recomputation": training_flops(config)},
        "parts": parts,
        "memory": {
            "peak": memory.peak,
            "moment": memory.moment,
            "at_peak": memory.at_peak,
            "largest": {name: size for name, size in memory.largest.items() if size},
            "milestones": memory.milestones,
        },
        "communication": {
            "tp, one layer and micro-batch": {
                kind: {when: dict(sent) for when, sent in passes.items()} for kind, passes in tp_traffic(config).items()
            },
            "tp, step": tp_bytes(config, mesh),
            "dp, step": dict(dp_traffic(config, mesh)),
        },
        "fits": {name: memory.peak <= GPUS[name].usable for name in ([gpu] if gpu else GPUS)},
    }
    if gpu:
        check_speeds(config)
        result["seconds"] = step_seconds(config, mesh, GPUS[gpu], efficiency)
    return result


def _parts(model: ModelConfig, seq_length: int) -> dict[str, dict[str, Any]]:
    """Layers, parameters (a layer's with its norm) and forward FLOPs per token of each kind of layer and of the ends."""
    kinds = sorted(set(model.layers), key=model.layers.index)
    parts: dict[str, dict[str, Any]] = {}
    for kind in ("embedding", *kinds, "final_norm", "output"):
        layers = model.layers.count(kind)
        flops = layers * layer_flops(model, kind, seq_length) if kind in kinds else 0.0
        parts[kind] = {"layers": layers, "parameters": 0, "forward_flops_per_token": flops}
    parts["output"]["forward_flops_per_token"] = 2.0 * model.hidden_size * model.vocab_size
    for row in parameter_table(model).values():
        prefix, *rest = row.name.split(".")
        parts[model.layers[int(rest[0])] if prefix == "layers" else prefix]["parameters"] += row.numel
    return parts


# --------------------------------------------------------------------------------------------------------------- shown


def _table(*headings: str, left: int = 1) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i < left else "right", no_wrap=True)
    return table


def show(result: dict[str, Any], console: Console) -> None:
    """Print what :func:`plan` found."""
    mesh = ", ".join(f"{name} {size}" for name, size in result["mesh"].items() if size > 1) or "one micro-batch a step"
    console.print(f"{result['model']}, {result['seq_length']:,} tokens a sequence, pattern {result['pattern']}", highlight=False)
    console.print(f"on {result['gpus']} GPUs: {mesh}, micro_batch_size {result['micro_batch_size']}", highlight=False)
    _show_parts(result, console)
    memory, table = result["memory"], _table("GiB on a rank", "at the peak", "largest")
    for name, size in memory["largest"].items():
        table.add_row(name, f"{memory['at_peak'].get(name, 0) / GIB:,.2f}", f"{size / GIB:,.2f}")
    table.add_section()
    table.add_row("total", f"{memory['peak'] / GIB:,.2f}", "")
    console.print(table)
    fits = ", ".join(f"{name} {'yes' if yes else 'NO'} ({GPUS[name].usable / GIB:.0f} GiB)" for name, yes in result["fits"].items())
    console.print(f"Peak: {memory['moment']}. Fits (usable memory): {fits}.", highlight=False)
    _show_traffic(result["communication"], console)
    if "seconds" in result:
        spent = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in result["seconds"].items())
        console.print(f"Predicted step: {sum(result['seconds'].values()):.3g} s = {spent}.", highlight=False)


def _show_parts(result: dict[str, Any], console: Console) -> None:
    table = _table("part", "layers", "per layer", "parameters", "share", "MFLOP/token", "share")
    total, forward = result["parameters"], result["flops_per_token"]["forward"]
    for name, part in result["parts"].items():
        layers, parameters, flops = part["layers"], part["parameters"], part["forward_flops_per_token"]
        table.add_row(
            name, f"{layers}" if layers else "", f"{parameters // layers:,}" if layers else "", f"{parameters:,}",
            f"{parameters / total:.1%}", f"{flops / 1e6:,.1f}", f"{flops / forward:.1%}",
        )  # fmt: skip
    table.add_section()
    layers = sum(part["layers"] for part in result["parts"].values())
    table.add_row("total", f"{layers}", "", f"{total:,}", "", f"{forward / 1e6:,.1f}", "")
    console.print(table)
    flops = result["flops_per_token"]
    console.print(
        f"MFLOP/token: forward pass. Training takes {flops['training'] / 1e9:,.3f} GFLOP/token, "
        f"{flops['training with recomputation'] / 1e9:,.3f} with what is recomputed.", highlight=False,
    )  # fmt: skip


def _show_traffic(sent: dict[str, Any], console: Console) -> None:
    table = _table("MiB sent by a rank", "pass", "all-gather", "reduce-scatter", "all-reduce", left=2)
    for kind, passes in sent["tp, one layer and micro-batch"].items():
        for when, ops in passes.items():
            cells = (ops.get(op, 0) / MIB for op in ("all-gather", "reduce-scatter", "all-reduce"))
            table.add_row(f"tp: {kind}, a micro-batch", when, *(f"{cell:,.1f}" if cell else "" for cell in cells))
    dp = sent["dp, step"]
    whole = dp["all-reduce"] + dp["all-reduce, parameters kept whole"]
    back = [dp["all-gather, backward"], dp["reduce-scatter"], whole]
    for when, ops in (("forward", [dp["all-gather, forward"], 0, 0]), ("backward", back)):
        table.add_row("dp: the model, a step", when, *(f"{n / MIB:,.1f}" if n else "" for n in ops))
    console.print(table)
    tp_gib, dp_gib = sent["tp, step"] / GIB, sum(dp.values()) / GIB
    console.print(f"A step sends {tp_gib:,.2f} GiB over tp and {dp_gib:,.2f} GiB over dp.", highlight=False)


def show_search(found: list[dict[str, Any]], gpus: int, gpu: str, efficiency: float, console: Console) -> None:
    """Print what :func:`search` found, and what its times rest on."""
    device = GPUS[gpu]
    table = _table("tp", "sp", "shard", "replicate", "reshard", "micro", "recompute", "GiB", "s/step", left=0)
    for row in found:
        table.add_row(
            f"{row['tp']}", "yes" if row["sequence_parallel"] else "", f"{row['dp_shard']}", f"{row['dp_replicate']}",
            "yes" if row["reshard_after_forward"] else "no", f"{row['micro_batch_size']}", row["recompute"],
            f"{row['peak'] / GIB:.1f}", f"{row['seconds']:.4g}",
        )  # fmt: skip
    console.print(f"Layouts on {gpus} {gpu} that fit {device.usable / GIB:.0f} GiB, fastest predicted first", highlight=False)
    console.print(table if found else "none")
    console.print(
        f"Times assume compute at {efficiency:.0%} of {device.tflops:g} TFLOP/s, {REACHED:.0%} of NVLink's {device.nvlink_gb:g} "
        f"GB/s in a node of {GPUS_PER_NODE}, of {device.network_gb:g} GB/s a GPU between nodes and of {device.memory_gb:g} GB/s "
        "memory; tp's collectives are waited for, FSDP's run beside compute. They rank layouts; tools/bench_train.py measures one.",
        highlight=False,
    )  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Print the plan, or the search, that `arguments` ask for; returns the process's exit code."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain, usage=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help=argparse.SUPPRESS)
    for flag, default, kind in (("--gpus", None, int), ("--search", None, int), ("--top", 20, int), ("--gpu", None, str),
                                ("--efficiency", 0.4, float)):  # fmt: skip
        parser.add_argument(flag, type=kind, default=default, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args(list(arguments))
    efficiency, top, gpu = args.efficiency, args.top, args.gpu
    try:
        require(gpu is None or gpu in GPUS, "--gpu", gpu, "unknown", f"Choose from {', '.join(GPUS)}")
        require(0 < efficiency <= 1, "--efficiency", efficiency, "must lie in (0, 1]", "For example 0.4")
        require(top > 0, "--top", top, "must be positive", "Use 1 or more")
        require(args.gpus is None or args.search is None, "--gpus", args.gpus, "--search says how many", "Give one of the two")
        config = from_dict(Config, compose_tree(args.overrides))
        if args.search is not None:
            result: Any = search(config, args.search, gpu or "h200", efficiency, top)
        else:
            result = plan(config, args.gpus, gpu, efficiency)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(result, indent=2))
    elif args.search is not None:
        show_search(result, args.search, gpu or "h200", efficiency, Console())
    else:
        show(result, Console())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
