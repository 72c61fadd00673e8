"""What a configuration costs, without a GPU and without allocating anything: parameters, memory of a rank, FLOPs, communication.

    python tools/plan.py model=hybrid_8b parallel.tp=2 parallel.sequence_parallel=true recompute=selective --gpus 16 --gpu h200
    python tools/plan.py model=hybrid_8b --search 64 --gpu h100

takes the options of training, and
    --gpus N        ranks (default: as many as the mesh needs, with parallel.dp_shard=-1 as 1)
    --gpu NAME      a100-40, a100-80, h100, h200 or b200: whether it fits, and a predicted time (default: whether it fits any)
    --search N      list the layouts on N GPUs (--gpu, default h200) that fit, the fastest predicted first; it varies parallel.tp,
                    sequence_parallel, cp (sequences of 32768 tokens or more), pp and schedule (more than one node), dp_shard,
                    dp_replicate, reshard_after_forward, reduce_gradients, micro_batch_size and recompute; cp and pp also if
                    nothing fits without
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
from megatron_mamba.model.cost import (
    GPUS,
    GPUS_PER_NODE,
    REACHED,
    Mesh,
    dp_traffic,
    parts_of,
    pp_bytes,
    ranks_of,
    step_bytes,
    step_seconds,
    traffic,
)
from megatron_mamba.model.flops import flops_per_token, layer_flops, output_flops, training_flops
from megatron_mamba.model.layouts import check_speeds, fullest, mesh_of, search
from megatron_mamba.model.parameters import parameter_table
from megatron_mamba.model.schedule import StageTime, pipeline_time
from megatron_mamba.model.stages import Stage, flop_costs, imbalance, rank_costs, rank_of, stage_costs, stages_of
from megatron_mamba.train.__main__ import compose_tree

GIB, MIB = 2**30, 2**20


def plan(config: Config, gpus: int | None = None, gpu: str | None = None, efficiency: float = 0.4) -> dict[str, Any]:
    """What `config` costs on `gpus` ranks: bytes, FLOPs, seconds. Raises :class:`ConfigError` for what cannot be."""
    mesh, stages = mesh_of(config, gpus), stages_of(config)
    parts = _parts(config.model, config.data.seq_length)
    forward = flops_per_token(config.model, config.data.seq_length)
    rank, memories = fullest(config, mesh, stages)
    memory, here = memories[rank], [part for stage in ranks_of(config, stages)[rank] for part in parts_of(config, stage)]
    result = {
        "model": config.model.name,
        "pattern": config.model.pattern,
        "seq_length": config.data.seq_length,
        "micro_batch_size": config.trainer.micro_batch_size,
        "parallel": asdict(config.parallel),
        "recompute": asdict(config.recompute),
        "mesh": mesh._asdict(),
        "gpus": mesh.gpus,
        "parameters": sum(part["parameters"] for part in parts.values()),
        "flops_per_token": {"forward": forward, "training": 3 * forward, "training with recomputation": training_flops(config)},
        "parts": parts,
        "memory": {
            "pipeline_rank": rank,
            "peak": memory.peak,
            "moment": memory.moment,
            "at_peak": memory.at_peak,
            "largest": {name: size for name, size in memory.largest.items() if size},
            "milestones": memory.milestones,
        },
        "communication": {
            "one layer and micro-batch": traffic(config),
            "tp, step": step_bytes(config, mesh, "tp", here),
            "cp, step": step_bytes(config, mesh, "cp", here),
            "pp, step": pp_bytes(config, mesh, stages, rank),
            "dp, step": dict(dp_traffic(config, mesh, stages, rank)),
        },
        "fits": {name: memory.peak <= GPUS[name].usable for name in ([gpu] if gpu else GPUS)},
    }
    if mesh.pp > 1:
        result["pipeline"] = _pipeline(config, mesh, stages) | {"peaks": [each.peak for each in memories]}
    if gpu:
        check_speeds(config)
        result["seconds"] = step_seconds(config, mesh, stages, GPUS[gpu], efficiency)
    return result


def _pipeline(config: Config, mesh: Mesh, stages: Sequence[Stage]) -> dict[str, Any]:
    """The stages, how equal they are by counted FLOPs, and how long ranks wait for each other as they would with stages of as
    many layers each (computing alone; a third of a stage's work forward, and half of the rest for weights that are put off)."""
    parallel, costs, layers = config.parallel, flop_costs(config), len(config.model.layers)
    each = stage_costs(stages, costs)
    count = [range(i * layers // len(stages), (i + 1) * layers // len(stages)) for i in range(len(stages))]
    by_count = stage_costs([Stage(i, len(stages), some) for i, some in enumerate(count)], costs)
    rank_sums = rank_costs(stages, costs, parallel)

    def idle(sizes: Sequence[float]) -> float:
        return pipeline_time(parallel, mesh.micro_batches, [StageTime(c / 3, c / 3, c / 3) for c in sizes]).idle

    return {
        "stages": [
            {"rank": rank_of(stage.index, parallel), "layers": [stage.layers.start, stage.layers.stop], "flops": cost}
            for stage, cost in zip(stages, each, strict=True)
        ],
        "imbalance": {"stages": imbalance(each), "ranks": imbalance(rank_sums), "equal layers": imbalance(by_count)},
        "idle": {"stages": idle(each), "equal layers": idle(by_count), "equal stages": idle([1.0] * len(stages))},
    }


def _parts(model: ModelConfig, seq_length: int) -> dict[str, dict[str, Any]]:
    """Layers, parameters (a layer's with its norm) and forward FLOPs per token of each kind of layer and of the ends."""
    kinds = sorted(set(model.layers), key=model.layers.index)
    parts: dict[str, dict[str, Any]] = {}
    for kind in ("embedding", *kinds, "final_norm", "output"):
        layers = model.layers.count(kind)
        flops = layers * layer_flops(model, kind, seq_length) if kind in kinds else 0.0
        parts[kind] = {"layers": layers, "parameters": 0, "forward_flops_per_token": flops}
    parts["output"]["forward_flops_per_token"] = output_flops(model)
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
    if "pipeline" in result:
        _show_pipeline(result, console)
    memory = result["memory"]
    rank = f"pipeline rank {memory['pipeline_rank']}" if "pipeline" in result else "a rank"
    table = _table(f"GiB on {rank}", "at the peak", "largest")
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


def _show_pipeline(result: dict[str, Any], console: Console) -> None:
    pipeline, peaks = result["pipeline"], result["pipeline"]["peaks"]
    table = _table("stage", "rank", "layers", "pattern", "GFLOP/\ntoken", "of the\nmean", "rank's\nGiB", left=0)
    mean = sum(stage["flops"] for stage in pipeline["stages"]) / len(pipeline["stages"])
    letters = result["pattern"].replace("|", "")
    for i, stage in enumerate(pipeline["stages"]):
        begin, end = stage["layers"]
        table.add_row(f"{i}", f"{stage['rank']}", f"{end - begin}", letters[begin:end], f"{stage['flops'] / 1e9:,.2f}",
                      f"{stage['flops'] / mean:.1%}", f"{peaks[stage['rank']] / GIB:,.1f}")  # fmt: skip
    console.print(table)
    unequal, idle = pipeline["imbalance"], pipeline["idle"]
    console.print(
        f"The largest stage is {unequal['stages']:.1%} above the mean, the largest rank {unequal['ranks']:.1%}; with as many "
        f"layers in each stage it would be {unequal['equal layers']:.1%}. The schedule, {result['parallel']['schedule']}, leaves "
        f"ranks idle {idle['stages']:.1%} of a step; {idle['equal layers']:.1%} with as many layers in each, "
        f"{idle['equal stages']:.1%} if all stages cost the same.", highlight=False,
    )  # fmt: skip


COLUMNS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all")


def _show_traffic(sent: dict[str, Any], console: Console) -> None:
    table = _table("MiB sent by a rank", "pass", *(name.replace("-", "-\n") for name in COLUMNS), left=2)
    for dimension in ("tp", "cp"):
        for kind, dimensions in sent["one layer and micro-batch"].items():
            for when, ops in dimensions.get(dimension, {}).items():
                cells = (ops.get(op, 0) / MIB for op in COLUMNS)
                table.add_row(f"{dimension}: {kind}, a micro-batch", when, *(f"{cell:,.1f}" if cell else "" for cell in cells))
    dp = sent["dp, step"]
    whole = dp["all-reduce"] + dp["all-reduce, parameters kept whole"]
    back = [dp["all-gather, backward"], dp["reduce-scatter"], whole]
    for when, ops in (("forward", [dp["all-gather, forward"], 0, 0]), ("backward", back)):
        table.add_row("dp: the model, a step", when, *(f"{n / MIB:,.1f}" if n else "" for n in ops), "")
    console.print(table)
    steps = {name: sent[f"{name}, step"] for name in ("tp", "cp", "pp")} | {"dp (and cp: weights)": sum(dp.values())}
    said = ", ".join(f"{size / GIB:,.2f} GiB over {name}" for name, size in steps.items() if size) or "nothing"
    console.print(f"A step sends {said}.", highlight=False)


def show_search(found: list[dict[str, Any]], gpus: int, gpu: str, efficiency: float, console: Console) -> None:
    """Print what :func:`search` found, and what its times rest on."""
    device = GPUS[gpu]
    table = _table("tp", "sp", "cp", "pp", "schedule", "shard", "repl", "re-\nshard", "micro", "recompute", "GiB", "s/step", left=0)
    for row in found:
        table.add_row(
            f"{row['tp']}", "yes" if row["sequence_parallel"] else "", f"{row['cp']}", f"{row['pp']}",
            row["schedule"] if row["pp"] > 1 else "", f"{row['dp_shard']}", f"{row['dp_replicate']}",
            "yes" if row["reshard_after_forward"] else "no",
            f"{row['micro_batch_size']}{'*' if row['reduce_gradients'] == 'micro_batch' else ' '}", row["recompute"],
            f"{row['peak'] / GIB:.1f}", f"{row['seconds']:.4g}",
        )  # fmt: skip
    console.print(f"Layouts on {gpus} {gpu} that fit {device.usable / GIB:.0f} GiB, fastest predicted first", highlight=False)
    console.print(table if found else "none")
    if any(row["reduce_gradients"] == "micro_batch" for row in found):
        console.print("* with parallel.reduce_gradients=micro_batch; without it the layout does not fit", highlight=False)
    console.print(
        f"Times assume compute at {efficiency:.0%} of {device.tflops:g} TFLOP/s, {REACHED:.0%} of NVLink's {device.nvlink_gb:g} "
        f"GB/s in a node of {GPUS_PER_NODE}, of {device.network_gb:g} GB/s a GPU between nodes and of {device.memory_gb:g} GB/s "
        "memory; tp's and cp's collectives are waited for, FSDP's run beside compute. They rank layouts; "
        "tools/bench_train.py measures one.",
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
