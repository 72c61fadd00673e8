"""`rope` against rotations of pairs of numbers, one pair at a time."""

import math

import pytest
import torch
from op_testing import EXACT, ONE_BF16_ROUNDING, assert_close, in_float64, outputs_and_gradients, randn

from mamba_kernels import backend, rope, rope_tables

BATCH, LENGTH, HEADS, HEAD_DIM = 2, 5, 3, 10
BASE = 10000.0


def oracle(x, cos, sin):
    """The complex numbers (x[i], x[i + half]) times (cos[i], sin[i])."""
    half = cos.shape[-1]
    pairs = torch.complex(x[..., :half], x[..., half : 2 * half])
    turned = pairs * torch.complex(cos, sin).unsqueeze(-2)
    return torch.cat([turned.real, turned.imag, x[..., 2 * half :]], -1)


def tables(rotary_dim, batched, device):
    positions = torch.arange(LENGTH, device=device)
    if batched:
        positions = torch.stack([positions, positions * 7 + 3])
    return [t.double() for t in rope_tables(positions, rotary_dim, BASE)]


@pytest.mark.parametrize("position", [0, 1, 4095, 1_000_000])
def test_tables(position, device):
    """To float32 rounding at any position: angles in float32 would be wrong by 0.03 at a million."""
    cos, sin = rope_tables(torch.tensor([position], device=device), 16, BASE)
    assert cos.dtype == sin.dtype == torch.float32
    for i in range(8):
        angle = position * BASE ** (-2 * i / 16)
        assert abs(cos[0, i].item() - math.cos(angle)) < 1e-7
        assert abs(sin[0, i].item() - math.sin(angle)) < 1e-7


def test_table_shapes(device):
    positions = torch.arange(6, dtype=torch.int32, device=device)
    for shape in ((6,), (2, 3)):
        assert all(t.shape == (*shape, 4) for t in rope_tables(positions.view(shape), 8, BASE))


@pytest.mark.parametrize("batched", [False, True], ids=["", "batched"])
@pytest.mark.parametrize("rotary_dim", [2, 4, HEAD_DIM])
def test_float64_outputs_and_gradients(rotary_dim, batched, device):
    cos, sin = tables(rotary_dim, batched, device)
    inputs = {"x": randn(BATCH, LENGTH, HEADS, HEAD_DIM, device=device), "cos": cos, "sin": sin}
    want = outputs_and_gradients(oracle, inputs)
    for strides in (False, True):
        assert_close(outputs_and_gradients(rope, inputs, strides=strides), want, EXACT)


def test_products_depend_on_distance(device):
    """What the embedding is for: <q_i, k_j> after rotation is a function of i - j."""
    q, k = (randn(1, 1, 1, 8, seed=i, device=device) for i in range(2))
    cos, sin = rope_tables(torch.arange(200, device=device), 8, BASE)
    q, k = (rope(t.expand(1, 200, 1, 8), cos.double(), sin.double())[0, :, 0] for t in (q, k))
    products = q @ k.T
    for distance in (0, 1, 50):
        diagonal = products.diagonal(-distance)
        assert (diagonal - diagonal[0]).abs().max() < 1e-5


def test_gradcheck(device):
    cos, sin = tables(4, True, device)
    x = randn(BATCH, LENGTH, 1, 5, device=device)
    assert torch.autograd.gradcheck(rope, [t.requires_grad_() for t in (x, cos, sin)])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, ONE_BF16_ROUNDING)])
def test_low_precision(dtype, tolerance, device):
    cos, sin = (t.float() for t in tables(4, False, device))
    inputs = {"x": randn(BATCH, LENGTH, HEADS, HEAD_DIM, device=device, dtype=dtype), "cos": cos, "sin": sin}
    got = outputs_and_gradients(rope, inputs)
    assert got["output 0"].dtype == dtype
    assert_close(got, outputs_and_gradients(oracle, in_float64(inputs)), tolerance)


