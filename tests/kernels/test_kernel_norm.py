"""`rms_norm` and `layer_norm` against their definitions in float64."""

from functools import partial

import pytest
import torch
from op_testing import EXACT, ONE_BF16_ROUNDING, assert_close, in_float64, outputs_and_gradients, randn, use_blocks

from mamba_kernels import layer_norm, rms_norm

HIDDEN = 12
EPS = 1e-5


def rms_oracle(x, weight, residual=None):
    h = x if residual is None else x + residual
    out = weight * h / (h.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
    return out if residual is None else (out, h)


def layer_oracle(x, weight, bias=None, residual=None, *, zero_centered=False):
    h = x if residual is None else x + residual
    centred = h - h.mean(-1, keepdim=True)
    out = (weight + zero_centered) * centred / (centred.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
    out = out if bias is None else out + bias
    return out if residual is None else (out, h)


OPS = {
    "rms_norm": (partial(rms_norm, eps=EPS), rms_oracle, False),
    "layer_norm": (partial(layer_norm, eps=EPS), layer_oracle, True),
    "layer_norm_1p": (partial(layer_norm, eps=EPS, zero_centered=True), partial(layer_oracle, zero_centered=True), True),
}
each_op = pytest.mark.parametrize(("op", "oracle", "bias"), OPS.values(), ids=OPS)


def make_inputs(*shape, bias, residual, device="cpu", dtype=torch.float64):
    draw = partial(randn, device=device, dtype=dtype)
    inputs = {"x": draw(*shape, HIDDEN) + 0.5, "weight": draw(HIDDEN)}
    if bias:
        inputs["bias"] = draw(HIDDEN, seed=1)
    if residual:
        inputs["residual"] = draw(*shape, HIDDEN, seed=2)
    return inputs


@each_op
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("shape", [(), (7,), (3, 5)])
def test_float64_outputs_and_gradients(op, oracle, bias, residual, shape, device, monkeypatch):
    use_blocks(monkeypatch, 2 * HIDDEN)
    inputs = make_inputs(*shape, bias=bias, residual=residual, device=device)
    want = outputs_and_gradients(oracle, inputs)
    for strides in (False, True):
        assert_close(outputs_and_gradients(op, inputs, strides=strides), want, EXACT)


def test_layer_norm_without_bias(device):
    inputs = make_inputs(7, bias=False, residual=False, device=device)
    got = outputs_and_gradients(partial(layer_norm, bias=None, eps=EPS), inputs)
    assert_close(got, outputs_and_gradients(layer_oracle, inputs), EXACT)


@each_op
def test_gradcheck(op, oracle, bias, device):
    inputs = make_inputs(3, bias=bias, residual=True, device=device)
    leaves = [t[..., :4].requires_grad_() for t in inputs.values()]
    assert torch.autograd.gradcheck(lambda *t: op(**dict(zip(inputs, t, strict=True))), leaves)


@each_op
@pytest.mark.parametrize("residual", [None, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, ONE_BF16_ROUNDING)])
def test_low_precision(op, oracle, bias, residual, dtype, tolerance, device):
    """float32 weights beside any x and residual; error against float64 on the same rounded inputs and the same h."""
    inputs = make_inputs(50, bias=bias, residual=False, device=device, dtype=dtype)
    inputs |= {name: t.float() for name, t in inputs.items() if name != "x"}
    if residual is None:
        assert op(**inputs).dtype == dtype
        assert_close(outputs_and_gradients(op, inputs), outputs_and_gradients(oracle, in_float64(inputs)), tolerance)
        return
    inputs["residual"] = randn(50, HIDDEN, seed=2, device=device, dtype=residual)
    out, h = op(**inputs)
    assert torch.equal(h, inputs["x"] + inputs["residual"])
    assert out.dtype == dtype
    parameters = {name: t for name, t in inputs.items() if name in ("weight", "bias")}
    assert_close({"out": out}, {"out": oracle(h.double(), **in_float64(parameters))}, tolerance)


@each_op
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(5)}, r"norm: weight has shape \(5,\), wanted \[D\] = \(4\)"),
        ({"residual": torch.zeros(3, 4)}, r"norm: residual has shape \(3, 4\), wanted \[..., D\] = \(\(2, 3\), 4\)"),
        ({"x": torch.zeros(2, 3, 4, dtype=torch.int32)}, "norm: x has dtype torch.int32, wanted a floating-point dtype"),
    ],
)
def test_rejects(op, oracle, bias, change, message):
    arguments = {"x": torch.zeros(2, 3, 4), "weight": torch.zeros(4)} | ({"bias": torch.zeros(4)} if bias else {})
    op(**arguments)
    with pytest.raises(ValueError, match=message):
        op(**arguments | change)
