"""Activations in plain torch, computed in float32 or wider; the backward recomputes everything from the inputs."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mamba_kernels.common import accumulate_dtype, row_blocks, silu_gradient


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return _SwiGLU.apply(gate, up)


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2."""
    return _SquaredReLU.apply(x)


def gelu(x: Tensor, approximate: str) -> Tensor:
    """torch's GELU, which already keeps only x and computes in float32 or wider."""
    return functional.gelu(x, approximate=approximate)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        out, dtype = gate.new_empty(gate.shape), accumulate_dtype(gate.dtype)
        gate_TF, up_TF, out_TF = (t.reshape(-1, gate.shape[-1]) for t in (gate, up, out))
        for rows in row_blocks(gate_TF):
            torch.mul(functional.silu(gate_TF[rows].to(dtype)), up_TF[rows], out=out_TF[rows])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_out: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        g_gate, g_up, dtype = gate.new_empty(gate.shape), up.new_empty(up.shape), accumulate_dtype(gate.dtype)
        gate_TF, up_TF, g_out_TF, g_gate_TF, g_up_TF = (t.reshape(-1, gate.shape[-1]) for t in (gate, up, g_out, g_gate, g_up))
        for rows in row_blocks(gate_TF):
            gate_, g_out_ = gate_TF[rows].to(dtype), g_out_TF[rows].to(dtype)
            torch.mul(silu_gradient(g_out_, gate_), up_TF[rows], out=g_gate_TF[rows])
            torch.mul(functional.silu(gate_), g_out_, out=g_up_TF[rows])
        return g_gate, g_up


class _SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        out, dtype = x.new_empty(x.shape), accumulate_dtype(x.dtype)
        x_TF, out_TF = x.reshape(-1, x.shape[-1]), out.view(-1, x.shape[-1])
        for rows in row_blocks(x_TF):
            torch.square(functional.relu(x_TF[rows].to(dtype)), out=out_TF[rows])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_out: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        g_x, dtype = x.new_empty(x.shape), accumulate_dtype(x.dtype)
        x_TF, g_out_TF, g_x_TF = (t.reshape(-1, x.shape[-1]) for t in (x, g_out, g_x))
        for rows in row_blocks(x_TF):
            torch.mul(functional.relu(x_TF[rows].to(dtype)).mul_(2.0), g_out_TF[rows], out=g_x_TF[rows])
        return g_x
