"""`causal_conv1d` against sums over the inputs of the same document, one token at a time in float64."""

from functools import partial

import pytest
import torch
from op_testing import (
    EXACT,
    LENGTHS,
    ONE_BF16_ROUNDING,
    assert_close,
    document_starts,
    in_float64,
    outputs_and_gradients,
    randn,
    saved_elements,
    use_blocks,
)

from mamba_kernels import causal_conv1d

BATCH, CHANNELS = 3, 5


def oracle(x, weight, bias=None, initial_state=None, *, activation=None, document_start=None):
    """y and the inputs a following call needs, from a window that is cleared at every document start."""
    width = weight.shape[1]
    history = x.new_zeros(len(x), width - 1, x.shape[2]) if initial_state is None else initial_state
    ys = []
    for t in range(x.shape[1]):
        if document_start is not None:
            history = torch.where(document_start[:, t, None, None], 0.0, history)
        window = torch.cat([history, x[:, t : t + 1]], 1)
        y = torch.einsum("bwc,cw->bc", window, weight)
        y = y if bias is None else y + bias
        ys.append(y if activation is None else y * torch.sigmoid(y))
        history = window[:, 1:]
    return torch.stack(ys, 1), history


def make_inputs(length, width=4, device="cpu", dtype=torch.float64, initial=True):
    draw = partial(randn, device=device, dtype=dtype)
    inputs = {"x": draw(BATCH, length, CHANNELS), "weight": draw(CHANNELS, width), "bias": draw(CHANNELS)}
    if initial:
        inputs["initial_state"] = draw(BATCH, width - 1, CHANNELS, seed=1)
    return inputs


@pytest.mark.parametrize("documents", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("initial", [False, True], ids=["", "initial"])
@pytest.mark.parametrize("length", [*LENGTHS, 2, 3])
def test_float64_outputs_and_gradients(length, initial, documents, device, monkeypatch):
    starts = document_starts(BATCH, length, device) if documents else None
    inputs = make_inputs(length, device=device, initial=initial)
    options = {"activation": "silu", "document_start": starts}
    want = outputs_and_gradients(partial(oracle, **options), inputs)
    op = partial(causal_conv1d, **options, return_final_state=True)
    assert_close(outputs_and_gradients(op, inputs), want, EXACT)
    for block in (2, 30):
        use_blocks(monkeypatch, block * CHANNELS)
        assert_close(outputs_and_gradients(op, inputs), want, EXACT)


@pytest.mark.parametrize("width", [1, 2, 4, 7])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_widths_and_strides(width, activation, device):
    starts = document_starts(BATCH, 20, device)
    inputs = make_inputs(20, width, device)
    options = {"activation": activation, "document_start": starts}
    want = outputs_and_gradients(partial(oracle, **options), inputs)
    op = partial(causal_conv1d, **options, return_final_state=True)
    for strides in (False, True):
        assert_close(outputs_and_gradients(op, inputs, strides=strides), want, EXACT)


def test_without_options(device):
    inputs = {name: t for name, t in make_inputs(20, device=device).items() if name in ("x", "weight")}
    assert_close(outputs_and_gradients(causal_conv1d, inputs), outputs_and_gradients(lambda **t: oracle(**t)[0], inputs), EXACT)


def test_gradcheck(device):
    tensors = [randn(*shape, seed=i, device=device) for i, shape in enumerate([(2, 5, 2), (2, 3), (2,), (2, 2, 2)])]
    starts = torch.tensor([[0, 0, 1, 0, 0], [1, 0, 0, 1, 1]], dtype=torch.bool, device=device)

    def op(x, weight, bias, initial_state):
        options = {"initial_state": initial_state, "document_start": starts, "return_final_state": True}
        return causal_conv1d(x, weight, bias, activation="silu", **options)

    assert torch.autograd.gradcheck(op, [t.requires_grad_() for t in tensors])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, ONE_BF16_ROUNDING)])
def test_low_precision(dtype, tolerance, device):
    """Weights stay float32; error against float64 on the same rounded inputs."""
    options = {"activation": "silu", "document_start": document_starts(BATCH, 100, device)}
    inputs = make_inputs(100, device=device, dtype=dtype)
    inputs |= {name: inputs[name].float() for name in ("weight", "bias")}
    want = outputs_and_gradients(partial(oracle, **options), in_float64(inputs))
    got = outputs_and_gradients(partial(causal_conv1d, **options, return_final_state=True), inputs)
    assert got["output 0"].dtype == got["output 1"].dtype == dtype
    assert_close(got, want, tolerance)


@pytest.mark.parametrize("cut", [1, 2, 3, 17, 39])
def test_continues_from_final_state(cut, device):
    """A sequence in two calls is the sequence in one, also where the first is shorter than the filter."""
    inputs, starts = make_inputs(40, device=device), document_starts(BATCH, 40, device)
    op = partial(causal_conv1d, weight=inputs["weight"], bias=inputs["bias"], return_final_state=True)
    x, initial = inputs["x"], inputs["initial_state"]
    whole, whole_state = op(x, initial_state=initial, document_start=starts)
    first, state = op(x[:, :cut], initial_state=initial, document_start=starts[:, :cut])
    second, state = op(x[:, cut:], initial_state=state, document_start=starts[:, cut:])
    assert_close({"y": torch.cat([first, second], 1), "state": state}, {"y": whole, "state": whole_state}, EXACT)


def test_keeps_only_inputs():
    inputs = make_inputs(100)
    assert saved_elements(partial(causal_conv1d, activation="silu", return_final_state=True), inputs) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 5)}, r"causal_conv1d: x has shape \(4, 5\), wanted \[B, S, C\] = \(B, S, C\)"),
        ({"weight": torch.zeros(6, 3)}, r"causal_conv1d: weight has shape \(6, 3\), wanted \[C, W\] = \(5, W\)"),
        ({"bias": torch.zeros(3)}, r"causal_conv1d: bias has shape \(3,\), wanted \[C\] = \(5\)"),
        ({"initial_state": torch.zeros(2, 3, 5)}, r"initial_state has shape \(2, 3, 5\), wanted \[B, W-1, C\] = \(2, 2, 5\)"),
        ({"document_start": torch.zeros(2, 5, dtype=torch.bool)}, r"wanted \[B, S\] = \(2, 4\)"),
        ({"activation": "relu"}, "causal_conv1d: activation is 'relu', wanted None or 'silu'"),
    ],
)
def test_rejects(change, message):
    arguments = {"x": torch.zeros(2, 4, 5), "weight": torch.zeros(5, 3)}
    causal_conv1d(**arguments)
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**arguments | change)
