"""Import a Hugging Face model folder as a checkpoint: python tools/import_hf.py --input DIR --output DIR"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_mamba.checkpoint import CheckpointError, hf
from megatron_mamba.checkpoint.hf_source import write_checkpoint
from megatron_mamba.data.indexed import DataError
from megatron_mamba.data.tokenizer import has_tokenizer, load_tokenizer, save_tokenizer
from megatron_mamba.model.parameters import count


def main(argv: list[str] | None = None) -> int:
    """Write OUTPUT/step_00000000 and, where the folder has a tokenizer, OUTPUT/tokenizer; all of it or nothing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", type=Path, required=True, help="folder with config.json and safetensors files")
    parser.add_argument("--output", type=Path, required=True, help="folder of checkpoints to write into; must be new or empty")
    parser.add_argument("--no-tokenizer", action="store_true", help="import the model without its tokenizer")
    args = parser.parse_args(argv)
    config, tensors = hf.import_(args.input)
    tokenizer = None if args.no_tokenizer else _tokenizer(args.input, config.vocab_size)
    with hf.new_folder(args.output) as folder:
        copy = None if tokenizer is None else save_tokenizer(tokenizer, folder / "tokenizer")
        path = args.output / write_checkpoint(folder, config, tensors, copy).name
    print(f"{path}: {config.name}, {count(config):,} parameters, pattern {config.pattern}, "
          f"{f'tokenizer {tokenizer.name}' if tokenizer else 'no tokenizer'}")  # fmt: skip
    return 0


def _tokenizer(folder: Path, vocab_size: int) -> Path | None:
    """The folder's tokenizer file, once it is known to be one that the model can be used with."""
    if not has_tokenizer(folder):
        return None
    try:
        tokenizer = load_tokenizer(folder)
    except DataError as error:
        raise hf.HFImportError(f"{error}. --no-tokenizer imports the model alone") from error
    if tokenizer.vocab_size > vocab_size:
        raise hf.HFImportError(f"tokenizer = {tokenizer.path}: has {tokenizer.vocab_size} ids, but the model has vocab_size = "
                               f"{vocab_size}. --no-tokenizer imports the model alone")  # fmt: skip
    return tokenizer.path


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (hf.HFImportError, hf.HFExportError, CheckpointError, DataError, OSError) as error:
        sys.exit(f"error: {error}")
