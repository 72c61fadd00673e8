"""Tokenise text into PREFIX.bin and PREFIX.idx (Megatron-LM's indexed format).

    python tools/prepare_data.py --input FILES --tokenizer MODEL --output PREFIX --workers N

A text file is a document; a line of a file of JSON lines (.jsonl, .ndjson, .json, also with .zst) is one. An interrupted command,
repeated, goes on.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from megatron_mamba.data.indexed import DataError
from megatron_mamba.data.inputs import TEXT_GLOBS
from megatron_mamba.data.prepare import prepare
from megatron_mamba.data.sources import MAX_LINE_BYTES


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process'); returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="text, JSON lines, these also with .zst; folders")
    parser.add_argument("--tokenizer", required=True, help="SentencePiece .model, tokenizer.json, or a folder with either")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="writes PREFIX.bin, .idx, .json and PREFIX.tokenizer")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    parser.add_argument("--glob", nargs="+", default=TEXT_GLOBS, help="what to take from folders (default: text and source files)")
    parser.add_argument("--json-key", default="text", help="key of the text in a line of JSON (default: text)")
    parser.add_argument("--skip-bad", action="store_true", help="count and leave out invalid lines and files instead of stopping")
    parser.add_argument("--overwrite", action="store_true", help="replace a PREFIX made from other inputs or options")
    parser.add_argument("--max-line-bytes", type=int, default=MAX_LINE_BYTES, help="longest line of JSON (default: 256 MiB)")
    args = parser.parse_args(argv)
    if args.max_line_bytes < 1:
        parser.error(f"--max-line-bytes {args.max_line_bytes}: must be at least 1")
    if args.workers < 1:
        parser.error(f"--workers {args.workers}: must be at least 1")
    try:
        done = prepare(
            args.input, args.tokenizer, args.output, workers=args.workers, globs=args.glob, json_key=args.json_key,
            skip_bad=args.skip_bad, overwrite=args.overwrite, max_line_bytes=args.max_line_bytes,
        )  # fmt: skip
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    left_out = f", {done.skipped:,} bad left out" if done.skipped else ""
    print(f"{args.output}: {done.documents:,} documents, {done.tokens:,} tokens{left_out}; vocabulary {done.vocab_size:,}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
