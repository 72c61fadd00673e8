"""`mamba2_mixer` against its three operators as they are defined, one token at a time in float64."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import test_kernel_conv1d
import test_kernel_gated_norm
import test_kernel_ssd
import torch
from op_testing import (
    EXACT,
    ONE_BF16_ROUNDING,
    Sent,
    ThreadRanks,
    assert_close,
    document_starts,
    in_float64,
    one_launch_at_a_time,
    outputs_and_gradients,
    randn,
    relative_error,
    strided,
)
from torch.utils._python_dispatch import TorchDispatchMode

from mamba_kernels import backend, causal_conv1d, gated_norm, mamba2_mixer, ssd

BATCH, HEADS, HEAD_DIM, GROUPS, STATE, WIDTH = 2, 4, 4, 2, 6, 4
INNER, CHANNELS = HEADS * HEAD_DIM, HEADS * HEAD_DIM + 2 * GROUPS * STATE
OPTIONS = {"state_size": STATE, "group_size": INNER // 2, "eps": 1e-2}
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 8 * ONE_BF16_ROUNDING}  # As the scan's, through the norm and the convolution.


def split(packed, convolved=None):
    if convolved is None:
        return packed.split([INNER, CHANNELS, HEADS], -1)
    x, B, C = convolved.split([INNER, GROUPS * STATE, GROUPS * STATE], -1)
    return x.unflatten(-1, (HEADS, HEAD_DIM)), *(t.unflatten(-1, (GROUPS, STATE)) for t in (B, C))


def oracle(packed, conv_weight, conv_bias, A, D, dt_bias, norm_weight, conv_state=None, ssm_state=None, document_start=None):
    z, conv_in, dt = split(packed)
    convolution = partial(test_kernel_conv1d.oracle, activation="silu", document_start=document_start)
    convolved, conv_state = convolution(conv_in, conv_weight, conv_bias, conv_state)
    x, B, C = split(packed, convolved)
    scan = partial(test_kernel_ssd.oracle, dt_softplus=True, document_start=document_start)
    y, ssm_state = scan(x, dt, A, B, C, D, dt_bias, ssm_state)
    norm = partial(test_kernel_gated_norm.oracle, group_size=OPTIONS["group_size"], eps=OPTIONS["eps"])
    return norm(y.flatten(2), z, norm_weight), conv_state, ssm_state


def make_inputs(length, dtype=torch.float64, device="cpu", states=True):
    """Weights and states in float32 beside bfloat16 activations, as the model has them."""
    draw, wide = partial(randn, device=device, dtype=dtype), torch.promote_types(dtype, torch.float32)
    inputs = {
        "packed": draw(BATCH, length, INNER + CHANNELS + HEADS),
        "conv_weight": draw(CHANNELS, WIDTH) / 2,
        "conv_bias": draw(CHANNELS),
        "A": -draw(HEADS).to(wide).exp(),
        "D": draw(HEADS, seed=1).to(wide),
        "dt_bias": draw(HEADS, seed=2).to(wide),
        "norm_weight": draw(INNER).to(wide),
    }
    if states:
        inputs |= {
            "conv_state": draw(BATCH, WIDTH - 1, CHANNELS),
            "ssm_state": draw(BATCH, HEADS, HEAD_DIM, STATE).to(wide),
        }
    return inputs


@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("documents", [False, True])
def test_reference(documents, states, device):
    starts = document_starts(BATCH, 21, device) if documents else None
    inputs = make_inputs(21, device=device, states=states)
    want = outputs_and_gradients(partial(oracle, document_start=starts), inputs)
    for strides in (False, True):
        got = outputs_and_gradients(partial(mamba2_mixer, **OPTIONS, document_start=starts), inputs, strides=strides)
        assert_close(got, want, EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("length", "states", "strides"), [(1, True, False), (41, True, True), (64, False, False)])
def test_fused(length, states, strides, dtype, fused_device):
    starts = document_starts(BATCH, length, fused_device) if states else None
    for seed in range(3 if fused_device == "cuda" else 1):
        inputs = make_inputs(length, dtype, fused_device, states)
        inputs["packed"] = inputs["packed"].roll(seed, 1)
        want = outputs_and_gradients(partial(oracle, document_start=starts), in_float64(inputs))
        op = partial(mamba2_mixer, **OPTIONS, document_start=starts)
        got = outputs_and_gradients(op, inputs, strides=strides)
        assert_close(got, want, TOLERANCE[dtype])
        if fused_device == "cuda":
            again = outputs_and_gradients(op, inputs, strides=strides)
            assert all(torch.equal(again[name], got[name]) for name in got)


def test_fused_equals_its_operators(fused_device):
    """The same kernels in the same order: bit for bit what the three operators give, gradients too."""

    def apart(packed, conv_weight, conv_bias, A, D, dt_bias, norm_weight, conv_state, ssm_state):
        z, conv_in, dt = split(packed)
        options = {"initial_state": conv_state, "return_final_state": True}
        convolved, conv_state = causal_conv1d(conv_in, conv_weight, conv_bias, activation="silu", **options)
        x, B, C = split(packed, convolved)
        options = {"dt_softplus": True, "initial_state": ssm_state, "return_final_state": True}
        y, ssm_state = ssd(x, dt, A, B, C, D=D, dt_bias=dt_bias, **options)
        options = {name: OPTIONS[name] for name in ("group_size", "eps")}
        return gated_norm(y.flatten(2), z, norm_weight, **options), conv_state, ssm_state

    inputs = make_inputs(13, torch.bfloat16, fused_device)
    got, want = outputs_and_gradients(partial(mamba2_mixer, **OPTIONS), inputs), outputs_and_gradients(apart, inputs)
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


def test_fused_writes_one_packed_gradient(fused_device):
    """The backward copies nothing into the gradient of `packed`: what is as large is made once."""
    inputs = make_inputs(40, torch.bfloat16, fused_device, states=False)
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    out, _, _ = mamba2_mixer(**leaves, **OPTIONS)
    g_out, made = torch.ones_like(out), list[int]()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "mamba_kernels":
                with self:  # What is made inside the operator.
                    return backend.KERNELS[func._schema.name.removeprefix("mamba_kernels::")](*args)
            result = func(*args, **(kwargs or {}))
            if not func.is_view:
                made.extend(t.numel() for t in (result if isinstance(result, tuple | list) else (result,)))
            return result

    with Watch():
        torch.autograd.grad(out, list(leaves.values()), g_out)
    assert made.count(inputs["packed"].numel()) == 1


def spread(inputs, pieces, parts, starts):
    """Outputs and gradients of pieces of a sequence on ranks that threads play, each beside the inputs before it."""
    sent, before, whole = Sent(), 0, inputs["packed"]
    calls = []
    for rank, length in enumerate(pieces):
        piece = slice(before, before + length)
        halo = whole[:, max(before - WIDTH + 1, 0) : before, INNER : INNER + CHANNELS]
        calls.append((rank, piece, None if rank == 0 else halo))
        before += length

    def on_rank(call):
        rank, piece, halo = call
        leaves = {name: (t[:, piece] if name == "packed" else t).clone().requires_grad_() for name, t in inputs.items()}
        arguments = {"conv_state": halo, "ranks": ThreadRanks(rank, len(pieces), sent), "document_start": starts[:, piece]}
        out, _, _ = mamba2_mixer(**leaves, **OPTIONS, **arguments, sum_parts=parts)
        g_out = randn(*whole.shape[:2], INNER, seed=7).to(out)[:, piece]
        return out.detach(), torch.autograd.grad(out, list(leaves.values()), g_out)

    with ThreadPoolExecutor(len(pieces)) as pool:
        outs, gradients = zip(*pool.map(on_rank, calls), strict=True)
    results = {"out": torch.cat(outs, 1)}
    for name, of_ranks in zip(inputs, zip(*gradients, strict=True), strict=True):
        results[name] = torch.cat(of_ranks, 1) if name == "packed" else sum(of_ranks)
    return results


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("in_parts", [False, True])
def test_spread_over_ranks(in_parts, fused, monkeypatch):
    """A sequence in pieces, and the norm's group in parts of which there is one: what the whole gives.

    The filters see their own token alone, so that the gradient that goes to the piece before, by other means, is zero.
    """
    from mamba_kernels.conv1d import fused as convolution
    from mamba_kernels.gated_norm import fused as gated
    from mamba_kernels.norm import fused as norm
    from mamba_kernels.ssd import operators

    if fused and torch.cuda.is_available():
        pytest.skip("ranks are threads of one CPU process here; on GPUs, test_torchrun.py has real ones")
    monkeypatch.setattr(backend, "INTERPRETED", fused)
    one_launch_at_a_time(monkeypatch, convolution, gated, norm, operators)
    inputs = make_inputs(45, torch.float32 if fused else torch.float64, states=False)
    inputs["conv_weight"][:, :-1] = 0.0
    starts = torch.zeros(BATCH, 45, dtype=torch.bool)
    starts[0, [3, 42]] = True
    monkeypatch.setitem(OPTIONS, "group_size", INNER)
    sums = []
    parts = (lambda own: sums.append(own.shape) or own.clone()) if in_parts else None
    got = spread(inputs, (40, 5), parts, starts)
    leaves = {name: t.double().requires_grad_() for name, t in inputs.items()}
    out, _, _ = oracle(**leaves, document_start=starts)
    g_out = randn(BATCH, 45, INNER, seed=7)
    want = {"out": out.detach()} | dict(zip(inputs, torch.autograd.grad(out, list(leaves.values()), g_out), strict=True))
    assert_close(got, want, TOLERANCE[torch.float32] if fused else EXACT)
    assert sorted(sums) == ([(BATCH * 5,)] * 2 + [(BATCH * 40,)] * 2 if in_parts else [])


def test_fused_on_meta_tensors():
    """Shapes and dtypes of outputs and gradients without a device."""
    inputs = {name: t.to("meta").requires_grad_() for name, t in make_inputs(300, torch.bfloat16).items()}
    with backend.meta_stands_for("cuda"):
        outputs = mamba2_mixer(**inputs, **OPTIONS)
        gradients = torch.autograd.grad([out.float().sum() for out in outputs], list(inputs.values()))
    shapes = [(BATCH, 300, INNER), (BATCH, WIDTH - 1, CHANNELS), (BATCH, HEADS, HEAD_DIM, STATE)]
    dtypes = [torch.bfloat16, torch.bfloat16, torch.float32]
    assert [(out.shape, out.dtype) for out in outputs] == list(zip(shapes, dtypes, strict=True))
    assert [(g.shape, g.dtype) for g in gradients] == [(t.shape, t.dtype) for t in inputs.values()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packed": torch.zeros(2, 9, 50)}, r"packed has 50 channels, wanted 60: 16 of z .*, 40 of x, B and C .*, 4 of dt"),
        ({"A": torch.zeros(3)}, r"D has shape \(4,\), wanted \[H\] = \(3\)"),
        ({"norm_weight": torch.zeros(15)}, "packed has 60 channels, wanted 59"),
        ({"state_size": 7}, r"state_size is 7, wanted one that divides the 24 / 2 channels"),
        ({"state_size": 4}, "B and C have 3 groups, wanted a divisor of the 4 heads"),
        ({"group_size": 5}, "group_size is 5, wanted a divisor of the 16 channels"),
        ({"ssm_state": torch.zeros(2, 4, 4, 5)}, r"ssm_state has shape \(2, 4, 4, 5\), wanted"),
        ({"document_start": torch.zeros(2, 9)}, "document_start has dtype torch.float32, wanted torch.bool"),
        ({"conv_bias": torch.zeros(40, device="meta")}, "conv_bias is on meta, wanted cpu"),
    ],
)
def test_errors_name_the_argument(change, message):
    arguments = make_inputs(9, torch.float32) | OPTIONS | change
    with pytest.raises(ValueError, match=f"mamba2_mixer: {message}"):
        mamba2_mixer(**arguments)


def test_packed_may_be_a_slice():
    """Of a wider tensor, and with any strides."""
    inputs = make_inputs(9)
    want = mamba2_mixer(**inputs, **OPTIONS)
    wide = torch.cat([inputs["packed"], torch.full((BATCH, 9, 3), torch.nan, dtype=torch.float64)], 2)
    for packed in (wide[..., :-3], strided(inputs["packed"])):
        got = mamba2_mixer(**inputs | {"packed": packed}, **OPTIONS)
        assert max(relative_error(a, b) for a, b in zip(got, want, strict=True)) <= EXACT
