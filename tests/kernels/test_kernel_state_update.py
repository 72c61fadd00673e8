"""The one-token ops against the whole-sequence ops, token by token, and on from where a sequence ended."""

import pytest
import torch
from op_testing import EXACT, ONE_BF16_ROUNDING, assert_close, randn, strided

from mamba_kernels import backend, causal_conv1d, causal_conv1d_step, selective_scan, selective_scan_step, ssd, ssd_step

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
    if device == "cuda" and op is ssd and dtype == torch.bfloat16:
        tolerance *= 4  # The sequence's matrix products have bfloat16 operands (test_kernel_ssd.py).
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


def a_few_tokens(case, dtype):
    """Sequences of 3 tokens, parameters and an initial state, whose values are those of `dtype` (float32 for parameters)."""
    sequences, parameters, state_shape = case("cpu", dtype)
    sequences = {name: t[:, :3] for name, t in sequences.items()}
    if case is conv_case:
        parameters = {name: t.to(dtype) for name, t in parameters.items()}
    else:
        # From where a step is lost beside 1 to where softplus is the identity.
        sequences["dt"] = (20.0 * sequences["dt"]).clamp(-30.0, 30.0)
        parameters = {name: t.float() for name, t in parameters.items()}
    return sequences, parameters, randn(*state_shape, seed=5, dtype=dtype if case is conv_case else torch.float32)


def to_device(tensors, device, arrange=torch.clone):
    return {name: arrange(t.to(device)) for name, t in tensors.items()}


