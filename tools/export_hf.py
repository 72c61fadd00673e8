"""Export a checkpoint as a Hugging Face folder: python tools/export_hf.py --checkpoint DIR --output DIR [--verify]"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from megatron_mamba.checkpoint import CheckpointError, hf, read_metadata, resolve, tokenizer_path
from megatron_mamba.checkpoint.hf_source import checkpoint_tensors
from megatron_mamba.checkpoint.hf_tokenizer import check_tokenizer
from megatron_mamba.checkpoint.hf_verify import compare, sample_tokens
from megatron_mamba.config import Config, ConfigError, ModelConfig, ParallelConfig, from_dict
from megatron_mamba.data.indexed import DataError
from megatron_mamba.generate.loading import load_model
from megatron_mamba.parallel.context import ParallelContext
from megatron_mamba.parallel.fsdp import local

TOLERANCE = 1e-4
"""Largest relative difference of fp32 logits that --verify accepts: rounding gives about 1e-6, a wrong layer 1e-2 and more."""
VERIFY_TOKENS = 600
"""Longer than two chunks of any scan."""


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a checkpoint, a folder of checkpoints or a run's folder")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must be new or empty")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the file (default fp32, which is lossless)")
    parser.add_argument("--max-shard-size", type=hf.parse_size, default="5GB", help="of a safetensors file (default 5GB)")
    parser.add_argument("--architecture", help="class to export to, e.g. Jais2ForCausalLM (default: the first that fits)")
    parser.add_argument("--tokenizer", type=Path, help="default: the one recorded in the checkpoint")
    parser.add_argument("--no-tokenizer", action="store_true", help="write the model without a tokenizer")
    parser.add_argument("--verify", action="store_true", help="reload with transformers; compare fp32 logits and ids")
    parser.add_argument("--device", default="cpu", help="where --verify computes (default cpu)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Export, and verify if asked; returns 1 if the difference is above the tolerance."""
    args = _arguments(argv)
    checkpoint = resolve(args.checkpoint)
    metadata = read_metadata(checkpoint)
    config = from_dict(Config, metadata["config"])
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    path = None if args.no_tokenizer else args.tokenizer or tokenizer_path(checkpoint, metadata)
    cls = hf.export(
        config.model, checkpoint_tensors(checkpoint), args.output, dtype=dtype, max_shard_size=args.max_shard_size,
        architecture=args.architecture, tokenizer=path, max_length=config.data.seq_length, training=metadata,
    )  # fmt: skip
    size = sum(file.stat().st_size for file in args.output.iterdir())
    print(f"{args.output}: {cls.architecture}, {size / 1e6:,.1f} MB, {args.dtype}, tokenizer {path or 'none'}")
    if not args.verify:
        return 0
    if path is not None:
        elsewhere = hf.trained_elsewhere(metadata)
        compared = check_tokenizer(path, args.output, config.model.vocab_size, own_bos=elsewhere)
        print(f"tokenizer with transformers: {compared:,} texts have the ids of {'the original' if elsewhere else 'training'}")
    return _verify(args, checkpoint, config.model, dtype)


def _verify(args: argparse.Namespace, checkpoint: Path, config: ModelConfig, dtype: torch.dtype) -> int:
    context = ParallelContext.create(ParallelConfig(), args.device)
    model, _ = load_model(checkpoint, context)
    for _, parameter, row in model.table_parameters():
        if not row.fp32:
            # Rounded as in the file, so that what is compared is the computation.
            local(parameter).copy_(local(parameter).to(dtype))
    tokens = sample_tokens(args.output, config.vocab_size, VERIFY_TOKENS)
    difference = compare(args.output, model, tokens, device=context.device)
    context.close()
    good = difference.relative <= TOLERANCE
    verdict = "equal" if good else f"NOT equal (relative difference above {TOLERANCE:g})"
    print(f"logits against transformers, fp32, {len(tokens)} tokens: largest difference {difference.absolute:.2e} "
          f"(relative {difference.relative:.2e}, at {difference.where}): {verdict}")  # fmt: skip
    return 0 if good else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (hf.HFExportError, CheckpointError, ConfigError, DataError, OSError) as error:
        sys.exit(f"error: {error}")