@pytest.mark.parametrize("batched", [False, True], ids=["", "batched"])
@pytest.mark.parametrize("rotary_dim", [2, 6, HEAD_DIM])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, ONE_BF16_ROUNDING)])
def test_fused(rotary_dim, batched, dtype, tolerance, fused_device, poisoned):
    """Also of tables that want gradients; rows that do not fill a block, rotated in part and whole."""
    from mamba_kernels.rope import fused

    cos, sin = (t.float() for t in tables(rotary_dim, batched, fused_device))
    inputs = {"x": randn(BATCH, LENGTH, HEADS, HEAD_DIM, device=fused_device, dtype=dtype), "cos": cos, "sin": sin}
    want = outputs_and_gradients(oracle, in_float64(inputs))
    for strides in (False, True):
        with fused.ROTATE.forced({"ROWS": 8, "num_warps": 1}):
            assert_close(outputs_and_gradients(rope, inputs, strides=strides), want, tolerance)


def test_fused_on_a_slice(fused_device):
    """Of a packed projection, read where it is; without gradients of the tables x is not kept."""
    packed = torch.full((BATCH, LENGTH, 2 * HEADS, HEAD_DIM), torch.nan, device=fused_device)
    x = packed[:, :, HEADS:]
    x.copy_(randn(BATCH, LENGTH, HEADS, HEAD_DIM, dtype=torch.float32, device=fused_device))
    cos, sin = (t.float() for t in tables(4, False, fused_device))
    assert_close({"": rope(x, cos, sin)}, {"": oracle(x.double(), cos.double(), sin.double())}, 1e-6)
    x = x.clone().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        rope(x, cos, sin).sum().backward()
    assert set(kept) == {cos.data_ptr(), sin.data_ptr()}

    from mamba_kernels.common import unit_stride

    assert unit_stride(packed[:, :, HEADS:]).data_ptr() == packed[:, :, HEADS:].data_ptr()


@pytest.mark.parametrize("stride", [1 << 9, pytest.param(1 << 29, marks=pytest.mark.gpu)])
def test_fused_rows_far_apart(stride, fused_device):
    """Elements past the 2^31st."""
    if stride > 1 << 9 and fused_device == "cpu":
        pytest.skip("takes 4 GiB of a GPU")
    x = torch.empty(4 * stride + HEAD_DIM, dtype=torch.bfloat16, device=fused_device)
    x = x.as_strided((1, LENGTH, 1, HEAD_DIM), (4 * stride, stride, HEAD_DIM, 1))
    x.copy_(randn(1, LENGTH, 1, HEAD_DIM, device=fused_device))
    inputs = dict(zip(("cos", "sin"), (t.float() for t in tables(4, False, fused_device)), strict=True))
    got = outputs_and_gradients(lambda cos, sin: rope(x, cos, sin), inputs)
    want = outputs_and_gradients(lambda cos, sin: oracle(x.double(), cos, sin), in_float64(inputs))
    assert_close(got, want, ONE_BF16_ROUNDING)


def test_rejects():
    x, table = torch.zeros(2, 5, 3, 8), torch.zeros(5, 4)
    rope(x, table, table)
    for cos, sin, message in [
        (torch.zeros(4, 4), table, r"rope: cos has shape \(4, 4\), wanted \[S, half\] = \(5, half\)"),
        (table, torch.zeros(5, 3), r"rope: sin has shape \(5, 3\), wanted \[S, half\] = \(5, 4\)"),
        (torch.zeros(1, 5, 4), torch.zeros(1, 5, 4), r"wanted \[B, S, half\] = \(2, 5, half\)"),
        (torch.zeros(5, 5), torch.zeros(5, 5), "rope: cos rotates 10 dimensions, wanted at most the 8"),
    ]:
        with pytest.raises(ValueError, match=message):
            rope(x, cos, sin)
    with pytest.raises(ValueError, match=r"rope_tables: positions has dtype torch.float32, wanted an integer dtype"):
        rope_tables(torch.zeros(3), 8, BASE)
    with pytest.raises(ValueError, match="rope_tables: rotary_dim is 7, wanted a positive even number"):
        rope_tables(torch.arange(3), 7, BASE)


def compile_cases():
    """Every kernel at the shape of the 8B models, for the test that compiles them without a GPU."""
    q = torch.empty(2, 4096, 48, 128, dtype=torch.bfloat16, device="meta")[:, :, :32]
    cos = torch.empty(4096, 64, device="meta")
    yield "rope", lambda: backend.KERNELS["rope"](q, cos, cos)
    yield "rope_backward", lambda: backend.KERNELS["rope_backward"](q, cos, cos)
    yield "half", lambda: backend.KERNELS["rope"](q, cos[:, :32], cos[:, :32])
    yield "rope_tables_backward", lambda: backend.KERNELS["rope_tables_backward"](q, cos, cos, q)
