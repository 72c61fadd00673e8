"""Tensors of more than 2^31 elements: every address is computed in 64 bits."""

from functools import partial

import pytest
import torch
from op_testing import relative_error

import mamba_kernels as ops

SPAN = 2**31 * 6 // 5  # Elements from the first to the last of a tensor, of which few are touched.


def far_apart(t, dim=1):
    """The same values with a dimension's elements so far apart that the offset of the last is above 2^31.

    Memory that nothing touches is not used: on a CPU it costs addresses only.
    """
    stride = -(-SPAN // (t.shape[dim] - 1))
    assert stride > t.numel()
    strides = list(t.contiguous().stride())
    strides[dim] = stride
    far = torch.empty(SPAN + 2 * t.numel() + stride, dtype=t.dtype, device=t.device).as_strided(t.shape, strides)
    return far.copy_(t)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


LENGTH = 300

CASES = {
    "ssd x": ("x", lambda **t: ops.ssd(**t, dt_softplus=True), {"x": (1, LENGTH, 2, 16)}),
    "ssd B": ("B", lambda **t: ops.ssd(**t, dt_softplus=True), {"x": (1, LENGTH, 2, 16)}),
    "ssd dt": ("dt", lambda **t: ops.ssd(**t, dt_softplus=True), {"x": (1, LENGTH, 2, 16)}),
    "selective_scan x": ("x", lambda **t: ops.selective_scan(**t, dt_softplus=True), {"x": (1, 50, 2)}),
    "selective_scan C": ("C", lambda **t: ops.selective_scan(**t, dt_softplus=True), {"x": (1, 50, 2)}),
    "causal_conv1d": ("x", partial(ops.causal_conv1d, activation="silu"), {"x": (1, 50, 4), "weight": (4, 4)}),
    "norm": ("x", lambda x, weight: ops.rms_norm(x, weight, eps=1e-5), {"x": (1, LENGTH, 8), "weight": (8,)}),
    "gated_norm": (
        "z", lambda y, z, weight: ops.gated_norm(y, z, weight, group_size=8, eps=1e-5),
        {"y": (1, LENGTH, 8), "z": (1, LENGTH, 8), "weight": (8,)},
    ),
    "swiglu": ("gate", ops.swiglu, {"gate": (1, LENGTH, 8), "up": (1, LENGTH, 8)}),
    "rope": ("x", ops.rope, {"x": (1, LENGTH, 2, 8), "cos": (LENGTH, 4), "sin": (LENGTH, 4)}),
}  # fmt: skip


def inputs_of(case, device):
    _, op, shapes = CASES[case]
    inputs = {name: draw(*shape) for name, shape in shapes.items()}
    if case.startswith("ssd"):
        batch, length, heads, _ = shapes["x"]
        inputs |= {"dt": draw(batch, length, heads), "A": -draw(heads).float().exp()}
        inputs |= {name: draw(batch, length, 1, 16, seed=seed) for seed, name in enumerate("BC")}
    if case.startswith("selective_scan"):
        batch, length, channels = shapes["x"]
        inputs |= {"dt": draw(batch, length, channels), "A": -draw(channels, 4).float().exp()}
        inputs |= {name: draw(batch, length, 4, seed=seed) for seed, name in enumerate("BC")}
    return op, {name: t.to(device) for name, t in inputs.items()}


@pytest.mark.parametrize("case", CASES)
def test_inputs_far_apart(case, fused_device):
    """Outputs and gradients are those of the same numbers side by side."""
    op, inputs = inputs_of(case, fused_device)
    results = []
    for far in (None, CASES[case][0]):
        leaves = {name: (far_apart(t) if name == far else t.clone()).requires_grad_() for name, t in inputs.items()}
        out = op(**leaves)
        results.append([out.detach(), *torch.autograd.grad(out.float().square().sum(), list(leaves.values()))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_ssd_of_a_long_sequence(fused_device):
    """x of more than 2^31 elements (on a GPU) against its pieces, each from the state that the one before leaves."""
    cuda = fused_device == "cuda"
    batch, length, heads, head_dim, state, piece = (2, 262_144 + 4096, 128, 64, 128, 26_624) if cuda else (1, 384, 2, 16, 16, 128)
    assert length % piece == 0
    assert batch * length * heads * head_dim > 2**31 or not cuda
    generator = torch.Generator(fused_device).manual_seed(0)
    new = partial(torch.randn, generator=generator, device=fused_device, dtype=torch.bfloat16)
    x, dt = new(batch, length, heads, head_dim), new(batch, length, heads) - 4.0
    B, C = (new(batch, length, 1, state) for _ in range(2))
    A, g_y = -torch.rand(heads, generator=generator, device=fused_device), new(batch, length, heads, head_dim)
    leaves = [t.requires_grad_() for t in (x, dt, B, C)]
    y = ops.ssd(x, dt, A, B, C, dt_softplus=True)
    got = torch.autograd.grad(y, leaves, g_y)
    worst, before, states = 0.0, None, []
    with torch.no_grad():
        for begin in range(0, length, piece):
            states.append(before)
            tokens = slice(begin, begin + piece)
            x_, dt_, B_, C_ = (t[:, tokens] for t in leaves)
            y_, before = ops.ssd(x_, dt_, A, B_, C_, dt_softplus=True, initial_state=before, return_final_state=True)
            worst = max(worst, relative_error(y[:, tokens], y_))
    g_state = torch.zeros_like(before)
    for begin in reversed(range(0, length, piece)):
        tokens = slice(begin, begin + piece)
        pieces = [t.detach()[:, tokens].requires_grad_() for t in leaves]
        initial = states.pop()
        initial = torch.zeros_like(g_state) if initial is None else initial
        x_, dt_, B_, C_ = pieces
        out = ops.ssd(x_, dt_, A, B_, C_, dt_softplus=True, initial_state=initial.requires_grad_(), return_final_state=True)
        *of_piece, g_state = torch.autograd.grad(out, [*pieces, initial], [g_y[:, tokens], g_state])
        worst = max(worst, *(relative_error(whole[:, tokens], part) for whole, part in zip(got, of_piece, strict=True)))
    assert worst < 1e-2  # Sums of bfloat16 terms in another order, where the state is rounded at other chunks' ends.
