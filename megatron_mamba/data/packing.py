"""Documents packed into samples of seq_length + 1 tokens, any of which can be read at random.

An epoch is the documents of one split in an order drawn from (seed, split, epoch), end to end; its samples, which overlap
by the one token that is the last one's label, are visited in an order drawn from the same. Sample i of the endless stream
is therefore a pure function of (seed, i). A tail shorter than a sample is left out, a different one each epoch.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from megatron_mamba.data.indexed import DataError, IndexedReader, atomic_write, bin_path, build_once
from megatron_mamba.data.permutation import Permutation

SPLITS = ("train", "valid", "test")
CACHED_FROM = 1 << 17
"""Documents from which an epoch's index is worth a file; below, building it takes milliseconds."""
_EPOCHS_KEPT = 4
_INDEX_VERSION = 1


@dataclass(frozen=True)
class Sample:
    """seq_length + 1 tokens: inputs and, one further, labels."""

    tokens: np.ndarray
    """i64 [seq_length + 1]"""
    document_start: np.ndarray
    """bool [seq_length + 1]: the first tokens of documents; the sample's own first token always counts as one."""


class Dataset(Protocol):
    """An endless stream of samples, each a pure function of its number."""

    samples_per_epoch: int
    """Samples after which a document comes up for the second time."""

    def __getitem__(self, number: int) -> Sample:
        """Sample `number` >= 0."""


@dataclass(frozen=True)
class Share:
    """A part of a corpus: `documents`, and of those the tokens from `begin` to `end`, inside the first and the last of them."""

    documents: range
    begin: int
    end: int

    @classmethod
    def of(cls, reader: IndexedReader, documents: range) -> Share:
        """Whole documents."""
        return cls(documents, reader.start_of(documents.start), reader.start_of(documents.stop))


def split_documents(reader: IndexedReader, ratios: Sequence[float], least: int = 1) -> list[Share]:
    """What train, valid and test have: in file order, cut at the borders of documents nearest to `ratios` of the corpus' tokens.
    Where that would leave one of them fewer than `least` tokens, documents being few or very long, all are cut inside of them."""
    targets = [reader.n_tokens * share / sum(ratios) for share in itertools.accumulate(ratios)]
    cuts = [0]
    for target in targets:
        after = bisect.bisect_left(range(reader.n_documents), target, key=reader.start_of)
        before = max(after - 1, 0)
        nearest = before if target - reader.start_of(before) < reader.start_of(after) - target else after
        cuts.append(max(cuts[-1], nearest))
    cuts[-1] = reader.n_documents
    shares = [Share.of(reader, range(first, last)) for first, last in itertools.pairwise(cuts)]
    if all(share.end - share.begin >= least for share, ratio in zip(shares, ratios, strict=True) if ratio > 0):
        return shares
    tokens = [0, *(round(target) for target in targets)]
    return [_span(reader, begin, end) for begin, end in itertools.pairwise(tokens)]


def _span(reader: IndexedReader, begin: int, end: int) -> Share:
    """Some tokens, and the documents that they are of."""
    if begin == end:
        return Share(range(0), begin, end)
    first = bisect.bisect_right(range(reader.n_documents), begin, key=reader.start_of) - 1
    last = bisect.bisect_left(range(reader.n_documents), end, key=reader.start_of)
    return Share(range(first, last), begin, end)


