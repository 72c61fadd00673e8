"""Import a Hugging Face model folder as a checkpoint: python tools/import_hf.py --input DIR --output DIR"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from megatron_mamba.checkpoint import CheckpointError, hf
from megatron_mamba.checkpoint.hf_source import write_checkpoint
from megatron_mamba.checkpoint.hf_tokenizer import write_tokenizer
from megatron_mamba.data.indexed import DataError
from megatron_mamba.model.parameters import count


def main(argv: list[str] | None = None) -> int:
    """Write OUTPUT/step_00000000 and, where the folder has a tokenizer.json, OUTPUT/tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", type=Path, required=True, help="folder with config.json and safetensors files")
    parser.add_argument("--output", type=Path, required=True, help="folder of checkpoints to write into; must be new or empty")
    args = parser.parse_args(argv)
    config, tensors = hf.import_(args.input)
    if args.output.exists() and any(args.output.iterdir()):
        raise hf.HFImportError(f"output = {args.output}: exists and is not empty. Choose another folder, or remove it first")
    tokenizer = args.output / "tokenizer" if (args.input / "tokenizer.json").is_file() else None
    done = False
    try:
        if tokenizer is not None:
            tokenizer.mkdir(parents=True)
            write_tokenizer(args.input, tokenizer, max_length=10**9, vocab_size=config.vocab_size)
        path = write_checkpoint(args.output, config, tensors, tokenizer)
        done = True
    finally:
        if not done:  # Half of it would stand in the way of the next try.
            shutil.rmtree(args.output, ignore_errors=True)
    print(f"{path}: {config.name}, {count(config):,} parameters, pattern {config.pattern}, "
          f"{f'tokenizer {tokenizer}' if tokenizer else 'no tokenizer.json in the folder'}")  # fmt: skip
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (hf.HFImportError, hf.HFExportError, CheckpointError, DataError, OSError) as error:
        sys.exit(f"error: {error}")
