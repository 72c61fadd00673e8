"""The mixer on the kernels of its three operators: `mamba_kernels::mamba2_mixer` and `mamba2_mixer_backward`, and ranks.

What the three would each allocate for the gradients of their inputs, and autograd then copy into that of `packed`, is written
there at once; so are the gradients of x, B and C, where the convolution's backward reads them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mamba_kernels.backend import register
from mamba_kernels.common import SequenceRanks, as_rows, contiguous, unit_stride
from mamba_kernels.conv1d import fused as convolution
from mamba_kernels.gated_norm import fused as norm
from mamba_kernels.mamba2_mixer.reference import split_convolved, split_packed
from mamba_kernels.ssd import operators as scans

SumParts = Callable[[Tensor], Tensor]


class Inputs(NamedTuple):
    """The arguments of `mamba_kernels.mamba2_mixer` that are tensors or numbers, in the operator's order."""

    packed: Tensor
    conv_weight: Tensor
    conv_bias: Tensor
    A: Tensor
    D: Tensor
    dt_bias: Tensor
    norm_weight: Tensor
    conv_state: Tensor | None
    ssm_state: Tensor | None
    document_start: Tensor | None
    state_size: int
    group_size: int
    eps: float

    def filter(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, bool]:
        """The convolution's arguments but the first."""
        return self.conv_weight.contiguous(), self.conv_bias.contiguous(), contiguous(self.conv_state), self.document_start, True

    def room_for_rows(self) -> Tensor:
        """For a number a token."""
        return torch.empty(self.packed.shape[:2].numel(), dtype=torch.float32, device=self.packed.device)


class Outputs(NamedTuple):
    """What the forward returns, and what it keeps for the backward."""

    out: Tensor
    conv_state: Tensor
    ssm_state: Tensor
    convolved: Tensor  # [B, S, K]
    y: Tensor  # [B, S, H, P]
    step: Tensor  # these as in `scans.Scan`
    cs: Tensor
    fine: Tensor
    states: list[Tensor]  # before each chunk; of two parts of the heads over ranks
    squares: Tensor | None  # [T], of a group that is spread


def forward(t: Inputs, ranks: SequenceRanks | None, sum_parts: SumParts | None) -> Outputs:
    """Run the kernels."""
    (batch, length, _), (channels, width) = t.packed.shape, t.conv_weight.shape
    z, conv_in, dt = split_packed(unit_stride(t.packed), t.conv_weight, t.A)
    convolved, conv_state = t.packed.new_empty(batch, length, channels), t.packed.new_empty(batch, width - 1, channels)
    convolution.forward_into(conv_in, *t.filter(), convolved, conv_state)
    x, B, C = split_convolved(convolved, t.norm_weight, t.A, t.state_size)
    scan = scans.prepare(x, dt, t.A, B, C, t.D, t.dt_bias, scans.count_documents(t.document_start), True)
    y, out, squares = x.new_empty(x.shape), x.new_empty(z.shape), None
    ssm_state, states = scans.forward_into(scan, t.ssm_state, ranks, y)
    rows = as_rows(y.flatten(2)), as_rows(z), t.norm_weight.contiguous()
    if sum_parts is not None:
        here = t.room_for_rows()
        norm.forward_into(*rows, None, here, t.group_size, t.eps)
        squares = sum_parts(here).contiguous()
    norm.forward_into(*rows, as_rows(out), squares, t.group_size, t.eps)
    return Outputs(out, conv_state, ssm_state, convolved, y, *scan.kept, states, squares)


