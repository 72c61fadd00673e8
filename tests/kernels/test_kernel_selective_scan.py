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
    one_launch_at_a_time,
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


# Batch, length, channels, state size; tokens of a segment, multiprocessors to fill with chunks, bytes of a window; documents, and
# whether there are D, dt_bias, softplus and an initial state.
FUSED_CASES = {
    "everything, odd sizes": (torch.float32, 2, 11, 3, 3, (8, 0, 1 << 30), True, True),
    "chunks": (torch.float32, 2, 18, 2, 2, (8, 132, 1 << 30), True, True),
    "windows of two chunks": (torch.float32, 1, 27, 3, 2, (8, 132, 1 << 13), False, True),
    "nothing optional, two blocks": (torch.float32, 1, 9, 66, 2, (8, 0, 1 << 30), False, False),
    "one token": (torch.float32, 1, 1, 2, 1, (8, 0, 1 << 30), True, True),
    "bfloat16, two parts": (torch.bfloat16, 1, 5, 3, 17, (8, 0, 1 << 30), False, True),
}
SHIPPED = (None, 132, 1 << 30)
GPU_CASES = {
    "8B": (torch.bfloat16, 2, 777, 520, 128, SHIPPED, True, True),
    "8B, windows": (torch.bfloat16, 1, 1400, 256, 128, (None, 8, 1 << 24), False, True),
    "small state": (torch.bfloat16, 2, 1030, 1024, 16, SHIPPED, True, True),
    "small state, nothing optional": (torch.bfloat16, 1, 512, 2048, 16, SHIPPED, False, False),
    "odd state": (torch.bfloat16, 2, 300, 100, 40, SHIPPED, True, True),
    "wide state": (torch.bfloat16, 1, 300, 70, 256, SHIPPED, True, True),
    "float32": (torch.float32, 2, 300, 130, 128, SHIPPED, True, True),
    "float16": (torch.float16, 1, 300, 130, 16, SHIPPED, False, True),
}
FUSED_TOLERANCE = {torch.float32: 5e-6, torch.float16: 2.0**-11 + 1e-3, torch.bfloat16: ONE_BF16_ROUNDING}


def fused_inputs(dtype, batch, length, channels, state_size, options, device, seed=0):
    """Of the step sizes of a trained model; dt, B and C are slices of one projection, as are x and what else there is."""
    draw = partial(randn, device=device, dtype=dtype, seed=seed)
    B, C = draw(batch, length, 2 * state_size + 1).split([state_size, state_size + 1], -1)
    inputs = {
        "x": draw(batch, length, 2 * channels)[..., channels:],
        "dt": draw(batch, length, channels).flip(1),
        "A": -draw(channels, state_size).float().exp(),
        "B": B,
        "C": C[..., 1:],
    }
    if not options:
        return inputs | {"dt": inputs["dt"].abs()}
    return inputs | {
        "D": draw(channels).float(),
        "dt_bias": draw(channels).float().flip(0) - 2.0,
        "initial_state": draw(batch, channels, state_size).float(),
    }


