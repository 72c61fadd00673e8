"""AdamW with its parameter groups, learning-rate and batch schedules, and gradient clipping."""

from megatron_mamba.optim.clip import clip_, global_grad_norm
from megatron_mamba.optim.groups import build_optimizer, load_optimizer_state, optimizer_state, set_learning_rate
from megatron_mamba.optim.schedule import global_batch_size, last_sample, learning_rate, schedule_position

__all__ = [
    "build_optimizer",
    "clip_",
    "global_batch_size",
    "global_grad_norm",
    "last_sample",
    "learning_rate",
    "load_optimizer_state",
    "optimizer_state",
    "schedule_position",
    "set_learning_rate",
]
