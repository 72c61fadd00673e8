"""`rms_norm` and `layer_norm` against their definitions in float64."""

from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
from op_testing import (
    EXACT,
    ONE_BF16_ROUNDING,
    assert_close,
    in_float64,
    outputs_and_gradients,
    randn,
    saved_elements,
    use_blocks,
)

from mamba_kernels import backend, layer_norm, rms_norm

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


def make_inputs(*shape, bias, residual, device="cpu", dtype=torch.float64, hidden=HIDDEN):
    draw = partial(randn, device=device, dtype=dtype)
    inputs = {"x": draw(*shape, hidden) + 0.5, "weight": draw(hidden)}
    if bias:
        inputs["bias"] = draw(hidden, seed=1)
    if residual:
        inputs["residual"] = draw(*shape, hidden, seed=2)
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
@pytest.mark.parametrize("residual", [None, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused(op, oracle, bias, residual, dtype, fused_device, poisoned):
    """A block larger than the tensor, and programs that loop over blocks of rows that do not fill the last."""
    inputs = make_inputs(3, 9, bias=bias, residual=False, device=fused_device, dtype=dtype, hidden=100)
    inputs |= {name: t.float() for name, t in inputs.items() if name != "x"}
    if residual is not None:
        inputs["residual"] = randn(3, 9, 100, seed=2, device=fused_device, dtype=residual)
    for strides, loops in ((False, nullcontext), (True, looping)):
        with loops():
            got = outputs_and_gradients(op, inputs, strides=strides)
        assert got["output 0"].dtype == dtype
        if residual is not None:
            assert torch.equal(got["output 1"], inputs["x"] + inputs["residual"])
        want = rounding_h(oracle, inputs, got.get("output 1"))
        for name, t in got.items():
            assert_close({name: t}, {name: want[name]}, 1e-6 if t.dtype == torch.float32 else ONE_BF16_ROUNDING)


@contextmanager
def looping():
    """Two programs, of four rows at a time."""
    from mamba_kernels.norm import fused

    meta = {"PROGRAMS": 2, "BLOCK_T": 4, "STAGES": 2, "num_warps": 4}
    with fused.FORWARD.forced(meta), fused.BACKWARD.forced(meta):
        yield


def rounding_h(oracle, inputs, h):
    """The oracle's outputs and gradients, where what is normalised is the sum as it was rounded."""
    wide = in_float64(inputs)
    if h is None:
        return outputs_and_gradients(oracle, wide)
    off = h.double() - (wide["x"] + wide["residual"])
    return outputs_and_gradients(lambda **t: oracle(**t | {"residual": t["residual"] + off}), wide)


def test_fused_reads_slices_where_they_are(fused_device):
    """Of wider rows nothing beside the slice is read."""
    packed = torch.full((5, 40), torch.nan, device=fused_device)
    packed[:, 8:24] = randn(5, 16, dtype=torch.float32, device=fused_device)
    x, weight = packed[:, 8:24], torch.ones(16, device=fused_device)
    torch.testing.assert_close(rms_norm(x, weight, eps=EPS), rms_oracle(x, weight))

    from mamba_kernels.norm.fused import as_rows

    assert as_rows(x).data_ptr() == x.data_ptr()
    assert as_rows(x.unflatten(0, (5, 1))).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("stride", [1 << 9, pytest.param(1 << 29, marks=pytest.mark.gpu)])
def test_fused_rows_far_apart(stride, fused_device):
    """Elements past the 2^31st."""
    if stride > 1 << 9 and fused_device == "cpu":
        pytest.skip("takes 4 GiB of a GPU")
    x = torch.empty(4 * stride + 16, dtype=torch.bfloat16, device=fused_device).as_strided((5, 16), (stride, 1))
    x.copy_(randn(5, 16, device=fused_device))
    weight = randn(16, device=fused_device, dtype=torch.float32)
    got = outputs_and_gradients(lambda weight: rms_norm(x, weight, eps=EPS), {"weight": weight})
    want = outputs_and_gradients(lambda weight: rms_oracle(x.double(), weight), {"weight": weight.double()})
    assert_close(got, want, ONE_BF16_ROUNDING)


@pytest.mark.parametrize("used", [0, 1])
def test_fused_with_one_output_used(used, fused_device):
    """The gradients through one of (norm, h) alone, and of weights only where there are any."""
    inputs = make_inputs(4, bias=False, residual=True, device=fused_device, dtype=torch.float32)
    inputs["residual"] = inputs["residual"].bfloat16()

    def one(op):
        return lambda **t: op(**t)[used]

    want = outputs_and_gradients(one(rms_oracle), in_float64(inputs))
    assert_close(outputs_and_gradients(one(partial(rms_norm, eps=EPS)), inputs), want, ONE_BF16_ROUNDING)


def test_fused_keeps_only_h(fused_device):
    inputs = make_inputs(50, bias=False, residual=True, device=fused_device, dtype=torch.float32)
    assert saved_elements(lambda x, weight, **rest: rms_norm(x, weight, eps=EPS), inputs) == 0
    assert saved_elements(partial(rms_norm, eps=EPS), inputs) == 50 * HIDDEN


@pytest.mark.parametrize("residual", [False, True])
def test_fused_without_tokens(residual, fused_device):
    inputs = make_inputs(0, bias=True, residual=residual, device=fused_device, dtype=torch.float32)
    got = outputs_and_gradients(partial(layer_norm, eps=EPS), inputs)
    assert got["output 0"].shape == (0, HIDDEN)
    assert not got["gradient of weight"].any()
    assert not got["gradient of bias"].any()


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


@pytest.mark.parametrize("rows", [0, 3, 200])
def test_sum_of_rows(rows, fused_device, poisoned):
    """Of few rows and of many, into one output or two of another dtype each."""
    from mamba_kernels.norm.fused import sum_rows_into

    partials = randn(rows, 70, device=fused_device, dtype=torch.float32)
    for cut in (70, 11):
        first = torch.empty(cut, dtype=torch.bfloat16, device=fused_device)
        second = torch.empty(70 - cut, device=fused_device) if cut < 70 else None
        sum_rows_into(partials, first, second)
        assert_close({"": first}, {"": partials[:, :cut].double().sum(0)}, ONE_BF16_ROUNDING)
        if second is not None:
            assert_close({"": second}, {"": partials[:, cut:].double().sum(0)}, 1e-6)


def compile_cases():
    """Every kernel at the shape of the 8B models, for the test that compiles them without a GPU."""
    norm, add_norm, backward = (backend.KERNELS[name] for name in ("norm", "add_norm", "norm_backward"))
    x, weight = torch.empty(8192, 4096, dtype=torch.bfloat16, device="meta"), torch.empty(4096, device="meta")
    for layer in (False, True):
        bias = weight if layer else None
        yield f"norm {layer}", lambda layer=layer, bias=bias: norm(x, weight, bias, EPS, layer, False)
        yield f"add_norm {layer}", lambda layer=layer, bias=bias: add_norm(x, x.float(), weight, bias, EPS, layer, layer)
        for g_h, residual in ((None, x), (x.float(), x.float())):
            options = (EPS, layer, layer, x.dtype, residual.dtype)
            yield (
                f"backward {layer} {residual.dtype}",
                lambda bias=bias, g_h=g_h, options=options, h=residual: backward(h, weight, bias, x, g_h, *options),
            )
