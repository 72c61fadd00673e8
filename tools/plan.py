"""What a configuration costs: parameters and FLOPs per token, counted from the model's one table of parameters.

``python tools/plan.py model=hybrid_8b [data.seq_length=16384] [--json]`` takes the same options as training, needs no data
and no accelerator, and builds nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from megatron_mamba.config import Config, ConfigError, ModelConfig, from_dict, require
from megatron_mamba.model.flops import flops_per_token, layer_flops
from megatron_mamba.model.parameters import parameter_table
from megatron_mamba.train.__main__ import compose_tree


def plan(config: Config) -> dict[str, Any]:
    """Parameters and FLOPs per token of `config` as plain data. Raises :class:`ConfigError` for a model that cannot be."""
    config.model.validate()
    config.parallel.validate()
    require(config.data.seq_length > 0, "data.seq_length", config.data.seq_length, "must be positive", "For example 4096")
    config.parallel.check_split(config.model.split_units(), config.trainer.micro_batch_size * config.data.seq_length)
    parts = _parts(config.model, config.data.seq_length)
    forward = flops_per_token(config.model, config.data.seq_length)
    return {
        "model": config.model.name,
        "pattern": config.model.pattern,
        "seq_length": config.data.seq_length,
        "parallel": asdict(config.parallel),
        "parameters": sum(part["parameters"] for part in parts.values()),
        "flops_per_token": {"forward": forward, "training": 3 * forward},
        "parts": parts,
    }


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


def show(result: dict[str, Any], console: Console) -> None:
    """Print what :func:`plan` found as a table."""
    console.print(f"{result['model']}, {result['seq_length']:,} tokens a sequence, pattern {result['pattern']}", highlight=False)
    table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    for heading in ("part", "layers", "per layer", "parameters", "share", "MFLOP/token", "share"):
        table.add_column(heading, justify="left" if heading == "part" else "right", no_wrap=True)
    total, forward = result["parameters"], result["flops_per_token"]["forward"]
    for name, part in result["parts"].items():
        layers, parameters, flops = part["layers"], part["parameters"], part["forward_flops_per_token"]
        table.add_row(
            name, f"{layers}" if layers else "", f"{parameters // layers:,}" if layers else "", f"{parameters:,}",
            f"{parameters / total:.1%}", f"{flops / 1e6:,.1f}", f"{flops / forward:.1%}",
        )  # fmt: skip
    table.add_section()
    table.add_row(
        "total", f"{sum(p['layers'] for p in result['parts'].values())}", "", f"{total:,}", "", f"{forward / 1e6:,.1f}", ""
    )
    console.print(table)
    training = result["flops_per_token"]["training"]
    console.print(
        f"MFLOP/token: forward pass. Training takes three times that: {training / 1e9:,.3f} GFLOP/token.", highlight=False
    )


def main(arguments: Sequence[str]) -> int:
    """Print the plan of the configuration that `arguments` compose; returns the process's exit code."""
    overrides = [argument for argument in arguments if argument != "--json"]
    if any(argument in ("-h", "--help") for argument in overrides):
        print(__doc__)
        return 0
    try:
        result = plan(from_dict(Config, compose_tree(overrides)))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if "--json" in arguments:
        print(json.dumps(result, indent=2))
    else:
        show(result, Console())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
