"""AdamW with its parameter groups, learning-rate and batch schedules, and gradient clipping."""

from megatron_mamba.optim.clip import clip_, global_grad_norm
from megatron_mamba.optim.groups import build_optimizer, load_optimizer_state, optimizer_state, set_learning_rate
from megatron_mamba.optim.schedule import global_batch_size, learning_rate

__all__ = [
    "build_optimizer",
    "clip_",
    "global_batch_size",
    "global_grad_norm",
    "learning_rate",
    "load_optimizer_state",
    "optimizer_state",
    "set_learning_rate",
]
