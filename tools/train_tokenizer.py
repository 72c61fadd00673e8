"""Train a lossless SentencePiece BPE tokenizer.

python tools/train_tokenizer.py --input FILES_OR_DIRS --vocab-size N --output MODEL
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron_mamba.data.indexed import DataError
from megatron_mamba.data.inputs import TEXT_GLOBS
from megatron_mamba.data.sources import MAX_LINE_BYTES
from megatron_mamba.data.train_tokenizer import train_tokenizer


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process'); returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="text, JSON lines, these also with .zst; folders")
    parser.add_argument("--vocab-size", type=int, required=True, help="number of ids, special ones and bytes included")
    parser.add_argument("--output", required=True, metavar="MODEL", help="the .model file to write")
    parser.add_argument("--max-bytes", type=int, default=256 << 20, help="text to train on, sampled evenly (default: 256 MiB)")
    parser.add_argument("--character-coverage", type=float, default=0.9995, help="share of characters with a piece of their own")
    parser.add_argument("--glob", nargs="+", default=TEXT_GLOBS, help="what to take from folders (default: text and source files)")
    parser.add_argument("--json-key", default="text", help="key of the text in a line of JSON (default: text)")
    parser.add_argument("--skip-bad", action="store_true", help="leave out invalid lines and files instead of stopping")
    parser.add_argument("--max-line-bytes", type=int, default=MAX_LINE_BYTES, help="longest line of JSON (default: 256 MiB)")
    args = parser.parse_args(argv)
    if args.max_line_bytes < 1:
        parser.error(f"--max-line-bytes {args.max_line_bytes}: must be at least 1")
    try:
        train_tokenizer(
            args.input, args.vocab_size, args.output, globs=args.glob, json_key=args.json_key, max_bytes=args.max_bytes,
            character_coverage=args.character_coverage, skip_bad=args.skip_bad, max_line_bytes=args.max_line_bytes,
        )  # fmt: skip
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.output}: {args.vocab_size:,} ids")
    return 0


if __name__ == "__main__":
    sys.exit(main())
