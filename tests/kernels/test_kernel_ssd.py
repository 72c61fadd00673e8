"""`ssd` against the recurrence it stands for, one token at a time in float64."""

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

from mamba_kernels import backend, ssd

BATCH, HEADS, HEAD_DIM, STATE = 3, 4, 5, 6
CHUNK_SIZES = [1, 7, 16, 64, 300, None]

# The fused kernels' matrix products have bfloat16 operands: the states, and products of decays and of C_i . B_j, rounded.
FUSED_TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 4 * ONE_BF16_ROUNDING}


def oracle(x, dt, A, B, C, D=None, dt_bias=None, initial_state=None, *, dt_softplus=False, document_start=None):
    """y and the final state, token by token; A may be that of each, [B, S, H]."""
    batch, length, heads, head_dim = x.shape
    B, C = (t.repeat_interleave(heads // t.shape[2], dim=2) for t in (B, C))
    dt = dt if dt_bias is None else dt + dt_bias
    dt = torch.logaddexp(dt, torch.zeros_like(dt)) if dt_softplus else dt
    A = A.expand(batch, length, heads)
    state = x.new_zeros(batch, heads, head_dim, B.shape[3]) if initial_state is None else initial_state
    ys = []
    for t in range(length):
        if document_start is not None:
            state = torch.where(document_start[:, t, None, None, None], 0.0, state)
        decay = torch.exp(dt[:, t] * A[:, t])[:, :, None, None]
        state = decay * state + torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t])
        y = torch.einsum("bhpn,bhn->bhp", state, C[:, t])
        ys.append(y if D is None else y + D[:, None] * x[:, t])
    return torch.stack(ys, 1), state


def make_inputs(length, groups=2, device="cpu", dtype=torch.float64, initial=True):
    """Step sizes and decays of a trained model: some heads forget in a few tokens, others hardly at all."""
    draw = partial(randn, device=device, dtype=dtype)
    inputs = {
        "x": draw(BATCH, length, HEADS, HEAD_DIM),
        "dt": draw(BATCH, length, HEADS),
        "A": -draw(HEADS).exp() * torch.tensor([0.01, 0.3, 1.0, 16.0], device=device, dtype=dtype),
        "B": draw(BATCH, length, groups, STATE, seed=1),
        "C": draw(BATCH, length, groups, STATE, seed=2),
        "D": draw(HEADS, seed=3),
        "dt_bias": draw(HEADS, seed=4) - 1.0,
    }
    if initial:
        inputs["initial_state"] = draw(BATCH, HEADS, HEAD_DIM, STATE)
    return inputs


def op(chunk_size=None, document_start=None):
    return partial(ssd, dt_softplus=True, document_start=document_start, chunk_size=chunk_size, return_final_state=True)


@pytest.mark.parametrize("documents", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("initial", [False, True], ids=["", "initial"])
@pytest.mark.parametrize("length", LENGTHS)
def test_float64_outputs_and_gradients(length, initial, documents, device):
    starts = document_starts(BATCH, length, device) if documents else None
    inputs = make_inputs(length, device=device, initial=initial)
    want = outputs_and_gradients(partial(oracle, dt_softplus=True, document_start=starts), inputs)
    for chunk_size in CHUNK_SIZES if length < 200 else CHUNK_SIZES[2:]:
        assert_close(outputs_and_gradients(op(chunk_size, starts), inputs), want, EXACT)


@pytest.mark.parametrize("groups", [1, 2, HEADS])
def test_groups_and_strides(groups, device):
    starts = document_starts(BATCH, 40, device)
    inputs = make_inputs(40, groups, device)
    want = outputs_and_gradients(partial(oracle, dt_softplus=True, document_start=starts), inputs)
    for strides in (False, True):
        assert_close(outputs_and_gradients(op(16, starts), inputs, strides=strides), want, EXACT)


def test_plain_dt_without_options(device):
    inputs = make_inputs(33, device=device, initial=False)
    inputs = {name: inputs[name] for name in ("x", "dt", "A", "B", "C")}
    inputs["dt"] = inputs["dt"].abs()
    got = outputs_and_gradients(partial(ssd, chunk_size=8), inputs)
    assert_close(got, outputs_and_gradients(lambda **t: oracle(**t)[0], inputs), EXACT)


def test_growing_state(device):
    """A > 0 is no model, but no silent error either."""
    inputs = make_inputs(33, device=device)
    inputs["A"] = -inputs["A"] / 20.0
    want = outputs_and_gradients(partial(oracle, dt_softplus=True), inputs)
    assert_close(outputs_and_gradients(op(8), inputs), want, EXACT)


def test_gradcheck(device):
    shapes = {"x": (2, 5, 2, 2), "dt": (2, 5, 2), "A": (2,), "B": (2, 5, 1, 2), "C": (2, 5, 1, 2), "D": (2,), "dt_bias": (2,)}
    tensors = [randn(*shape, seed=i, device=device) for i, shape in enumerate((*shapes.values(), (2, 2, 2, 2)))]
    tensors[2] = -tensors[2].abs()
    leaves = [t.requires_grad_() for t in tensors]
    starts = torch.tensor([[0, 0, 1, 0, 0], [1, 0, 0, 1, 1]], dtype=torch.bool, device=device)
    names = [*shapes, "initial_state"]
    assert torch.autograd.gradcheck(lambda *t: op(2, starts)(**dict(zip(names, t, strict=True))), leaves)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, ONE_BF16_ROUNDING)])
