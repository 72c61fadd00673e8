"""`selective_scan` against the recurrence it stands for, one token at a time in float64."""

from functools import partial

import pytest
import torch
from op_testing import (
    DOCUMENTS,
    EXACT,
    LENGTHS,
    ONE_BF16_ROUNDING,
    PIECES,
    AllocationWatch,
    EchoRanks,
    assert_close,
    assert_spread_close,
    document_starts,
    in_float64,
    outputs_and_gradients,
    randn,
    rounded_once,
    saved_elements,
    starts_in_pieces,
)

from mamba_kernels import backend, selective_scan

BATCH, CHANNELS, STATE = 3, 6, 4


def oracle(x, dt, A, B, C, D=None, dt_bias=None, initial_state=None, *, dt_softplus=False, document_start=None):
    """y and the final state, token by token."""
    dt = dt if dt_bias is None else dt + dt_bias
    dt = torch.logaddexp(dt, torch.zeros_like(dt)) if dt_softplus else dt
    state = x.new_zeros(len(x), *A.shape) if initial_state is None else initial_state
    ys = []
    for t in range(x.shape[1]):
        if document_start is not None:
            state = torch.where(document_start[:, t, None, None], 0.0, state)
        state = torch.exp(dt[:, t, :, None] * A) * state + torch.einsum("be,be,bn->ben", dt[:, t], x[:, t], B[:, t])
        y = torch.einsum("ben,bn->be", state, C[:, t])
        ys.append(y if D is None else y + D * x[:, t])
    return torch.stack(ys, 1), state


def make_inputs(length, device="cpu", dtype=torch.float64, initial=True):
    draw = partial(randn, device=device, dtype=dtype)
    inputs = {
        "x": draw(BATCH, length, CHANNELS),
        "dt": draw(BATCH, length, CHANNELS, seed=1),
        "A": -2.0 * draw(CHANNELS, STATE).exp(),
        "B": draw(BATCH, length, STATE, seed=2),
        "C": draw(BATCH, length, STATE, seed=3),
        "D": draw(CHANNELS, seed=4),
        "dt_bias": draw(CHANNELS, seed=5) - 2.0,
    }
    if initial:
        inputs["initial_state"] = draw(BATCH, CHANNELS, STATE, seed=6)
    return inputs


def op(document_start=None):
    return partial(selective_scan, dt_softplus=True, document_start=document_start, return_final_state=True)


@pytest.mark.parametrize("documents", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("initial", [False, True], ids=["", "initial"])
@pytest.mark.parametrize("length", LENGTHS)
def test_float64_outputs_and_gradients(length, initial, documents, device):
    starts = document_starts(BATCH, length, device) if documents else None
    inputs = make_inputs(length, device, initial=initial)
    want = outputs_and_gradients(partial(oracle, dt_softplus=True, document_start=starts), inputs)
    assert_close(outputs_and_gradients(op(starts), inputs), want, EXACT)


def test_strides(device):
    starts = document_starts(BATCH, 40, device)
    inputs = make_inputs(40, device)
    want = outputs_and_gradients(partial(oracle, dt_softplus=True, document_start=starts), inputs)
    assert_close(outputs_and_gradients(op(starts), inputs, strides=True), want, EXACT)


def test_plain_dt_without_options(device):
    inputs = make_inputs(33, device)
    inputs = {name: inputs[name] for name in ("x", "dt", "A", "B", "C")}
    inputs["dt"] = inputs["dt"].abs()
    got = outputs_and_gradients(selective_scan, inputs)
    assert_close(got, outputs_and_gradients(lambda **t: oracle(**t)[0], inputs), EXACT)


def test_gradcheck(device):
    shapes = {"x": (2, 5, 2), "dt": (2, 5, 2), "A": (2, 2), "B": (2, 5, 2), "C": (2, 5, 2), "D": (2,), "dt_bias": (2,)}
    tensors = [randn(*shape, seed=i, device=device) for i, shape in enumerate((*shapes.values(), (2, 2, 2)))]
    tensors[2] = -tensors[2].abs()
    leaves = [t.requires_grad_() for t in tensors]
    starts = torch.tensor([[0, 0, 1, 0, 0], [1, 0, 0, 1, 1]], dtype=torch.bool, device=device)
    names = [*shapes, "initial_state"]
    assert torch.autograd.gradcheck(lambda *t: op(starts)(**dict(zip(names, t, strict=True))), leaves)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, ONE_BF16_ROUNDING)])
