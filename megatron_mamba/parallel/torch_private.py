"""The private names of torch that we rely on, what for, and which versions have them.

torch may rename or drop them in any release, and has. What has changed is reached through the functions here, which know the
versions apart; what has not is used where it is needed. tests/unit/test_torch_private.py holds the table against the code and
against the torch at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage


@dataclass(frozen=True)
class Private:
    """One name. Versions from 2.11 on have it."""

    name: str
    """module:object.attribute"""
    why: str
    until: str = ""
    """The version from which on it is gone."""
    needs: str = ""
    """"gpu": only builds for GPUs have it."""

    @property
    def last_part(self) -> str:
        return self.name.rpartition(".")[2].rpartition(":")[2]


VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])
FREES_EARLY = VERSION >= (2, 15)
"""Whether a step of the torch at hand holds less, as from 2.15 on: autograd adds a gradient to those of earlier micro-batches as
soon as it has been made; one rank copies no gradients to divide them by one; a pipeline has no buffers between micro-batches,
and gives up what it has sent."""

_FSDP = "torch.distributed.fsdp._fully_shard"
NAMES = (
    Private("torch.distributed.device_mesh:DeviceMesh._concatenate", "replicas and shards as one mesh for FSDP2"),
    Private("torch.distributed.device_mesh:DeviceMesh._flatten", "dp and cp ranks as one dimension"),
    Private(f"{_FSDP}:FSDPModule._get_fsdp_state", "what FSDP keeps of a unit's parameters"),
    Private(f"{_FSDP}._fsdp_state:FSDPState._fsdp_param_group", "the same: one group or none"),
    Private(f"{_FSDP}._fsdp_param:FSDPParam.accumulate_unsharded_grad_if_needed", "gradients that were put off", until="2.15"),
    Private(f"{_FSDP}._fsdp_param:FSDPParam.to_accumulated_grad_if_needed", "gradients that were put off", until="2.15"),
    Private(
        "torch.distributed.pipelining:PipelineStage._get_init_p2p_neighbors_ops", "no connection of a rank to itself", until="2.15"
    ),
    Private("torch.distributed.tensor:DTensor._local_tensor", "a DTensor's memory, without dispatching"),
    Private("torch:UntypedStorage._cdata", "which tensors share memory"),
    Private("torch.ops.aten:_scaled_dot_product_flash_attention", "ring attention: log-sum-exp beside the output"),
    Private("torch.ops.aten:_scaled_dot_product_flash_attention_backward", "ring attention"),
    Private("torch.ops.aten:_scaled_dot_product_flash_attention_for_cpu", "ring attention"),
    Private("torch.ops.aten:_scaled_dot_product_flash_attention_for_cpu_backward", "ring attention"),
    Private("torch.ops.aten:_scaled_dot_product_cudnn_attention", "ring attention"),
    Private("torch.ops.aten:_scaled_dot_product_cudnn_attention_backward", "ring attention"),
    Private("torch:_fused_sdp_choice", "ring attention: the kernel that torch itself would take"),
    Private("torch:_foreach_mul_", "clipping in one launch"),
    Private("torch:_foreach_norm", "norms in one launch"),
    Private("torch:_C._are_functorch_transforms_active", "kernels: whether a transform must see an operator"),
    Private("torch:_C._len_torch_dispatch_stack", "kernels: whether a mode must see an operator"),
    Private("torch:_C._cuda_getCurrentRawStream", "kernels: the stream of a launch", needs="gpu"),
    Private("torch:_C._distributed_c10d._dump_nccl_trace", "NCCL's last collectives, when a rank hangs", needs="gpu"),
    Private("torch:_C._distributed_c10d._dump_fr_trace", "the same of the NCCL backend that is the usual one from 2.15 on"),
    Private("torch.testing._internal.distributed.fake_pg:FakeStore", "dry runs of many ranks"),
    Private("torch.utils._python_dispatch:TorchDispatchMode", "dry runs: counting operations and memory"),
    Private("torch.utils._pytree:tree_leaves", "dry runs: tensors in arguments"),
    Private("torch._ops:OpOverload._schema", "dry runs: which operation, and where its process group is"),
)


def unit_parameters(unit: FSDPModule) -> list[Any]:
    """What FSDP keeps of each parameter of one unit."""
    state = unit._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # torch 2.11: one or none
        groups = [] if state._fsdp_param_group is None else [state._fsdp_param_group]
    return [parameter for group in groups for parameter in group.fsdp_params]


def keep_gradients(parameters: Sequence[Any]) -> None:
    """Add the gradients that autograd left at gathered parameters (of :func:`unit_parameters`) to what the step has so far, in the
    dtype in which gradients are summed. From torch 2.15 on autograd itself has done so: parameters carry that dtype."""
    for parameter in parameters:
        if hasattr(parameter, "accumulate_unsharded_grad_if_needed"):
            parameter.accumulate_unsharded_grad_if_needed()
            parameter.to_accumulated_grad_if_needed()


class Stage(PipelineStage):
    """A stage that sends nothing to its own rank: torch 2.11 opens connections to neighbours there too, which gloo cannot. From
    torch 2.15 on this is not asked for: stages open no connections by themselves."""

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        operations: list[dist.P2POp] = super()._get_init_p2p_neighbors_ops()  # type: ignore[misc] # gone: see above
        return [op for op in operations if op.group_peer != self.group_rank]


def last_collectives() -> bytes:
    """What NCCL's flight recorder has of this rank, pickled. From torch 2.15 on "nccl" is a backend that calls itself "nccl2" and
    records elsewhere, unless TORCH_DIST_USE_NCCL2=0 chooses the former one. Of several records the longest is the one in use."""
    c10d: Any = torch._C._distributed_c10d  # type: ignore[attr-defined]
    traces: list[bytes] = [c10d._dump_nccl_trace()]
    if VERSION >= (2, 15):
        traces += [c10d._dump_fr_trace(backend=name) for name in ("nccl", "nccl2")]
    return max(traces, key=len)