def test_low_precision(dtype, tolerance, device):
    """Parameters stay float32; error against float64 on the same rounded inputs."""
    starts = document_starts(BATCH, 100, device)
    inputs = make_inputs(100, device=device, dtype=dtype)
    inputs |= {name: inputs[name].float() for name in ("A", "D", "dt_bias", "initial_state")}
    want = outputs_and_gradients(partial(oracle, dt_softplus=True, document_start=starts), in_float64(inputs))
    tolerance = FUSED_TOLERANCE[dtype] if device == "cuda" else tolerance
    for chunk_size in (16, None):
        got = outputs_and_gradients(op(chunk_size, starts), inputs)
        assert got["output 0"].dtype == dtype
        assert got["output 1"].dtype == torch.float32
        assert_close(got, want, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_decays(dtype, device):
    """Heads that forget at once beside heads that never do; a sum of a chunk's decays is up to 30,000."""
    starts = document_starts(BATCH, 100, device)
    inputs = make_inputs(100, device=device, dtype=dtype)
    inputs["A"] = torch.tensor([-16.0, -16.0, -1e-3, -16.0], device=device, dtype=dtype)
    inputs["dt_bias"] = torch.tensor([30.0, -30.0, 30.0, 0.0], device=device, dtype=dtype)
    want = outputs_and_gradients(partial(oracle, dt_softplus=True, document_start=starts), in_float64(inputs))
    for chunk_size in (16, 64):
        got = outputs_and_gradients(op(chunk_size, starts), inputs)
        assert_close(got, want, EXACT if dtype == torch.float64 else 3e-6)


def test_short_memory_after_long_decay(device):
    """A token that forgets everything must not blur the small decays after it: float32 cumulative sums would, by 1e-3."""
    inputs = make_inputs(64, device=device, dtype=torch.float32, initial=False)
    inputs = {name: inputs[name] for name in ("x", "dt", "A", "B", "C")}
    inputs["A"] = torch.full_like(inputs["A"], -1.0)
    inputs["dt"] = torch.full_like(inputs["dt"], 0.01)
    inputs["dt"][:, ::8] = 5000.0
    inputs["x"][:, ::8] = 0.0
    inputs["C"][:, ::8] = 0.0
    want = outputs_and_gradients(lambda **t: oracle(**t)[0], in_float64(inputs))
    got = outputs_and_gradients(partial(ssd, chunk_size=64), inputs)
    assert_close(got, want, 1e-6)


def test_continues_from_final_state(device):
    """A sequence in two calls is the sequence in one."""
    inputs, starts = make_inputs(50, device=device), document_starts(BATCH, 50, device)
    sequences = ("x", "dt", "B", "C")
    whole, whole_state = op(16, starts)(**inputs)
    first, state = op(16, starts[:, :29])(**{n: t[:, :29] if n in sequences else t for n, t in inputs.items()})
    rest = {n: t[:, 29:] if n in sequences else t for n, t in inputs.items()} | {"initial_state": state}
    second, state = op(16, starts[:, 29:])(**rest)
    assert_close({"y": torch.cat([first, second], 1), "state": state}, {"y": whole, "state": whole_state}, EXACT)


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("pieces", PIECES, ids=str)
def test_spread_over_ranks(pieces, documents):
    """Every rank has of its piece what the whole sequence gives, with a gradient of every rank's final state too."""
    inputs, starts = make_inputs(sum(pieces), initial=False), starts_in_pieces(documents, BATCH, pieces)
    spread = partial(ssd, dt_softplus=True, chunk_size=16, return_final_state=True)
    assert_spread_close(spread, inputs, pieces, starts, EXACT)


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (3, 1), (3, 3), (4, 1), (4, 4)])
def test_spread_groups(heads, groups):
    pieces, inputs = (20, 7, 20), make_inputs(47, groups, initial=False)
    inputs |= {name: inputs[name][:, :, :heads] for name in ("x", "dt")}
    inputs |= {name: inputs[name][:heads] for name in ("A", "D", "dt_bias")}
    starts, spread = starts_in_pieces("few", BATCH, pieces), partial(ssd, dt_softplus=True, chunk_size=8, return_final_state=True)
    assert_spread_close(spread, inputs, pieces, starts, EXACT)


