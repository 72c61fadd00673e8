"""What tells a corpus from another: a digest of what it holds, whatever it is called and wherever it lies."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import xxhash

from megatron_mamba.data.indexed import IndexedReader

BLOCKS = 64
BLOCK_BYTES = 1 << 16
_DOCUMENTS_AT_ONCE = 1 << 20
_THREADS = 8


def fingerprints(readers: Iterable[IndexedReader]) -> dict[str, str]:
    """The fingerprint of each corpus by its prefix; several are read at a time, as a blend may have hundreds on a slow disk."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(pool.map(lambda reader: (reader.prefix, fingerprint(reader)), readers))


def fingerprint(reader: IndexedReader) -> str:
    """xxh3_128 of the token type, of where each document starts, and of `BLOCKS` blocks of tokens, evenly spread.

    A run takes it at every start, on one rank, so it cannot read terabytes: of PREFIX.bin it reads 4 MiB at most, of PREFIX.idx
    16 bytes a document. Names, sizes and times of files have no part in it, and it needs no record beside the corpus:
    Megatron-LM's own corpora have fingerprints too, and a copy has that of its original.

    What it can miss: tokens replaced by equally many others between the blocks, with every document as long as before.
    Other text, another tokenizer, documents added, left out or put in another order give other starts.
    """
    digest = xxhash.xxh3_128(f"{reader.dtype.str} {reader.n_documents} {reader.n_tokens}".encode())
    for first in range(0, reader.n_documents, _DOCUMENTS_AT_ONCE):
        digest.update(reader.starts_of(slice(first, first + _DOCUMENTS_AT_ONCE)).astype("<i8").tobytes())
    length = max(1, min(BLOCK_BYTES // reader.dtype.itemsize, reader.n_tokens))
    blocks = min(BLOCKS, -(-reader.n_tokens // length))
    for number in range(blocks):
        begin = (reader.n_tokens - length) * number // max(blocks - 1, 1)
        digest.update(reader.read(begin, begin + length).tobytes())
    return digest.hexdigest()
