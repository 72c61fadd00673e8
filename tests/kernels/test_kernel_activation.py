"""The activations against their definitions in float64."""

import math
from functools import partial

import pytest
import torch
from op_testing import EXACT, ONE_BF16_ROUNDING, assert_close, in_float64, outputs_and_gradients, randn, saved_elements, use_blocks

from mamba_kernels import backend, gelu, squared_relu, swiglu


def gelu_oracle(x):
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def gelu_tanh_oracle(x):
    return x * 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


OPS = {
    "swiglu": (swiglu, lambda gate, up: gate * torch.sigmoid(gate) * up, ("gate", "up")),
    "squared_relu": (squared_relu, lambda x: torch.where(x > 0.0, x * x, 0.0), ("x",)),
    "gelu": (gelu, gelu_oracle, ("x",)),
    "gelu_tanh": (partial(gelu, approximate="tanh"), gelu_tanh_oracle, ("x",)),
}
each_op = pytest.mark.parametrize(("op", "oracle", "names"), OPS.values(), ids=OPS)


def make_inputs(names, *shape, device="cpu", dtype=torch.float64):
    return {name: 3.0 * randn(*shape, seed=i, device=device, dtype=dtype) for i, name in enumerate(names)}


@each_op
@pytest.mark.parametrize("shape", [(10,), (7, 10), (3, 5, 10)])
def test_float64_outputs_and_gradients(op, oracle, names, shape, device, monkeypatch):
    use_blocks(monkeypatch, 20)
    inputs = make_inputs(names, *shape, device=device)
    want = outputs_and_gradients(oracle, inputs)
    for strides in (False, True):
        assert_close(outputs_and_gradients(op, inputs, strides=strides), want, EXACT)


@each_op
def test_gradcheck(op, oracle, names, device):
    assert torch.autograd.gradcheck(op, [t.requires_grad_() for t in make_inputs(names, 3, 4, device=device).values()])


@each_op
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, ONE_BF16_ROUNDING)])
def test_low_precision(op, oracle, names, dtype, tolerance, device):
    """Error against float64 on the same rounded inputs: one rounding of the result."""
    inputs = make_inputs(names, 50, 10, device=device, dtype=dtype)
    got = outputs_and_gradients(op, inputs)
    assert got["output 0"].dtype == dtype
    want = outputs_and_gradients(oracle, in_float64(inputs))
    assert_close(got, want, tolerance)
    # Element by element, but where cancellation makes the result small against its terms.
    error = (got["output 0"].double() - want["output 0"]).abs()
    assert (error <= tolerance * want["output 0"].abs() + 1e-6).all()


@each_op
@pytest.mark.parametrize("shape", [(1, 9), (3, 100), (2, 3, 1100)], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, ONE_BF16_ROUNDING)])
def test_fused(op, oracle, names, shape, dtype, tolerance, fused_device):
    inputs = make_inputs(names, *shape, device=fused_device, dtype=dtype)
    want = outputs_and_gradients(oracle, in_float64(inputs))
    for strides in (False, True):
        assert_close(outputs_and_gradients(op, inputs, strides=strides), want, tolerance)


def test_fused_gelu_of_every_size(fused_device):
    """Relative to each value, also where that is a billionth; erf in float32 is right to a few per cent of it at -5 only."""
    x = torch.linspace(-6.0, 6.0, 4001, device=fused_device)
    ends = torch.tensor([-float("inf"), float("inf"), float("nan")], device=fused_device)
    assert torch.equal(gelu(ends)[:2], torch.tensor([0.0, float("inf")], device=fused_device))
    assert gelu(ends)[2].isnan()
    out = gelu(x.requires_grad_())
    slope = torch.autograd.grad(out.sum(), x)[0]
    wide = x.detach().double()
    tail, bell = 0.5 * torch.erfc(-wide / math.sqrt(2.0)), torch.exp(-0.5 * wide * wide) / math.sqrt(2.0 * math.pi)
    assert ((out - wide * tail).abs() <= 4e-6 * (wide * tail).abs()).all()
    assert_close({"slope": slope}, {"slope": tail + wide * bell}, 4e-7)


@pytest.mark.parametrize("stride", [1 << 9, pytest.param(1 << 29, marks=pytest.mark.gpu)])
def test_fused_rows_far_apart(stride, fused_device):
    """Elements past the 2^31st."""
    if stride > 1 << 9 and fused_device == "cpu":
        pytest.skip("takes 4 GiB of a GPU")
    gate = torch.empty(4 * stride + 16, dtype=torch.bfloat16, device=fused_device).as_strided((5, 16), (stride, 1))
    gate.copy_(randn(5, 16, device=fused_device))
    inputs = {"up": randn(5, 16, seed=1, device=fused_device, dtype=torch.bfloat16)}
    got = outputs_and_gradients(lambda up: swiglu(gate, up), inputs)
    want = outputs_and_gradients(lambda up: OPS["swiglu"][1](gate.double(), up), in_float64(inputs))
    assert_close(got, want, ONE_BF16_ROUNDING)


@pytest.mark.parametrize("kernels", ["reference", "fused"])
@each_op
def test_large_inputs_are_finite(op, oracle, names, kernels, request):
    device = request.getfixturevalue("fused_device") if kernels == "fused" else "cpu"
    inputs = make_inputs(names, 4, 10, device=device, dtype=torch.float32)
    inputs[names[0]][:2], inputs[names[0]][2:] = -1e4, 1e4
    assert all(t.isfinite().all() for t in outputs_and_gradients(op, inputs).values())


@each_op
def test_keeps_only_inputs(op, oracle, names):
    assert saved_elements(op, make_inputs(names, 20, 10)) == 0


def test_rejects():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"swiglu: up has shape \(2, 4\), wanted \[..., F\] = \(\(2,\), 3\)"):
        swiglu(x, torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"squared_relu: x has dtype torch.int64, wanted a floating-point dtype"):
        squared_relu(x.long())
    with pytest.raises(ValueError, match=r"gelu: approximate is 'erf', wanted 'none' or 'tanh'"):
        gelu(x, approximate="erf")


def compile_cases():
    """Every kernel at the shape of the 8B models, for the test that compiles them without a GPU."""
    kernels = backend.KERNELS
    packed = torch.empty(8192, 2 * 21504, dtype=torch.bfloat16, device="meta")
    gate, up = packed.chunk(2, -1)
    yield "swiglu", lambda: kernels["swiglu"](gate, up)
    yield "swiglu_backward", lambda: kernels["swiglu_backward"](gate, up, torch.empty_like(gate))
    for kind in range(1, 4):
        yield f"unary {kind}", lambda kind=kind: kernels["unary_activation"](packed, kind)
        yield f"unary {kind} backward", lambda kind=kind: kernels["unary_activation_backward"](packed, packed, kind)