def test_spread_growing_state():
    pieces, inputs = (11, 11, 11), make_inputs(33, initial=False)
    inputs["A"] = -inputs["A"] / 20.0
    starts, spread = starts_in_pieces("few", BATCH, pieces), partial(ssd, dt_softplus=True, chunk_size=8, return_final_state=True)
    assert_spread_close(spread, inputs, pieces, starts, EXACT)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, ONE_BF16_ROUNDING)])
def test_spread_in_low_precision(dtype, tolerance, groups):
    """The gradients of B and C are rounded once, shared by the parts of the heads (G = 1) or not."""
    pieces, inputs = (40, 30, 30), make_inputs(100, groups, dtype=dtype, initial=False)
    inputs |= {name: inputs[name].float() for name in ("A", "D", "dt_bias")}
    starts, spread = starts_in_pieces("few", BATCH, pieces), partial(ssd, dt_softplus=True, chunk_size=16, return_final_state=True)
    got, want = assert_spread_close(spread, inputs, pieces, starts, tolerance)
    assert [got[name].dtype for name in ("output 0", "output 1")] == [dtype, torch.float32]
    if dtype == torch.bfloat16:
        assert all(rounded_once(got[name], want[name]) for name in ("gradient of B", "gradient of C"))


@pytest.mark.parametrize("length", [1, 17, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_exchange(dtype, length, device):
    """Forward and backward start all they send before they wait, and send as much whatever the length."""
    ranks = EchoRanks(1, 3)
    outputs_and_gradients(partial(op(16), ranks=ranks), make_inputs(length, device=device, dtype=dtype, initial=False))
    assert ranks.events == ["start", "start", "wait", "wait"] * 2
    for sent in (ranks.sent[:2], ranks.sent[2:]):
        assert sum(x.numel() for x in sent) == BATCH * HEADS * (HEAD_DIM * STATE + 1)
        assert all(x.dtype == torch.promote_types(dtype, torch.float32) and x.dim() == 1 for x in sent)


def test_one_rank_exchanges_nothing(device):
    inputs, ranks = make_inputs(50, device=device), EchoRanks(0, 1)
    got, want = (outputs_and_gradients(partial(op(16), ranks=r), inputs) for r in (ranks, None))
    assert ranks.events == []
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_rejects_an_initial_state_of_a_spread_sequence():
    with pytest.raises(ValueError, match="ssd: initial_state with a sequence spread over 2 ranks, wanted None"):
        op()(**make_inputs(4), ranks=EchoRanks(0, 2))


@pytest.mark.parametrize("ranks", [None, EchoRanks(1, 2)], ids=["", "ranks"])
def test_memory(ranks):
    """Kept for the backward: inputs, dt and one state a chunk. Nothing of [S, Q] for all heads or [S, H, N] is made."""
    length, heads, chunk = 1024, 8, 32
    inputs = {
        "x": randn(1, length, heads, 2), "dt": randn(1, length, heads).abs(), "A": -randn(heads).abs(),
        "B": randn(1, length, 1, 8), "C": randn(1, length, 1, 8, seed=1),
    }  # fmt: skip
    with AllocationWatch() as watch:
        outputs_and_gradients(partial(ssd, chunk_size=chunk, ranks=ranks), inputs)
    assert watch.largest[torch.float64] < length * heads * 8
    states = length // chunk * heads * 2 * 8
    assert saved_elements(partial(ssd, chunk_size=chunk, ranks=ranks), inputs) <= states


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dt": torch.zeros(2, 4, 3)}, r"ssd: dt has shape \(2, 4, 3\), wanted \[B, S, H\] = \(2, 4, 6\)"),
        ({"A": torch.zeros(6, 1)}, r"ssd: A has shape \(6, 1\), wanted \[H\] = \(6\)"),
        ({"B": torch.zeros(2, 4, 4, 7), "C": torch.zeros(2, 4, 4, 7)}, "4 groups, wanted a divisor of the 6 heads"),
        ({"C": torch.zeros(2, 4, 2, 8)}, r"ssd: C has shape .* wanted \[B, S, G, N\] = \(2, 4, 2, 7\)"),
        ({"D": torch.zeros(6, dtype=torch.int64)}, "ssd: D has dtype torch.int64, wanted a floating-point dtype"),
        ({"dt_bias": torch.zeros(5)}, r"ssd: dt_bias has shape \(5,\)"),
        ({"initial_state": torch.zeros(2, 6, 7, 3)}, r"wanted \[B, H, P, N\] = \(2, 6, 3, 7\)"),
        ({"document_start": torch.zeros(2, 4)}, "document_start has dtype torch.float32, wanted torch.bool"),
        ({"document_start": torch.zeros(4, dtype=torch.bool)}, r"document_start has shape \(4,\), wanted \[B, S\] = \(2, 4\)"),
        ({"x": torch.zeros(2, 4, 6, 3, device="meta")}, "ssd: dt is on cpu, wanted meta"),
        ({"chunk_size": 0}, "ssd: chunk_size is 0, wanted a positive"),
    ],
)
def test_rejects(change, message):
    arguments = {
        "x": torch.zeros(2, 4, 6, 3), "dt": torch.zeros(2, 4, 6), "A": torch.zeros(6),
        "B": torch.zeros(2, 4, 2, 7), "C": torch.zeros(2, 4, 2, 7),
    }  # fmt: skip
    ssd(**arguments)
    with pytest.raises(ValueError, match=message):
        ssd(**arguments | change)


