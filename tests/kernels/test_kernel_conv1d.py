"""`causal_conv1d` against sums over the inputs of the same document, one token at a time in float64."""

from contextlib import contextmanager
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

from mamba_kernels import backend, causal_conv1d

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


@contextmanager
def sliding(tokens, unroll, block=8):
    """Programs of so many tokens."""
    from mamba_kernels.conv1d import fused

    meta = {"TOKENS": tokens, "UNROLL": unroll, "BLOCK_C": block, "STAGES": 2, "num_warps": 1}
    with fused.FORWARD.forced(meta), fused.BACKWARD.forced(meta):
        yield


@pytest.mark.parametrize(
    ("length", "tokens", "unroll", "initial", "documents"),
    [(1, 4, 2, True, False), (2, 4, 4, True, True), (19, 8, 4, True, True), (16, 8, 4, True, True), (9, 2, 1, True, True)],
)
def test_fused(length, tokens, unroll, initial, documents, fused_device, poisoned):
    """Sequences shorter than the filter, programs shorter than it, and a last program with tokens to spare."""
    starts = document_starts(BATCH, length, fused_device) if documents else None
    inputs = make_inputs(length, device=fused_device, dtype=torch.float32, initial=initial)
    options = {"activation": "silu", "document_start": starts}
    want = outputs_and_gradients(partial(oracle, **options), in_float64(inputs))
    with sliding(tokens, unroll):
        assert_close(outputs_and_gradients(partial(causal_conv1d, **options, return_final_state=True), inputs), want, 1e-6)


@pytest.mark.parametrize(("width", "length", "activation"), [(2, 9, None), (5, 9, "silu"), (16, 5, None)])
def test_fused_widths_and_strides(width, length, activation, fused_device, poisoned):
    starts = document_starts(BATCH, length, fused_device).mT.contiguous().mT
    inputs = make_inputs(length, width, fused_device, torch.float32)
    options = {"activation": activation, "document_start": starts}
    want = outputs_and_gradients(partial(oracle, **options), in_float64(inputs))
    with sliding(8, 2):
        op = partial(causal_conv1d, **options, return_final_state=True)
        assert_close(outputs_and_gradients(op, inputs, strides=True), want, 1e-6)


@pytest.mark.parametrize("names", [("x", "weight"), ("x", "weight", "bias"), ("x", "weight", "initial_state")], ids=str)
def test_fused_in_bfloat16(names, fused_device, poisoned):
    """Weights in float32, and no gradient from the final state."""
    inputs = {name: t for name, t in make_inputs(9, device=fused_device, dtype=torch.bfloat16).items() if name in names}
    inputs |= {name: inputs[name].float() for name in ("weight", "bias") if name in inputs}
    with sliding(8, 4):
        got = outputs_and_gradients(partial(causal_conv1d, activation="silu"), inputs)
    assert got["output 0"].dtype == torch.bfloat16
    want = outputs_and_gradients(lambda **t: oracle(**t, activation="silu")[0], in_float64(inputs))
    assert_close(got, want, ONE_BF16_ROUNDING)


def test_fused_final_state_alone(fused_device, poisoned):
    inputs = make_inputs(5, device=fused_device, dtype=torch.float32)
    with sliding(4, 2):
        got = outputs_and_gradients(lambda **t: causal_conv1d(**t, return_final_state=True)[1], inputs)
    want = outputs_and_gradients(lambda **t: oracle(**t)[1], in_float64(inputs))
    assert_close(got, want, 1e-6)


