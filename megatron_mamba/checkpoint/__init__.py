"""Sharded checkpoints that load on any mesh: written apart, renamed when whole, checked by checksums."""

from megatron_mamba.checkpoint.loading import load, read_metadata, resolve, tokenizer_path, verify
from megatron_mamba.checkpoint.rng import rng_state, set_rng_state
from megatron_mamba.checkpoint.sharded import CheckpointManager
from megatron_mamba.checkpoint.storage import CheckpointError

__all__ = [
    "CheckpointError", "CheckpointManager", "load", "read_metadata", "resolve", "rng_state", "set_rng_state",
    "tokenizer_path", "verify",
]  # fmt: skip