# Length, heads, groups, head dim, state size, documents, and whether there are D, dt_bias, softplus and an initial state.
FUSED_CASES = {
    "everything, odd sizes": (torch.float32, 2, 41, 4, 2, 5, 6, True, True),
    "nothing optional, whole tiles": (torch.float32, 1, 64, 2, 1, 16, 16, False, False),
    "segments": (torch.float32, 1, 170, 2, 2, 3, 16, True, True),
    "one token": (torch.float32, 2, 1, 2, 1, 4, 4, False, True),
    "bfloat16": (torch.bfloat16, 1, 150, 2, 1, 16, 8, True, True),
}
GPU_CASES = {
    "8B": (torch.bfloat16, 2, 777, 16, 2, 64, 128, True, True),
    "8B, whole chunks": (torch.bfloat16, 1, 1024, 32, 4, 64, 128, False, False),
    "wide head": (torch.bfloat16, 1, 130, 4, 2, 256, 64, True, True),
    "wide state": (torch.bfloat16, 1, 300, 4, 1, 128, 256, True, True),
    "odd head and state": (torch.bfloat16, 2, 300, 6, 3, 80, 48, True, True),
    "float32": (torch.float32, 1, 300, 8, 2, 64, 128, True, True),
    "float16": (torch.float16, 1, 300, 8, 2, 64, 128, False, True),
}


def fused_inputs(dtype, batch, length, heads, groups, head_dim, state_size, options, device, seed=0):
    draw = partial(randn, device=device, dtype=dtype, seed=seed)
    inputs = {
        "x": draw(batch, length, heads, head_dim),
        "dt": draw(batch, length, heads) - 1.0,
        "A": -draw(heads).float().exp(),
        "B": draw(batch, length, groups, state_size),
        "C": draw(batch, length, groups, state_size).flip(-1),
    }
    if not options:
        return inputs | {"dt": inputs["dt"].abs()}
    return inputs | {
        "D": draw(heads).float().flip(-1),
        "dt_bias": draw(heads).float() - 1.0,
        "initial_state": draw(batch, heads, head_dim, state_size).float(),
    }