def test_fused_without_tokens(fused_device):
    leaves = {name: t.requires_grad_() for name, t in make_inputs(0, device=fused_device, dtype=torch.float32).items()}
    starts = torch.zeros(BATCH, 0, dtype=torch.bool, device=fused_device)
    y, state = causal_conv1d(**leaves, document_start=starts, return_final_state=True)
    assert y.shape == (BATCH, 0, CHANNELS)
    assert torch.equal(state, leaves["initial_state"])
    g_state = randn(*state.shape, seed=3, device=fused_device, dtype=torch.float32)
    g_x, g_weight, g_bias, g_initial = torch.autograd.grad((y, state), leaves.values(), (y.detach(), g_state))
    assert g_x.shape == y.shape
    assert not g_weight.any()
    assert not g_bias.any()
    assert torch.equal(g_initial, g_state)


def test_fused_reads_x_where_it_is(fused_device):
    """Of wider rows nothing beside x is read, and the gradients of one packed tensor add up in it."""
    packed = torch.full((2, 6, 20), torch.nan, device=fused_device)
    x, weight = packed[..., 8 : 8 + CHANNELS], randn(CHANNELS, 4, dtype=torch.float32, device=fused_device)
    x.copy_(randn(2, 6, CHANNELS, dtype=torch.float32, device=fused_device))
    with sliding(4, 2):
        y = causal_conv1d(x, weight)
    assert_close({"y": y}, {"y": oracle(x.double(), weight.double())[0]}, 1e-6)

    from mamba_kernels.common import unit_stride

    assert unit_stride(x).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("stride", [1 << 9, pytest.param(1 << 29, marks=pytest.mark.gpu)])
def test_fused_rows_far_apart(stride, fused_device):
    """Elements past the 2^31st, of tokens and of sequences."""
    if stride > 1 << 9 and fused_device == "cpu":
        pytest.skip("takes 4 GiB of a GPU")
    x = torch.empty(4 * stride + 16, dtype=torch.bfloat16, device=fused_device)
    weight = randn(16, 4, device=fused_device, dtype=torch.float32)
    for batch, length in ((1, 5), (5, 1)):
        near = randn(batch, length, 16, device=fused_device, dtype=torch.bfloat16)
        far = x.as_strided(near.shape, (stride, stride, 1)).copy_(near)
        with sliding(4, 2, 16):
            got = outputs_and_gradients(lambda weight, far=far: causal_conv1d(far, weight), {"weight": weight})
        want = outputs_and_gradients(lambda weight, near=near: oracle(near.double(), weight)[0], {"weight": weight.double()})
        assert_close(got, want, ONE_BF16_ROUNDING)


def test_fused_grid_fits():
    """Of a sequence however long: a grid's second dimension has at most 65,535 programs."""
    from mamba_kernels.conv1d.fused import FORWARD, _configured

    for length in (1, 5, 4096, 10_000_001):
        grid, meta = _configured(FORWARD, torch.empty(3, length, 8, device="meta"), 4)
        assert grid[1] <= 65535
        assert grid[1] * meta["TOKENS"] >= length > (grid[1] - 1) * meta["TOKENS"]
        assert meta["TOKENS"] % meta["UNROLL"] == 0


def test_fused_keeps_only_inputs(fused_device):
    inputs = make_inputs(5, device=fused_device, dtype=torch.float32)
    with sliding(4, 2):
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


def compile_cases():
    """Every kernel at the shape of the 8B models, for the test that compiles them without a GPU."""
    forward, backward = backend.KERNELS["causal_conv1d"], backend.KERNELS["causal_conv1d_backward"]
    x = torch.empty(2, 4096, 18560, dtype=torch.bfloat16, device="meta")[..., 8192:18432]
    weight, bias = torch.empty(10240, 4, device="meta"), torch.empty(10240, device="meta")
    initial, starts = torch.empty_like(x[:, :3]), torch.empty(2, 4096, dtype=torch.bool, device="meta")
    yield "forward", lambda: forward(x, weight, bias, None, None, True)
    yield "forward, documents", lambda: forward(x, weight, bias, initial, starts, True)
    yield "backward", lambda: backward(x, weight, bias, None, None, torch.empty_like(x), None, True)
    yield "backward, all", lambda: backward(x, weight, bias, initial, starts, torch.empty_like(x), initial, True)
