"""Write a checkpoint's model as one safetensors file: python tools/consolidate.py --checkpoint DIR --output FILE.safetensors"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from megatron_mamba.checkpoint import CheckpointError, resolve
from megatron_mamba.checkpoint.consolidated import consolidate
from megatron_mamba.config import ConfigError
from megatron_mamba.data.indexed import DataError


def main(argv: list[str] | None = None) -> int:
    """Write the file, and say what is in it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a checkpoint, a folder of checkpoints or a run's folder")
    parser.add_argument("--output", type=Path, required=True, help="file to write; must be new")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="of the file (default: as saved)")
    args = parser.parse_args(argv)
    checkpoint = resolve(args.checkpoint)
    entries = consolidate(checkpoint, args.output, {"fp32": torch.float32, "bf16": torch.bfloat16, None: None}[args.dtype])
    print(f"{args.output}: {len(entries)} tensors of {checkpoint}, {args.output.stat().st_size / 1e6:,.1f} MB")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (CheckpointError, ConfigError, DataError) as error:
        sys.exit(f"error: {error}")