def assert_fused_close(got, inputs, tolerance, **arguments):
    """Outputs and gradients as the oracle's in float64. That of A is a sum over tokens of rounded terms, which may cancel: where
    the root of the sum of their squares is larger than the sum, its error is measured against that."""
    of_tokens = inputs | {"A": inputs["A"].expand(inputs["dt"].shape).clone()}
    want = outputs_and_gradients(partial(oracle, **arguments), in_float64(of_tokens))
    terms, g_A = want.pop("gradient of A"), got["gradient of A"].double()
    sums, roots = terms.sum((0, 1)), terms.square().sum((0, 1)).sqrt()
    error = (g_A - sums).abs().max() / torch.maximum(sums.abs(), roots).max()
    assert error <= tolerance, f"gradient of A: {error} of its terms, above {tolerance}"
    assert_close(got, want, tolerance)


@pytest.mark.parametrize("case", [*FUSED_CASES, *(pytest.param(name, marks=pytest.mark.gpu) for name in GPU_CASES)])
def test_fused(case, fused_device, request):
    """Outputs and every gradient of the Triton kernels; on a GPU for three seeds, and bit for bit the same twice."""
    dtype, batch, length, *sizes, documents, options = (FUSED_CASES | GPU_CASES)[case]
    if case in GPU_CASES and fused_device == "cpu":
        pytest.skip("no CUDA device")
    starts = document_starts(batch, length, fused_device) if documents else None
    arguments = {"document_start": starts, "dt_softplus": options}
    for seed in range(3 if fused_device == "cuda" else 1):
        strides = seed == 1 or case == "everything, odd sizes"
        inputs = fused_inputs(dtype, batch, length, *sizes, options, fused_device, seed)
        got = outputs_and_gradients(partial(ssd, **arguments, return_final_state=True), inputs, strides=strides)
        assert_fused_close(got, inputs, 4e-3 if dtype == torch.float16 else FUSED_TOLERANCE[dtype], **arguments)
        if fused_device == "cuda":
            again = outputs_and_gradients(partial(ssd, **arguments, return_final_state=True), inputs, strides=strides)
            assert all(torch.equal(again[name], got[name]) for name in got)


@pytest.mark.parametrize("apart", [False, True], ids=["", "apart"])
def test_fused_sweeps_two_heads_together(apart, fused_device, monkeypatch):
    """Several segments, groups and documents; only heads that lie side by side are swept by one program."""
    from mamba_kernels.ssd import operators

    together = []
    launch = operators.launch
    monkeypatch.setattr(operators, "launch", lambda *a, **meta: [launch(*a, **meta), together.append(meta.get("HEADS"))])
    length = 130 if apart else 530
    inputs = fused_inputs(torch.bfloat16, 1, length, 4, 2, 16, 8, True, fused_device)
    arguments = {"document_start": document_starts(1, length, fused_device), "dt_softplus": True}

    def scan(x, **others):
        x = torch.nn.functional.pad(x, (0, 16))[..., :16] if apart else x
        return ssd(x, **others, **arguments, return_final_state=True)

    meta = {"STEP": 64, "HEADS": 2, "BP": 16, "BN": 16, "num_warps": 4, "num_stages": 2}
    with operators.STATES.forced(meta), operators.STATE_GRADIENTS.forced(meta):
        got = outputs_and_gradients(scan, inputs)
    assert_fused_close(got, inputs, FUSED_TOLERANCE[torch.bfloat16], **arguments)
    # Forward and in reverse, whose input has no gaps; two segments from a zero state and from what the first leaves.
    assert [heads for heads in together if heads] == ([1, 2] if apart else [2] * 4)


