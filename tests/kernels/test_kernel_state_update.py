"""The one-token ops against the whole-sequence ops, token by token, and on from where a sequence ended."""

import pytest
import torch
from op_testing import EXACT, ONE_BF16_ROUNDING, assert_close, randn, strided

from mamba_kernels import causal_conv1d, causal_conv1d_step, selective_scan, selective_scan_step, ssd, ssd_step

BATCH, LENGTH, PREFIX = 2, 23, 9


def ssd_case(device, dtype, groups=2):
    heads, head_dim, state = 4, 3, 5
    sequences = {
        "x": randn(BATCH, LENGTH, heads, head_dim, device=device, dtype=dtype),
        "dt": randn(BATCH, LENGTH, heads, device=device, dtype=dtype),
        "B": randn(BATCH, LENGTH, groups, state, device=device, dtype=dtype),
        "C": randn(BATCH, LENGTH, groups, state, seed=1, device=device, dtype=dtype),
    }
    draw = [randn(heads, seed=i, device=device) for i in range(3)]
    return sequences, {"A": -draw[0].abs(), "D": draw[1], "dt_bias": draw[2]}, (BATCH, heads, head_dim, state)


def scan_case(device, dtype):
    channels, state = 6, 4
    sequences = {
        "x": randn(BATCH, LENGTH, channels, device=device, dtype=dtype),
        "dt": randn(BATCH, LENGTH, channels, seed=1, device=device, dtype=dtype),
        "B": randn(BATCH, LENGTH, state, device=device, dtype=dtype),
        "C": randn(BATCH, LENGTH, state, seed=1, device=device, dtype=dtype),
    }
    parameters = {"A": -randn(channels, state, device=device).abs(), "D": randn(channels, device=device)}
    return sequences, parameters | {"dt_bias": randn(channels, seed=1, device=device)}, (BATCH, channels, state)


def conv_case(device, dtype):
    sequences = {"x": randn(BATCH, LENGTH, 5, device=device, dtype=dtype)}
    return sequences, {"weight": randn(5, 4, device=device), "bias": randn(5, device=device)}, (BATCH, 3, 5)


SOFTPLUS, SILU = {"dt_softplus": True}, {"activation": "silu"}
CASES = {
    "ssd": (ssd, ssd_step, ssd_case, SOFTPLUS),
    "selective_scan": (selective_scan, selective_scan_step, scan_case, SOFTPLUS),
    "causal_conv1d": (causal_conv1d, causal_conv1d_step, conv_case, SILU),
}
each_op = pytest.mark.parametrize(("op", "step", "case", "options"), CASES.values(), ids=CASES)


def run_steps(step, state, sequences, arguments, first=0):
    length = sequences["x"].shape[1]
    tokens = ({name: t[:, i] for name, t in sequences.items()} for i in range(first, length))
    return torch.stack([step(state, **token, **arguments) for token in tokens], 1)


@each_op
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, EXACT), (torch.float32, 2e-6), (torch.bfloat16, ONE_BF16_ROUNDING)]
)
@pytest.mark.parametrize("prefix", [0, PREFIX])
@pytest.mark.parametrize("plain", [False, True], ids=["", "plain"])
def test_steps_equal_the_sequence(op, step, case, options, dtype, tolerance, prefix, plain, device):
    """From an initial state, or from the final state of a prefix; outputs of every token and the state in the end."""
    sequences, parameters, state_shape = case(device, dtype)
    parameters = {name: t.to(torch.promote_types(dtype, torch.float32)) for name, t in parameters.items()}
    if plain:
        parameters = {name: t for name, t in parameters.items() if name in ("A", "weight")}
        options = {}
        if "dt" in sequences:
            sequences["dt"] = sequences["dt"].abs()
    state_dtype = dtype if op is causal_conv1d else torch.promote_types(dtype, torch.float32)
    initial = randn(*state_shape, seed=5, device=device, dtype=state_dtype)
    arguments = parameters | options
    whole, whole_state = op(**sequences, **arguments, initial_state=initial, return_final_state=True)
    state = initial.clone()
    if prefix:
        head = {name: t[:, :prefix] for name, t in sequences.items()}
        _, state = op(**head, **arguments, initial_state=initial, return_final_state=True)
    ys = run_steps(step, state, sequences, arguments, first=prefix)
    assert ys.dtype == dtype
    assert_close({"y": ys, "state": state}, {"y": whole[:, prefix:], "state": whole_state}, tolerance)


@pytest.mark.parametrize("groups", [1, 4])
def test_groups(groups, device):
    sequences, parameters, state_shape = ssd_case(device, torch.float64, groups)
    whole, whole_state = ssd(**sequences, **parameters, dt_softplus=True, return_final_state=True)
    state = torch.zeros(state_shape, dtype=torch.float64, device=device)
    ys = run_steps(ssd_step, state, sequences, parameters | SOFTPLUS)
    assert_close({"y": ys, "state": state}, {"y": whole, "state": whole_state}, EXACT)


@each_op
def test_updates_a_strided_state_in_place(op, step, case, options, device):
    """A slot of a larger cache, inputs that require gradients, and nothing recorded."""
    sequences, parameters, state_shape = case(device, torch.float64)
    parameters = {name: t.requires_grad_() for name, t in parameters.items()}
    whole, whole_state = op(**sequences, **parameters, **options, return_final_state=True)
    state = strided(torch.zeros(state_shape, dtype=torch.float64, device=device))
    address = state.data_ptr()
    ys = run_steps(step, state, {name: strided(t) for name, t in sequences.items()}, parameters | options)
    assert state.data_ptr() == address
    assert not ys.requires_grad
    assert_close({"y": ys, "state": state}, {"y": whole.detach(), "state": whole_state.detach()}, EXACT)


def test_rejects():
    x, row = torch.zeros(2, 6, 3), torch.zeros(6)
    with pytest.raises(ValueError, match=r"ssd_step: state has shape \(2, 6, 4\), wanted \[B, H, P, N\] = \(2, 6, 3, N\)"):
        ssd_step(torch.zeros(2, 6, 4), x, torch.zeros(2, 6), row, torch.zeros(2, 1, 4), torch.zeros(2, 1, 4))
    with pytest.raises(ValueError, match="ssd_step: B and C have 4 groups, wanted a divisor of the 6 heads"):
        ssd_step(torch.zeros(2, 6, 3, 4), x, torch.zeros(2, 6), row, torch.zeros(2, 4, 4), torch.zeros(2, 4, 4))
    with pytest.raises(ValueError, match=r"selective_scan_step: C has shape \(2, 5\), wanted \[B, N\] = \(2, 4\)"):
        selective_scan_step(torch.zeros(2, 6, 4), x[..., 0], x[..., 0], torch.zeros(6, 4), torch.zeros(2, 4), torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"causal_conv1d_step: state has shape \(2, 4, 6\), wanted \[B, W-1, C\] = \(2, 3, 6\)"):
        causal_conv1d_step(torch.zeros(2, 4, 6), x[..., 0], torch.zeros(6, 4))
    with pytest.raises(ValueError, match="causal_conv1d_step: activation is 'gelu', wanted None or 'silu'"):
        causal_conv1d_step(torch.zeros(2, 3, 6), x[..., 0], torch.zeros(6, 4), activation="gelu")