@pytest.fixture
def poisoned():
    """Memory from torch.empty is NaN; the default configuration, too."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def use_sizes(monkeypatch, segment, multiprocessors, window_bytes):
    """Segments, chunks and windows small enough for several of each."""
    from mamba_kernels.selective_scan import operators

    if segment is not None:
        monkeypatch.setattr(operators, "segment_tokens", lambda state_size: segment)
    monkeypatch.setattr(operators, "MULTIPROCESSORS", multiprocessors)
    monkeypatch.setattr(operators, "WINDOW_BYTES", window_bytes)


@pytest.mark.parametrize("case", [*FUSED_CASES, *(pytest.param(name, marks=pytest.mark.gpu) for name in GPU_CASES)])
def test_fused(case, fused_device, monkeypatch, poisoned):
    """Outputs and every gradient of the Triton kernels; on a GPU for three seeds, and bit for bit the same twice."""
    dtype, batch, length, *shape, sizes, documents, options = (FUSED_CASES | GPU_CASES)[case]
    if case in GPU_CASES and fused_device == "cpu":
        pytest.skip("no CUDA device")
    use_sizes(monkeypatch, *sizes)
    starts = document_starts(batch, length, fused_device) if documents else None
    scan = partial(selective_scan, dt_softplus=options, document_start=starts, return_final_state=True)
    for seed in range(3 if fused_device == "cuda" else 1):
        inputs = fused_inputs(dtype, batch, length, *shape, options, fused_device, seed)
        want = outputs_and_gradients(partial(oracle, dt_softplus=options, document_start=starts), in_float64(inputs))
        got = outputs_and_gradients(scan, inputs, strides=case == "everything, odd sizes" or seed == 1)
        assert_close(got, want, FUSED_TOLERANCE[dtype])
        if fused_device == "cuda":
            again = outputs_and_gradients(scan, inputs, strides=seed == 1)
            assert all(torch.equal(again[name], got[name]) for name in got)


def test_fused_views_are_not_copied(monkeypatch):
    """What the model passes, slices of projections along the last dimension, goes to the kernels as it is."""
    import mamba_kernels.selective_scan.operators  # noqa: F401 - registers them

    launched = []
    monkeypatch.setattr(backend, "recorder", lambda kernel, grid, arguments, meta: launched.append((kernel.fn.__name__, arguments)))
    draw = partial(torch.empty, device="meta", dtype=torch.bfloat16)
    (x, _), (dt, B, C) = draw(1, 300, 256).chunk(2, -1), draw(1, 300, 128 + 32).split([128, 16, 16], -1)
    backend.KERNELS["selective_scan"](x, dt, draw(128, 16).float(), B, C, None, None, None, None, False, False)
    strides = {(name, t.stride()) for name, arguments in launched for t in arguments if isinstance(t, torch.Tensor)}
    assert {("prepare_kernel", (48_000, 160, 1)), ("scan_kernel", (76_800, 256, 1))} <= strides


def test_fused_spread_over_ranks(fused_device, monkeypatch):
    """The kernels under the exchange of states: every rank has of its piece what the whole sequence gives."""
    if fused_device == "cuda":
        pytest.skip("ranks are threads of one CPU process here; on GPUs, test_torchrun.py has real ones")
    from mamba_kernels.selective_scan import operators

    one_launch_at_a_time(monkeypatch, operators)
    use_sizes(monkeypatch, 8, 132, 1 << 30)
    inputs, starts = fused_inputs(torch.float32, 1, 13, 2, 2, True, "cpu"), torch.zeros(1, 13, dtype=torch.bool)
    starts[0, 4] = True
    del inputs["initial_state"]
    spread = partial(selective_scan, dt_softplus=True, return_final_state=True)
    assert_spread_close(spread, inputs, (10, 3), starts, FUSED_TOLERANCE[torch.float32])


def test_fused_extremes(fused_device):
    """Tokens that forget all, states that never forget and states that grow."""
    inputs = fused_inputs(torch.float32, 1, 20, 2, 2, True, fused_device)
    inputs["A"] = torch.tensor([[-16.0, -1e-4], [0.0, 0.01]], device=fused_device)
    inputs["dt"][:, 5::8] = 3000.0 * torch.tensor([1.0, 0.01], device=fused_device)
    inputs["dt_bias"] = torch.tensor([-20.0, 0.0], device=fused_device)
    starts = document_starts(1, 20, fused_device)
    want = outputs_and_gradients(partial(oracle, dt_softplus=True, document_start=starts), in_float64(inputs))
    assert_close(outputs_and_gradients(op(starts), inputs), want, FUSED_TOLERANCE[torch.float32])


def test_fused_on_meta_tensors():
    """Shapes and dtypes of outputs and gradients without a device, as the planner and torch.compile ask for them."""
    draw = partial(torch.empty, device="meta", dtype=torch.bfloat16)
    inputs = {"x": draw(2, 300, 70), "dt": draw(2, 300, 70), "A": draw(70, 20), "B": draw(2, 300, 20), "C": draw(2, 300, 20)}
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    with backend.meta_stands_for("cuda"):
        y, state = selective_scan(**leaves, return_final_state=True)
        gradients = torch.autograd.grad(y.float().sum(), leaves.values())
    assert (y.shape, y.dtype) == (inputs["x"].shape, torch.bfloat16)
    assert (state.shape, state.dtype) == ((2, 70, 20), torch.float32)
    assert [(g.shape, g.dtype) for g in gradients] == [(leaf.shape, leaf.dtype) for leaf in leaves.values()]


def test_fused_memory():
    """No tensor of [S, E, N], forward or backward; what is kept for the backward is at most as large as x in bfloat16."""
    from mamba_kernels.selective_scan import operators

    batch, length, channels, state_size = 1, 65_536, 1024, 16
    draw = partial(torch.empty, device="meta")
    x, B = draw(batch, length, channels), draw(batch, length, state_size)
    given, starts = (x, x, draw(channels, state_size), B, B, draw(channels), draw(channels), None), None
    with AllocationWatch() as watch:
        *_, kept = backend.KERNELS["selective_scan"](*given, starts, True, True)
        backend.KERNELS["selective_scan_backward"](x, None, *given, starts, kept, True)
    assert kept.numel() <= x.numel() // 2
    assert watch.largest[torch.float32] * 4 <= operators.WINDOW_BYTES


def compile_cases():
    """Every kernel at the shape of the 8B model, of small states and of odd ones, for the test that compiles them without a GPU."""
    from mamba_kernels.selective_scan import operators

    kernels, empty = backend.KERNELS, partial(torch.empty, device="meta")
    for state, dtype, starts in ((128, torch.bfloat16, False), (16, torch.bfloat16, True), (40, torch.float32, False)):
        # With states at both ends, and so short that one window holds all: each takes the compiler ten seconds.
        (x, _), dt = empty(1, 1024, 16_384, dtype=dtype).chunk(2, -1), empty(1, 1024, 8192, dtype=dtype)
        B, C = empty(1, 1024, 2 * state, dtype=dtype).chunk(2, -1)
        given = (x, dt, empty(8192, state), B, C, empty(8192), empty(8192), empty(1, 8192, state))
        given += (empty(1, 1024, dtype=torch.bool) if starts else None,)
        yield f"forward, N {state}", partial(kernels["selective_scan"], *given, True, True)
        kept = empty(1, 1024 // operators.segment_tokens(state), 128, state, 64)
        yield f"backward, N {state}", partial(kernels["selective_scan_backward"], x, empty(1, 8192, state), *given, kept, True)