@pytest.mark.parametrize("groups", [1, 2])
def test_fused_spread_over_ranks(groups, fused_device, monkeypatch):
    """The kernels under the exchange of states: every rank has of its piece what the whole sequence gives."""
    from mamba_kernels.ssd import operators

    one_launch_at_a_time(monkeypatch, operators)
    inputs = fused_inputs(torch.float32, 3, 45, 2, groups, 3, 4, True, "cpu")
    if fused_device == "cuda":
        pytest.skip("ranks are threads of one CPU process here; on GPUs, test_torchrun.py has real ones")
    del inputs["initial_state"]
    spread = partial(ssd, dt_softplus=True, return_final_state=True)
    assert_spread_close(spread, inputs, (40, 5), starts_in_pieces("few", 3, (40, 5)), FUSED_TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_extremes(dtype, fused_device):
    """Decays that overflow where they are masked, tokens that forget all, heads that never forget."""
    inputs = fused_inputs(dtype, 1, 40, 2, 1, 4, 4, True, fused_device)
    inputs["A"] = torch.tensor([-16.0, -1e-3], device=fused_device)
    inputs["dt"][:, ::8] = 5000.0
    got = outputs_and_gradients(partial(ssd, dt_softplus=True, return_final_state=True), inputs)
    assert_fused_close(got, inputs, FUSED_TOLERANCE[dtype], dt_softplus=True)


def test_fused_on_meta_tensors():
    """Shapes and dtypes of outputs and gradients without a device, as the planner and torch.compile ask for them."""
    draw = partial(torch.empty, device="meta", dtype=torch.bfloat16)
    inputs = {"x": draw(2, 300, 4, 8), "dt": draw(2, 300, 4), "A": draw(4), "B": draw(2, 300, 2, 16), "C": draw(2, 300, 2, 16)}
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    with backend.meta_stands_for("cuda"):
        y, state = ssd(**leaves, return_final_state=True)
        gradients = torch.autograd.grad(y.float().sum(), leaves.values())
    assert (y.shape, y.dtype) == (inputs["x"].shape, torch.bfloat16)
    assert (state.shape, state.dtype) == ((2, 4, 8, 16), torch.float32)
    assert [(g.shape, g.dtype) for g in gradients] == [(leaf.shape, leaf.dtype) for leaf in leaves.values()]


def compile_cases():
    """Every kernel at the shape of the 8B models, for the test that compiles them without a GPU."""
    kernels, draw = backend.KERNELS, partial(torch.empty, device="meta")
    packed = draw(2, 4096, 18_560, dtype=torch.bfloat16)
    _, x, B, C, dt = packed.split([8192, 8192, 1024, 1024, 128], -1)
    x, B, C = x.unflatten(-1, (128, 64)), B.unflatten(-1, (8, 128)), C.unflatten(-1, (8, 128))
    A, D, bias, starts = draw(128), draw(128), draw(128), draw(2, 4096, dtype=torch.bool)
    yield "ssd", lambda: kernels["ssd"](x, dt, A, B, C, D, bias, None, None, True)
    few = (x[:1, :, :32], dt[:1, :, :32], A[:32], B[:1, :, :2], C[:1, :, :2], D[:32], bias[:32])
    yield "ssd, few heads", lambda: kernels["ssd"](*few, None, None, True)
    step, states = draw(2, 128, 4096), draw(2, 32, 128, 64, 128, dtype=torch.bfloat16)
    gradients = partial(kernels["ssd_backward"], x, None, x, dt, A, B, C, D, bias, None)
    yield "ssd_backward", lambda: gradients(None, step, step, step, states, True)
    kept = (*[step[:1, :32]] * 3, states[:1, :, :32])
    yield "ssd_backward, few heads", lambda: kernels["ssd_backward"](few[0], None, *few, None, None, *kept, True)
    yield "ssd_backward, documents", lambda: gradients(starts, step, step, step, states, True)
    # Sizes of 1 are constants, which have no conversions.
    x, dt, B = draw(1, 1, 2, 16, dtype=torch.bfloat16), draw(1, 1, 2), draw(1, 1, 1, 16, dtype=torch.bfloat16)
    kept = (*[draw(1, 2, 1)] * 3, draw(1, 1, 2, 16, 16, dtype=torch.bfloat16))
    arguments = (x, None, x, dt, draw(2), B, B, None, None, None, None, *kept, True)
    yield "ssd_backward, one token", lambda: kernels["ssd_backward"](*arguments)