class PackedDataset:
    """The samples of a share of a corpus.

    `vocab_size`: ids at or above it (a corpus of another tokenizer, or damage) raise :class:`DataError` when read.
    `cache_dir`: where epochs' indices of large corpora are kept; default PREFIX.cache. They are found again by `contents`, the
    corpus' fingerprint.
    """

    def __init__(
        self, reader: IndexedReader, share: Share, *, split: str, seq_length: int, seed: int, vocab_size: int, contents: str,
        cache_dir: str | Path | None = None,
    ) -> None:  # fmt: skip
        self._contents = contents
        self._reader, self._share, self._split, self._seed = reader, share, split, seed
        self._documents = share.documents
        self._length, self._vocab_size = seq_length, vocab_size
        self._cache = Path(cache_dir or f"{reader.prefix}.cache")
        self.n_tokens = share.end - share.begin
        self.samples_per_epoch = (self.n_tokens - 1) // seq_length
        if self.samples_per_epoch < 1:
            raise DataError(
                f"{reader.prefix}: the {split} split has {self.n_tokens} tokens of {len(self._documents)} documents, fewer than "
                f"one sequence of data.seq_length = {seq_length} and its label. Give it a larger share in data.split, or none (0), "
                "lower data.seq_length, or use a larger corpus"
            )
        self._index = functools.lru_cache(_EPOCHS_KEPT)(self._load_index)
        self._order = functools.lru_cache(_EPOCHS_KEPT)(self._sample_order)

    def __getitem__(self, number: int) -> Sample:
        if number < 0:
            raise IndexError(f"sample {number}: numbers start at 0")
        epoch, position = divmod(number, self.samples_per_epoch)
        return self._read(epoch, self._order(epoch)(position) * self._length)

    def _sample_order(self, epoch: int) -> Permutation:
        return Permutation(self.samples_per_epoch, self._seed, self._split, epoch, "samples")

    def _read(self, epoch: int, start: int) -> Sample:
        starts, order = self._index(epoch)
        count = self._length + 1
        first = int(np.searchsorted(starts, start, "right")) - 1
        last = int(np.searchsorted(starts, start + count, "left"))
        places = starts[first : last + 1]
        shifts = np.maximum(self._reader.starts_of(order[first:last]), self._share.begin) - places[:-1]
        edges = np.clip(places, start, start + count)
        spans = zip((edges[:-1] + shifts).tolist(), (edges[1:] + shifts).tolist(), strict=True)
        tokens = np.concatenate([self._reader.read(begin, end) for begin, end in spans], dtype=np.int64, casting="same_kind")
        low, high = int(np.min(tokens)), int(np.max(tokens))
        if low < 0 or high >= self._vocab_size:
            raise DataError(
                f"{bin_path(self._reader.prefix)}: holds token id {low if low < 0 else high}, but model.vocab_size = "
                f"{self._vocab_size}. Set model.vocab_size to the corpus' tokenizer's (above {high}), or use another corpus"
            )
        document_start = np.zeros(count, bool)
        document_start[0] = True
        document_start[places[1:-1] - start] = True
        return Sample(tokens, document_start)

    def _load_index(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions in the epoch at which its documents start, i64 [n + 1], and which documents they are, i64 [n]."""
        if len(self._documents) < CACHED_FROM:
            table = self._build_index(epoch)
        else:
            path = self._cache / f"{self._split}-epoch{epoch}-{self._key(epoch)}.npy"
            try:
                table = _mapped(path)
            except (FileNotFoundError, NotADirectoryError):
                self._store(path, epoch)
                table = _mapped(path)
        return table[0], table[1, :-1]

    def _build_index(self, epoch: int) -> np.ndarray:
        self._reader.check()
        order = Permutation(len(self._documents), self._seed, self._split, epoch, "documents").array()
        edges = self._reader.starts_of(slice(self._documents.start, self._documents.stop + 1))
        edges = edges.clip(self._share.begin, self._share.end)
        table = np.zeros((2, len(order) + 1), np.int64)
        np.cumsum(np.diff(edges)[order], out=table[0, 1:])
        table[1, :-1] = order + self._documents.start
        return table

    def _key(self, epoch: int) -> str:
        whole = self._share == Share.of(self._reader, self._documents)
        share = self._documents if whole else self._share
        parts = (_INDEX_VERSION, self._contents, share, self._seed, self._split, epoch)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]

    def _store(self, path: Path, epoch: int) -> None:
        def build() -> None:
            table = self._build_index(epoch)
            with atomic_write(path) as file:
                np.save(file, table)

        try:
            build_once(path, build)
        except OSError as error:
            raise DataError(
                f"{path}: the sample index cannot be written ({error}). "
                "Set data.cache_dir to a folder with room that every process can write to"
            ) from error


def _mapped(path: Path) -> np.ndarray:
    """The array of a .npy file, memory-mapped; unlike by np.load, which opens it three times, by one open."""
    try:
        with open(path, "rb") as file:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            return np.memmap(file, dtype, "r", file.tell(), shape)
    except ValueError as error:
        raise DataError(f"{path}: a damaged index ({error}). Delete it; it is built again") from error
