"""The activations and their gradients as Triton kernels: one pass over the tensors each way, in float32 inside.

`g_` before a name is the gradient of the loss with respect to it. Tensors are [T, F] whose rows lie anywhere: `gate` and `up`
may be the halves of one projection.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamba_kernels.backend import Meta, Tunable, launch, register
from mamba_kernels.common import as_rows, cdiv

SWIGLU, SQUARED_RELU, GELU, GELU_TANH = (tl.constexpr(kind) for kind in range(4))


def _candidates(dtype: torch.dtype, kind: int) -> list[Meta]:
    """For one of the activations, of which GELU has the most to compute."""
    return [
        {"BLOCK": block, "num_warps": warps}
        for block, warps in ((2048, 8), (1024, 4), (2048, 4), (4096, 8), (4096, 4), (8192, 8), (512, 4))
    ]


FORWARD = Tunable("activation", _candidates)
BACKWARD = Tunable("activation_backward", _candidates)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), in the fewest instructions: a division would take three more."""
    root = tl.rsqrt(1.0 + tl.exp2(-1.4426950408889634 * x))
    return root * root


@triton.jit
def softplus(x):
    """log(1 + exp(x)), also where that is small: log(1 + e) = log(u) + (e - (u - 1)) / u, with u = 1 + e as it was rounded."""
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    return tl.maximum(x, 0.0) + (tl.log(u) + (e - (u - 1.0)) / u)


@triton.jit
def _normal_tail(x):
    """The probability that a normal variable is below -|x|, and exp(-x^2 / 2), of which it is a multiple.

    The multiple, erfcx(|x| / sqrt(2)) / 2, is t times a polynomial in t = 1 / (1 + 0.28 |x|), fitted for the least relative error,
    1.7e-7. Half the instructions of erf, and no 1 + erf(x), which cancels where x is negative.
    """
    root = tl.rsqrt(1.0 + 0.28 * tl.abs(x))
    t = root * root
    multiple = 0.024759011021 * t - 0.093746655036
    multiple = multiple * t + 0.092674466538
    multiple = multiple * t - 0.0066567140854
    multiple = multiple * t + 0.072873383876
    multiple = multiple * t + 0.083604705009
    multiple = multiple * t + 0.10308827560
    multiple = multiple * t + 0.11169958213
    multiple = multiple * t + 0.11170386142
    bell = tl.exp2(-0.7213475204444817 * x * x)
    return multiple * t * bell, bell


@triton.jit
def _value(gate, up, KIND: tl.constexpr):
    """The activation of float32 `gate` (times `up`, for SwiGLU)."""
    if KIND == SWIGLU:
        return gate * sigmoid(gate) * up
    if KIND == SQUARED_RELU:
        positive = tl.maximum(gate, 0.0)
        return positive * positive
    if KIND == GELU:
        tail, _ = _normal_tail(gate)
        return tl.maximum(gate, 0.0) - tl.minimum(tl.abs(gate), 100.0) * tail  # Where the tail is zero, infinity may be
    return gate * sigmoid(2.0 * _tanh_argument(gate))


@triton.jit
def _tanh_argument(x):
    """u of 0.5 x (1 + tanh(u)) = x sigmoid(2 u)."""
    return 0.7978845608028654 * (x + 0.044715 * x * x * x)


@triton.jit
def _slope(x, KIND: tl.constexpr):
    """The derivative of an activation of one argument."""
    if KIND == SQUARED_RELU:
        return 2.0 * tl.maximum(x, 0.0)
    if KIND == GELU:
        tail, bell = _normal_tail(x)
        return tl.where(x > 0.0, 1.0 - tail, tail) + x * 0.3989422804014327 * bell
    gate, rest = sigmoid(2.0 * _tanh_argument(x)), sigmoid(-2.0 * _tanh_argument(x))
    return gate + x * gate * rest * 2.0 * 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * x * x)