def test_low_precision(dtype, tolerance, device):
    """Parameters stay float32; error against float64 on the same rounded inputs."""
    starts = document_starts(BATCH, 100, device)
    inputs = make_inputs(100, device, dtype)
    inputs |= {name: inputs[name].float() for name in ("A", "D", "dt_bias", "initial_state")}
    want = outputs_and_gradients(partial(oracle, dt_softplus=True, document_start=starts), in_float64(inputs))
    got = outputs_and_gradients(op(starts), inputs)
    assert got["output 0"].dtype == dtype
    assert got["output 1"].dtype == torch.float32
    assert_close(got, want, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_decays(dtype, device):
    starts = document_starts(BATCH, 100, device)
    inputs = make_inputs(100, device, dtype)
    inputs["A"] *= torch.tensor([1e-4, 1.0, 4.0, 16.0], device=device, dtype=dtype)
    inputs["dt_bias"] = torch.tensor([30.0, -30.0, 22.0, 0.0, -30.0, 30.0], device=device, dtype=dtype)
    want = outputs_and_gradients(partial(oracle, dt_softplus=True, document_start=starts), in_float64(inputs))
    assert_close(outputs_and_gradients(op(starts), inputs), want, EXACT if dtype == torch.float64 else 2e-6)


def test_continues_from_final_state(device):
    """A sequence in two calls is the sequence in one."""
    inputs, starts = make_inputs(50, device), document_starts(BATCH, 50, device)
    sequences = ("x", "dt", "B", "C")
    whole, whole_state = op(starts)(**inputs)
    first, state = op(starts[:, :29])(**{n: t[:, :29] if n in sequences else t for n, t in inputs.items()})
    rest = {n: t[:, 29:] if n in sequences else t for n, t in inputs.items()} | {"initial_state": state}
    second, state = op(starts[:, 29:])(**rest)
    assert_close({"y": torch.cat([first, second], 1), "state": state}, {"y": whole, "state": whole_state}, EXACT)


def test_leaves_the_gradient_of_the_final_state_alone(device):
    """Whatever its layout: autograd may use it again."""
    leaves = {name: t.requires_grad_() for name, t in make_inputs(5, device).items()}
    gradient = randn(BATCH, STATE, CHANNELS, device=device).mT
    before = gradient.clone()
    torch.autograd.grad(op()(**leaves)[1], list(leaves.values()), gradient, allow_unused=True)
    assert torch.equal(gradient, before)


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("pieces", PIECES, ids=str)
def test_spread_over_ranks(pieces, documents):
    """Every rank has of its piece what the whole sequence gives, with a gradient of every rank's final state too."""
    inputs, starts = make_inputs(sum(pieces), initial=False), starts_in_pieces(documents, BATCH, pieces)
    spread = partial(selective_scan, dt_softplus=True, return_final_state=True)
    assert_spread_close(spread, inputs, pieces, starts, EXACT)


@pytest.mark.parametrize("channels", [1, 3])
def test_spread_channels(channels):
    pieces, inputs = (20, 7, 20), make_inputs(47, initial=False)
    inputs |= {name: inputs[name][:, :, :channels] for name in ("x", "dt")}
    inputs |= {name: inputs[name][:channels] for name in ("A", "D", "dt_bias")}
    starts, spread = starts_in_pieces("few", BATCH, pieces), partial(selective_scan, dt_softplus=True, return_final_state=True)
    assert_spread_close(spread, inputs, pieces, starts, EXACT)


def test_spread_growing_state():
    """The decay of a piece in which a document starts is 0 whatever the sign of A."""
    pieces, inputs = (11, 11, 11), make_inputs(33, initial=False)
    inputs["A"] = inputs["A"] * torch.tensor([-0.1, 0.0, 1.0, -0.1], dtype=torch.float64)
    starts, spread = starts_in_pieces("few", BATCH, pieces), partial(selective_scan, dt_softplus=True, return_final_state=True)
    assert_spread_close(spread, inputs, pieces, starts, EXACT)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, ONE_BF16_ROUNDING)])
def test_spread_in_low_precision(dtype, tolerance):
    """The gradients of B and C, which the two halves of the channels share, are rounded once."""
    pieces, inputs = (40, 30, 30), make_inputs(100, dtype=dtype, initial=False)
    inputs |= {name: inputs[name].float() for name in ("A", "D", "dt_bias")}
    starts, spread = starts_in_pieces("few", BATCH, pieces), partial(selective_scan, dt_softplus=True, return_final_state=True)
    got, want = assert_spread_close(spread, inputs, pieces, starts, tolerance)
    assert [got[name].dtype for name in ("output 0", "output 1")] == [dtype, torch.float32]
    if dtype == torch.bfloat16:
        assert all(rounded_once(got[name], want[name]) for name in ("gradient of B", "gradient of C"))