@each_op
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, ONE_BF16_ROUNDING)])
@pytest.mark.parametrize(("plain", "strides"), [(True, False), (False, True)], ids=["plain", "strided"])
def test_fused_steps(op, step, case, options, dtype, tolerance, plain, strides, fused_device, poisoned, monkeypatch):
    """Against the sequence in float64; in rows of two, of which the last is not full."""
    from mamba_kernels.state_update import fused

    for tunable in (fused.SSD, fused.SCAN, fused.CONV):
        monkeypatch.setattr(tunable, "_forced", {"ROWS": 4 if tunable is fused.SCAN else 2, "num_warps": 1})
    sequences, parameters, initial = a_few_tokens(case, dtype)
    if plain:
        parameters = {name: t for name, t in parameters.items() if name in ("A", "weight")}
        options = {}
        if "dt" in sequences:
            sequences["dt"] = sequences["dt"].abs()
    wide = {name: t.double() for name, t in (sequences | parameters).items()}
    want, want_state = op(**wide, **options, initial_state=initial.double(), return_final_state=True)
    arrange = strided if strides else torch.clone
    state = arrange(initial.to(fused_device))
    around, address = state.as_strided((state.untyped_storage().nbytes() // state.element_size(),), (1,), 0), state.data_ptr()
    before = around.clone()
    sequences, parameters = (to_device(tensors, fused_device, arrange) for tensors in (sequences, parameters))
    kept = {name: t.clone() for name, t in (sequences | parameters).items()}
    ys = run_steps(step, state, sequences, {name: t.requires_grad_() for name, t in parameters.items()} | options)
    assert ys.dtype == dtype
    assert not ys.requires_grad
    assert_close({"y": ys, "state": state}, {"y": want.to(fused_device), "state": want_state.to(fused_device)}, tolerance)
    assert all(torch.equal(t, kept[name]) for name, t in (sequences | parameters).items()), "an input was modified"
    # In place, and nothing but the state.
    assert state.data_ptr() == address
    state.copy_(initial)
    assert torch.equal(around.nan_to_num(nan=9.0), before.nan_to_num(nan=9.0))


@pytest.mark.parametrize("width", [1, 2, 5])
def test_fused_conv_widths(width, fused_device):
    sequences = {"x": randn(2, 7, 6, dtype=torch.float32)}
    weight = randn(6, width, dtype=torch.float32)
    initial = randn(2, width - 1, 6, dtype=torch.float32)
    want, want_state = causal_conv1d(
        sequences["x"].double(), weight.double(), initial_state=initial.double(), return_final_state=True
    )
    state = initial.to(fused_device)
    ys = run_steps(causal_conv1d_step, state, to_device(sequences, fused_device), {"weight": weight.to(fused_device)})
    assert_close({"y": ys.cpu(), "state": state.cpu()}, {"y": want, "state": want_state}, 1e-6)


@pytest.mark.parametrize("groups", [1, 4])
def test_fused_groups(groups, fused_device):
    sequences, parameters, state_shape = ssd_case("cpu", torch.float32, groups)
    sequences = {name: t[:, :2] for name, t in sequences.items()}
    wide = {name: t.double() for name, t in (sequences | parameters).items()}
    want, want_state = ssd(**wide, **SOFTPLUS, return_final_state=True)
    state = torch.zeros(state_shape, device=fused_device)
    parameters = {name: t.float().to(fused_device) for name, t in parameters.items()}
    ys = run_steps(ssd_step, state, to_device(sequences, fused_device), parameters | SOFTPLUS)
    assert_close({"y": ys.cpu(), "state": state.cpu()}, {"y": want, "state": want_state}, 2e-6)


def test_fused_small_steps_keep_their_digits(fused_device):
    """softplus(dt) far below 1, where 1 + e^dt is 1 in float32, decides alone what a zero state becomes."""
    dt = torch.tensor([[-40.0, -17.0, -8.0, -3.0, 0.0, 3.0]])
    one = torch.ones(1, 6)
    state = torch.zeros(1, 6, 1, device=fused_device)
    arguments = (t.to(fused_device) for t in (one, dt, -torch.ones(6, 1), one[:, :1], one[:, :1]))
    selective_scan_step(state, *arguments, dt_softplus=True)
    want = torch.log1p(dt.double().exp())[..., None]
    assert ((state.cpu().double() / want - 1).abs() < 1e-6).all()


def test_operators(fused_device):
    """What torch is told of them is so: that they write to the state, and shapes on fake tensors."""
    for case, name, last in ((ssd_case, "ssd_step", True), (scan_case, "selective_scan_step", True)):
        sequences, parameters, state_shape = case(fused_device, torch.float32)
        x, dt, B, C = (sequences[key][:, 0] for key in ("x", "dt", "B", "C"))
        A, D, dt_bias = (parameters[key].float() for key in ("A", "D", "dt_bias"))
        arguments = (torch.ones(state_shape, device=fused_device), x, dt, A, B, C, D, dt_bias, last)
        operator = getattr(torch.ops.mamba_kernels, name).default
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
    sequences, parameters, state_shape = conv_case(fused_device, torch.float32)
    state, weight = torch.ones(state_shape, device=fused_device), parameters["weight"].float()
    arguments = (state, sequences["x"][:, 0], weight, None, True)
    operator = torch.ops.mamba_kernels.causal_conv1d_step.default
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


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


def compile_cases():
    """Every kernel at the shape of the 8B models, for the test that compiles them without a GPU."""
    kernels = backend.KERNELS

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, dtype=dtype, device="meta")

    batch, wide = 16, torch.float32
    packed = empty(batch, 18_560)
    z, x, B, C, dt = packed.split([8192, 8192, 1024, 1024, 128], -1)
    heads = [empty(128, dtype=wide) for _ in range(3)]
    state = empty(batch, 128, 64, 128, dtype=wide)
    grouped = [t.unflatten(-1, (8, 128)) for t in (B, C)]
    yield "ssd", lambda: kernels["ssd_step"](state, x.unflatten(-1, (128, 64)), dt, heads[0], *grouped, *heads[1:], True)
    channels = [empty(8192, dtype=wide) for _ in range(2)]
    for N in (16, 128):
        A, scanned = empty(8192, N, dtype=wide), (empty(batch, 8192, N, dtype=wide), x, z)
        yield (
            f"N {N}",
            lambda A=A, scanned=scanned, N=N: kernels["selective_scan_step"](*scanned, A, B[:, :N], C[:, :N], *channels, True),
        )
    conv_in, window, weight, bias = packed[:, 8192:-128], empty(batch, 3, 10_240), empty(10_240, 4), empty(10_240)
    yield "conv", lambda: kernels["causal_conv1d_step"](window, conv_in, weight, bias, True)