@triton.jit
def _activation_kernel(gate_ptr, up_ptr, out_ptr, F, s_gate, s_up, s_out, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < F
    gate = tl.load(gate_ptr + row * s_gate + columns, mask=inside, other=0.0).to(tl.float32)
    up = gate
    if KIND == SWIGLU:
        up = tl.load(up_ptr + row * s_up + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * s_out + columns, _value(gate, up, KIND).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _activation_backward_kernel(
    gate_ptr, up_ptr, g_out_ptr, g_gate_ptr, g_up_ptr, F, s_gate, s_up, s_g_out, s_g_gate, s_g_up,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < F
    gate = tl.load(gate_ptr + row * s_gate + columns, mask=inside, other=0.0).to(tl.float32)
    g_out = tl.load(g_out_ptr + row * s_g_out + columns, mask=inside, other=0.0).to(tl.float32)
    if KIND == SWIGLU:
        up = tl.load(up_ptr + row * s_up + columns, mask=inside, other=0.0).to(tl.float32)
        open_ = sigmoid(gate)
        g_up = g_out * gate * open_
        tl.store(g_up_ptr + row * s_g_up + columns, g_up.to(g_up_ptr.dtype.element_ty), mask=inside)
        g_gate = g_out * up * open_ * (1.0 + gate * (1.0 - open_))
    else:
        g_gate = g_out * _slope(gate, KIND)
    tl.store(g_gate_ptr + row * s_g_gate + columns, g_gate.to(g_gate_ptr.dtype.element_ty), mask=inside)


def forward_into(kind: int, gate: Tensor, up: Tensor, out: Tensor) -> None:
    """Write the activation of [T, F] into `out` [T, F]; `up` is used by SwiGLU only."""
    meta = FORWARD(gate.dtype, kind)
    grid = (gate.shape[0], cdiv(gate.shape[1], meta["BLOCK"]))
    launch(
        _activation_kernel, grid, gate, up, out, gate.shape[1], gate.stride(0), up.stride(0), out.stride(0), KIND=kind, **meta
    )


def backward_into(kind: int, gate: Tensor, up: Tensor, g_out: Tensor, g_gate: Tensor, g_up: Tensor) -> None:
    """Write the gradients of `gate` and, for SwiGLU, `up`, [T, F] each."""
    meta = BACKWARD(gate.dtype, kind)
    grid = (gate.shape[0], cdiv(gate.shape[1], meta["BLOCK"]))
    strides = (t.stride(0) for t in (gate, up, g_out, g_gate, g_up))
    launch(
        _activation_backward_kernel, grid, gate, up, g_out, g_gate, g_up, gate.shape[1], *strides, KIND=kind, **meta
    )


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    forward_into(SWIGLU.value, as_rows(gate), as_rows(up), as_rows(out))
    return out


def _swiglu_backward(gate: Tensor, up: Tensor, g_out: Tensor) -> tuple[Tensor, Tensor]:
    g_gate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    g_up = torch.empty(up.shape, dtype=up.dtype, device=up.device)
    backward_into(SWIGLU.value, *(as_rows(t) for t in (gate, up, g_out, g_gate, g_up)))
    return g_gate, g_up


def _unary(x: Tensor, kind: int) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    forward_into(kind, as_rows(x), as_rows(x), as_rows(out))
    return out


def _unary_backward(x: Tensor, g_out: Tensor, kind: int) -> Tensor:
    g_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x_TF, g_out_TF, g_x_TF = as_rows(x), as_rows(g_out), as_rows(g_x)
    backward_into(kind, x_TF, x_TF, g_out_TF, g_x_TF, g_x_TF)
    return g_x


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    # Only through save_for_backward: what hangs on ctx otherwise, recomputation cannot let go.
    tensors = [t for t in inputs if isinstance(t, Tensor)]
    ctx.save_for_backward(*tensors)
    ctx.kind = inputs[len(tensors) :]


_swiglu_gradients = register(
    "swiglu_backward", "(Tensor gate, Tensor up, Tensor g_out) -> (Tensor, Tensor)", _swiglu_backward,
    lambda gate, up, g_out: (gate.new_empty(gate.shape), up.new_empty(up.shape)),
)  # fmt: skip
_unary_gradient = register(
    "unary_activation_backward", "(Tensor x, Tensor g_out, int kind) -> Tensor", _unary_backward,
    lambda x, g_out, kind: x.new_empty(x.shape),
)  # fmt: skip
swiglu = register(
    "swiglu", "(Tensor gate, Tensor up) -> Tensor", _swiglu, lambda gate, up: gate.new_empty(gate.shape),
    setup_context=_save_inputs, backward=lambda ctx, g_out: _swiglu_gradients(*ctx.saved_tensors, g_out),
)  # fmt: skip
_unary_activation = register(
    "unary_activation", "(Tensor x, int kind) -> Tensor", _unary, lambda x, kind: x.new_empty(x.shape),
    setup_context=_save_inputs, backward=lambda ctx, g_out: (_unary_gradient(*ctx.saved_tensors, g_out, *ctx.kind), None),
)  # fmt: skip


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2."""
    return _unary_activation(x, SQUARED_RELU.value)


def gelu(x: Tensor, approximate: str) -> Tensor:
    """GELU, exact or by the tanh approximation."""
    return _unary_activation(x, (GELU_TANH if approximate == "tanh" else GELU).value)