def backward(
    t: Inputs, kept: Outputs, g_out: Tensor, g_conv_state: Tensor | None, g_ssm_state: Tensor | None,
    ranks: SequenceRanks | None, sum_parts: SumParts | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of packed, conv_weight and conv_bias; the sums [3, H] for A, dt_bias and D; the gradient of norm_weight, and
    those of the states, empty for None."""
    z, conv_in, dt = split_packed(unit_stride(t.packed), t.conv_weight, t.A)
    g_packed, g_weight, g_bias, g_norm = (
        torch.empty(of.shape, dtype=of.dtype, device=of.device) for of in (t.packed, t.conv_weight, t.conv_bias, t.norm_weight)
    )
    g_z, g_conv_in, g_dt = split_packed(g_packed, t.conv_weight, t.A)
    g_y, g_convolved, projections = torch.empty_like(kept.y), torch.empty_like(kept.convolved), None
    rows = as_rows(kept.y.flatten(2)), as_rows(z), t.norm_weight.contiguous(), as_rows(g_out)
    if sum_parts is not None:
        here = t.room_for_rows()
        norm.backward_into(*rows, None, None, None, kept.squares, here, t.group_size, t.eps)
        projections = sum_parts(here).contiguous()
    norm.backward_into(*rows, as_rows(g_y.flatten(2)), as_rows(g_z), g_norm, kept.squares, projections, t.group_size, t.eps)
    x, B, C = split_convolved(kept.convolved, t.norm_weight, t.A, t.state_size)
    g_x, g_B, g_C = split_convolved(g_convolved, t.norm_weight, t.A, t.state_size)
    scan = scans.Scan(x, B, C, t.A, t.D, (kept.step, kept.cs, kept.fine), scans.count_documents(t.document_start))
    g = scans.Gradients(g_x, g_dt, g_B, g_C)
    sums, g_initial = scans.backward_into(scan, kept.states, g, dt, t.dt_bias, True, g_y, g_ssm_state, ranks)
    g_before = None if t.conv_state is None else t.conv_state.new_empty(t.conv_state.shape)
    convolution.backward_into(
        conv_in, *t.filter(), g_convolved, contiguous(g_conv_state), g_conv_in, g_weight, g_bias, g_before
    )
    g_initial = t.packed.new_empty(0) if t.ssm_state is None else g_initial
    return g_packed, g_weight, g_bias, sums, g_norm, t.packed.new_empty(0) if g_before is None else g_before, g_initial


def of_inputs(t: Inputs, gradients: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """From what `backward` returns to the gradients of the first nine inputs."""
    g_packed, g_weight, g_bias, sums, g_norm, g_conv_state, g_ssm_state = gradients
    g_A, g_dt_bias, g_D = sums.unbind()
    return (
        g_packed, g_weight, g_bias, g_A.to(t.A.dtype), g_D.to(t.D.dtype), g_dt_bias.to(t.dt_bias.dtype), g_norm,
        None if t.conv_state is None else g_conv_state, None if t.ssm_state is None else g_ssm_state.to(t.ssm_state.dtype),
    )  # fmt: skip


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    *outputs, (states,), _ = forward(Inputs._make(arguments), None, None)
    return *outputs, states


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    t = Inputs._make(arguments)
    (batch, length, _), (channels, width) = t.packed.shape, t.conv_weight.shape
    convolved = t.packed.new_empty(batch, length, channels)
    x, B, C = split_convolved(convolved, t.norm_weight, t.A, t.state_size)
    _, _, dt = split_packed(t.packed, t.conv_weight, t.A)
    y, ssm_state, *kept = scans.forward_fake(x, dt, t.A, B, C, t.D, t.dt_bias, t.ssm_state, t.document_start, True)
    conv_state = t.packed.new_empty(batch, width - 1, channels)
    return x.new_empty(batch, length, t.norm_weight.shape[0]), conv_state, ssm_state, convolved, y, *kept


def _backward(
    g_out: Tensor, g_conv_state: Tensor | None, g_ssm_state: Tensor | None, convolved: Tensor, y: Tensor, step: Tensor, cs: Tensor,
    fine: Tensor, states: Tensor, *arguments: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    kept = Outputs(g_out, g_out, g_out, convolved, y, step, cs, fine, [states], None)  # The first three are not looked at.
    return backward(Inputs._make(arguments), kept, g_out, g_conv_state, g_ssm_state, None, None)


def _backward_fake(
    g_out: Tensor, g_conv_state: Tensor | None, g_ssm_state: Tensor | None, convolved: Tensor, y: Tensor, step: Tensor, cs: Tensor,
    fine: Tensor, states: Tensor, *arguments: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    t = Inputs._make(arguments)
    g_packed, g_weight, g_bias, g_norm = (of.new_empty(of.shape) for of in (t.packed, t.conv_weight, t.conv_bias, t.norm_weight))
    g_before = y.new_empty(0) if t.conv_state is None else t.conv_state.new_empty(t.conv_state.shape)
    g_initial = y.new_empty(0) if t.ssm_state is None else cs.new_empty(t.ssm_state.shape)
    return g_packed, g_weight, g_bias, cs.new_empty(3, t.A.shape[0]), g_norm, g_before, g_initial


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:10], *output[3:])
    ctx.options = inputs[10:]


def _autograd(
    ctx: Any, g_out: Tensor | None, g_conv_state: Tensor | None, g_ssm_state: Tensor | None, *unused: Any
) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    inputs, kept = (*tensors[:10], *ctx.options), tensors[10:]
    g_out = _zeros_like_out(Inputs._make(inputs)) if g_out is None else g_out
    gradients = _gradients(g_out, g_conv_state, g_ssm_state, *kept, *inputs)
    return *of_inputs(Inputs._make(inputs), gradients), *[None] * 4


def _zeros_like_out(t: Inputs) -> Tensor:
    return t.packed.new_zeros(*t.packed.shape[:2], t.norm_weight.shape[0])


_INPUTS = (
    "Tensor packed, Tensor conv_weight, Tensor conv_bias, Tensor A, Tensor D, Tensor dt_bias, Tensor norm_weight,"
    " Tensor? conv_state, Tensor? ssm_state, Tensor? document_start, int state_size, int group_size, float eps"
)
_KEPT = "Tensor convolved, Tensor y, Tensor step, Tensor cs, Tensor fine, Tensor states"
_SEVEN, _NINE = (f"({', '.join(['Tensor'] * count)})" for count in (7, 9))
_gradients = register(
    "mamba2_mixer_backward", f"(Tensor g_out, Tensor? g_conv_state, Tensor? g_ssm_state, {_KEPT}, {_INPUTS}) -> {_SEVEN}",
    _backward, _backward_fake,
)  # fmt: skip
_mixer = register(
    "mamba2_mixer", f"({_INPUTS}) -> {_NINE}", _forward, _forward_fake, setup_context=_setup_context, backward=_autograd
)


def mamba2_mixer(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`mamba_kernels.mamba2_mixer` on checked arguments, of which the last two are `ranks` and `sum_parts`."""
    *inputs, ranks, sum_parts = arguments
    if ranks is not None or sum_parts is not None:
        return _SpreadMixer.apply(*arguments)
    out, conv_state, ssm_state, *_ = _mixer(*inputs)
    return out, conv_state, ssm_state


class _SpreadMixer(torch.autograd.Function):
    """Over ranks that share sequences or groups: no operator can hold what they exchange with."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        *inputs, ctx.ranks, ctx.sum_parts = arguments
        output = forward(Inputs._make(inputs), ctx.ranks, ctx.sum_parts)
        ctx.set_materialize_grads(False)
        *kept, states, squares = output[3:]
        ctx.save_for_backward(*inputs[:10], *kept, squares, *states)
        ctx.options = inputs[10:]
        return output[:3]

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, g_out: Tensor | None, g_conv_state: Tensor | None, g_ssm_state: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        t, (*kept, squares), states = Inputs._make((*tensors[:10], *ctx.options)), tensors[10:16], list(tensors[16:])
        g_out = _zeros_like_out(t) if g_out is None else g_out
        outputs = Outputs._make((g_out, g_out, g_out, *kept, states, squares))
        gradients = backward(t, outputs, g_out, g_conv_state, g_ssm_state, ctx.ranks, ctx.sum_parts)
        return *of_inputs(t, gradients), *[None] * 6