@pytest.mark.parametrize("length", [1, 17, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_exchange(dtype, length, device):
    """Forward and backward start all they send before they wait, and send as much whatever the length."""
    ranks = EchoRanks(1, 3)
    outputs_and_gradients(partial(op(), ranks=ranks), make_inputs(length, device, dtype, initial=False))
    assert ranks.events == ["start", "start", "wait", "wait"] * 2
    for sent in (ranks.sent[:2], ranks.sent[2:]):
        assert sum(x.numel() for x in sent) == BATCH * CHANNELS * (STATE + 1)
        assert all(x.dtype == torch.promote_types(dtype, torch.float32) and x.dim() == 1 for x in sent)


def test_one_rank_exchanges_nothing(device):
    inputs, ranks = make_inputs(50, device), EchoRanks(0, 1)
    got, want = (outputs_and_gradients(partial(op(), ranks=r), inputs) for r in (ranks, None))
    assert ranks.events == []
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_rejects_an_initial_state_of_a_spread_sequence():
    with pytest.raises(ValueError, match="selective_scan: initial_state with a sequence spread over 2 ranks, wanted None"):
        op()(**make_inputs(4), ranks=EchoRanks(0, 2))


@pytest.mark.parametrize("ranks", [None, EchoRanks(1, 2)], ids=["", "ranks"])
def test_memory(ranks):
    """No tensor of [S, E, N], forward or backward; kept are the inputs and a small fraction of that."""
    length, channels, state = 512, 16, 16
    inputs = {
        "x": randn(1, length, channels), "dt": randn(1, length, channels, seed=1).abs(), "A": -randn(channels, state).abs(),
        "B": randn(1, length, state), "C": randn(1, length, state, seed=1),
    }  # fmt: skip
    with AllocationWatch() as watch:
        outputs_and_gradients(partial(selective_scan, ranks=ranks), inputs)
    assert watch.largest[torch.float64] <= length * channels * state // 16
    assert saved_elements(partial(selective_scan, ranks=ranks), inputs) <= length * channels * state // 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dt": torch.zeros(2, 4)}, r"selective_scan: dt has shape \(2, 4\), wanted \[B, S, E\] = \(2, 4, 6\)"),
        ({"A": torch.zeros(5, 7)}, r"selective_scan: A has shape \(5, 7\), wanted \[E, N\] = \(6, N\)"),
        ({"B": torch.zeros(2, 4, 8)}, r"selective_scan: B has shape .* wanted \[B, S, N\] = \(2, 4, 7\)"),
        ({"C": torch.zeros(2, 5, 7)}, "selective_scan: C has shape"),
        ({"D": torch.zeros(7)}, "selective_scan: D has shape"),
        ({"dt_bias": torch.zeros(6, dtype=torch.bool)}, "dt_bias has dtype torch.bool, wanted a floating-point"),
        ({"initial_state": torch.zeros(2, 7, 6)}, r"wanted \[B, E, N\] = \(2, 6, 7\)"),
        ({"document_start": torch.zeros(2, 4, dtype=torch.int64)}, "document_start has dtype torch.int64, wanted torch.bool"),
    ],
)
def test_rejects(change, message):
    arguments = {
        "x": torch.zeros(2, 4, 6), "dt": torch.zeros(2, 4, 6), "A": torch.zeros(6, 7),
        "B": torch.zeros(2, 4, 7), "C": torch.zeros(2, 4, 7),
    }  # fmt: skip
    selective_scan(**arguments)
    with pytest.raises(ValueError, match=message):
        selective_scan(**arguments | change)


def compile_cases():
    """Every kernel at the shape of the 8B model and of small states, for the test that compiles them without a GPU."""
    kernels, batch, length, channels = backend.KERNELS, 1, 4096, 8192
    for state, dtype, starts in ((128, torch.bfloat16, False), (16, torch.bfloat16, True), (16, torch.float32, False)):
        empty = partial(torch.empty, device="meta")
        x, _ = empty(batch, length, 2 * channels, dtype=dtype).chunk(2, -1)
        dt, (B, C) = empty(batch, length, channels, dtype=dtype), empty(batch, length, 2 * state, dtype=dtype).chunk(2, -1)
        A, D, dt_bias = empty(channels, state), empty(channels), empty(channels)
        document_start = empty(batch, length, dtype=torch.bool) if starts else None
        given = (x, dt, A, B, C, D, dt_bias, None, document_start)
        yield f"forward {state}", lambda given=given: kernels["selective_scan"](*given, True, True)
        kept = empty(1, 32, 128, state, 64)
        yield f"backward {state}", lambda g=(x, None, *given, kept): kernels["selective_scan_backward"](*g, True)
