"""AdamW over the parameter table: decay on matrices only, and its state by parameter name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_mamba.config import OptimConfig

STATE_KEYS = ("exp_avg", "exp_avg_sq", "step")
"""First moment, second moment (both of the parameter's shape and sharding) and the number of steps taken (scalar)."""


class HasDecay(Protocol):
    """What the optimizer needs of a row of the parameter table."""

    @property
    def decay(self) -> bool: ...


def build_optimizer(
    named_parameters: Iterable[tuple[str, Tensor]], specs: Mapping[str, HasDecay], config: OptimConfig
) -> torch.optim.AdamW:
    """Fused AdamW (arXiv 1711.05101) whose weight decay acts on the parameters with ``specs[name].decay`` only.

    Build it after sharding, when the parameters are what they will stay. Its state exists (zeros) from the start, so
    memory is known and a checkpoint can be read before the first step. Parameters are grouped by (decay, device mesh),
    since the fused kernel refuses plain tensors and DTensors in one list. Raises KeyError for a name not in `specs`.
    """
    groups: dict[Any, dict[str, Any]] = {}
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        if name not in specs:
            raise KeyError(f"parameter {name!r} has no row in the parameter table; declare it in model/parameters.py")
        decay = config.weight_decay if specs[name].decay else 0.0
        key = (specs[name].decay, getattr(parameter, "device_mesh", None))
        groups.setdefault(key, {"params": [], "weight_decay": decay})["params"].append((name, parameter))
    optimizer = torch.optim.AdamW(
        list(groups.values()), lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )
    for _, parameter in _named(optimizer):
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use `lr` from the next step on, in every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def optimizer_state(optimizer: torch.optim.Optimizer, names: Iterable[str] | None = None) -> dict[str, dict[str, Tensor]]:
    """The live state tensors: parameter name -> {exp_avg, exp_avg_sq, step}, of all parameters or of `names`.

    Moments are sharded as their parameters are, so the mapping means the same on every mesh; what is written into the
    tensors in place is what the optimizer uses next. Raises KeyError for an unknown name.
    """
    state = {name: {key: optimizer.state[p][key] for key in STATE_KEYS} for name, p in _named(optimizer)}
    return state if names is None else {name: state[name] for name in names}


@torch.no_grad()
def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Copy `state` (as :func:`optimizer_state` gives it, same sharding) into the optimizer, in place.

    Raises ValueError when names or shapes differ; nothing is written then.
    """
    own = optimizer_state(optimizer)
    for label, names in (("misses", own.keys() - state.keys()), ("has unknown", state.keys() - own.keys())):
        if names:
            some = ", ".join(sorted(names)[:3])
            raise ValueError(f"optimizer state {label} {len(names)} parameters ({some} ...); it belongs to another model")
    pairs = [(f"{name}.{key}", own[name][key], state[name][key]) for name in own for key in STATE_KEYS]
    for name, target, source in pairs:
        if target.shape != source.shape or hasattr(target, "placements") != hasattr(source, "placements"):
            kinds = [f"{type(t).__name__} of shape {tuple(t.shape)}" for t in (source, target)]
            raise ValueError(f"optimizer state {name} is a {kinds[0]}, expected a {kinds[1]}; it belongs to another model")
    for _, target, source in pairs:
        target.copy_(source)


def _named(optimizer: torch.optim.Optimizer) -> Iterable[tuple[str, Tensor]]:
    for group in optimizer.param_groups:
        yield from zip(group["param_names"], group["params"], strict=True)
