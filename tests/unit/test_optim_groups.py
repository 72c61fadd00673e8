"""AdamW's groups, its state by name, and the skipped step."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from megatron_mamba.config import OptimConfig
from megatron_mamba.optim import build_optimizer, load_optimizer_state, optimizer_state, set_learning_rate

CONFIG = OptimConfig(lr=0.1, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.5)
SHAPES = {"matrix": (4, 3), "bias": (4,), "A_log": (4, 2)}
SPECS = {name: SimpleNamespace(decay=name == "matrix") for name in SHAPES}


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return {n: nn.Parameter(torch.randn(s, dtype=torch.float64, generator=generator)) for n, s in SHAPES.items()}


def fill_gradients(named: dict[str, nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in named.values():
        parameter.grad = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)


def bits(named: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> list[Tensor]:
    state = optimizer_state(optimizer)
    return [t.clone() for name, p in named.items() for t in (p.detach(), *(state[name][k] for k in sorted(state[name])))]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_step_is_adamw_with_decay_on_matrices_only() -> None:
    named = parameters()
    optimizer = build_optimizer(named.items(), SPECS, CONFIG)
    moments = {name: (torch.zeros(s, dtype=torch.float64), torch.zeros(s, dtype=torch.float64)) for name, s in SHAPES.items()}
    expected = {name: p.detach().clone() for name, p in named.items()}
    for step in (1, 2, 3):
        fill_gradients(named, step)
        set_learning_rate(optimizer, 0.1 / step)
        optimizer.step()
        for name, p in named.items():
            m, v = moments[name]
            m.mul_(0.8).add_(p.grad, alpha=0.2)  # type: ignore[arg-type]
            v.mul_(0.9).add_(p.grad**2, alpha=0.1)  # type: ignore[operator]
            decay = 0.5 if name == "matrix" else 0.0
            update = (m / (1 - 0.8**step)) / ((v / (1 - 0.9**step)).sqrt() + 1e-6)
            expected[name] -= 0.1 / step * (update + decay * expected[name])
    for name, p in named.items():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-12, atol=1e-12)


def test_groups_follow_the_table_and_frozen_parameters_stay_out() -> None:
    named = parameters()
    named["bias"].requires_grad_(False)
    optimizer = build_optimizer(named.items(), SPECS, CONFIG)
    groups = {name: g["weight_decay"] for g in optimizer.param_groups for name in g["param_names"]}
    assert groups == {"matrix": 0.5, "A_log": 0.0}
    with pytest.raises(KeyError, match="A_log"):
        build_optimizer(named.items(), {"matrix": SPECS["matrix"]}, CONFIG)


def test_state_round_trip_is_bit_equal_and_so_is_the_next_step() -> None:
    named = parameters()
    optimizer = build_optimizer(named.items(), SPECS, CONFIG)
    for step in (1, 2):
        fill_gradients(named, step)
        optimizer.step()
    saved = {name: {k: t.clone() for k, t in state.items()} for name, state in optimizer_state(optimizer).items()}

    # A second optimizer that holds the parameters in another order: names decide, not positions.
    other = {name: nn.Parameter(named[name].detach().clone()) for name in reversed(SHAPES)}
    fresh = build_optimizer(other.items(), SPECS, CONFIG)
    assert all(not t.any() for state in optimizer_state(fresh).values() for t in state.values())
    load_optimizer_state(fresh, saved)
    other = {name: other[name] for name in SHAPES}
    assert same(bits(other, fresh), bits(named, optimizer))
    for nameds, optim in ((named, optimizer), (other, fresh)):
        fill_gradients(nameds, 3)
        optim.step()
    assert same(bits(other, fresh), bits(named, optimizer))
    assert optimizer_state(fresh, ["bias"])["bias"]["step"] == 3
    assert list(optimizer_state(fresh, ["bias"])) == ["bias"]


def test_state_of_another_model_is_refused_and_nothing_is_written() -> None:
    optimizer = build_optimizer(parameters().items(), SPECS, CONFIG)
    good = {name: {k: t + 1 for k, t in state.items()} for name, state in optimizer_state(optimizer).items()}
    bad_shape = good | {"A_log": good["A_log"] | {"exp_avg": torch.ones(2, 2)}}
    for state, words in (
        ({"matrix": good["matrix"], "bias": good["bias"]}, "misses 1 parameters .A_log"),
        (good | {"extra": good["bias"]}, "unknown 1 parameters .extra"),
        (bad_shape, r"A_log.exp_avg is a Tensor of shape \(2, 2\), expected a Tensor of shape \(4, 2\)"),
    ):
        with pytest.raises(ValueError, match=words):
            load_optimizer_state(optimizer, state)
    assert all(not t.any() for state in optimizer_state(optimizer).values() for t in state.values())
