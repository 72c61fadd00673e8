"""The operators of Mamba, Mamba-2, hybrid and Transformer language models, each with its exact gradient.

A folder an operator: `__init__` states shapes and maths, checks arguments and picks the implementation; `reference` is
plain torch in any floating-point dtype, `fused` is Triton for CUDA devices. The package needs nothing but torch, which brings
Triton where there are CUDA devices.
"""

from mamba_kernels.activation import gelu, squared_relu, swiglu
from mamba_kernels.conv1d import causal_conv1d
from mamba_kernels.cross_entropy import softmax_gradient, softmax_statistics
from mamba_kernels.gated_norm import gated_norm
from mamba_kernels.mamba2_mixer import mamba2_mixer
from mamba_kernels.norm import layer_norm, rms_norm
from mamba_kernels.rope import rope, rope_tables
from mamba_kernels.selective_scan import selective_scan
from mamba_kernels.ssd import ssd
from mamba_kernels.state_update import causal_conv1d_step, selective_scan_step, ssd_step

__all__ = [
    "causal_conv1d",
    "causal_conv1d_step",
    "gated_norm",
    "gelu",
    "layer_norm",
    "mamba2_mixer",
    "rms_norm",
    "rope",
    "rope_tables",
    "selective_scan",
    "selective_scan_step",
    "softmax_gradient",
    "softmax_statistics",
    "squared_relu",
    "ssd",
    "ssd_step",
    "swiglu",
]
