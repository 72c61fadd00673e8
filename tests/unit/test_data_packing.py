"""Packing, splits, permutations and synthetic data: sample i is a pure function of (seed, i)."""

from __future__ import annotations

import errno
import fcntl
import itertools
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_mamba.data import packing
from megatron_mamba.data.fingerprint import fingerprint
from megatron_mamba.data.indexed import DataError, IndexedReader, IndexedWriter, bin_path, build_once, idx_path
from megatron_mamba.data.packing import Dataset, PackedDataset, Share, split_documents
from megatron_mamba.data.permutation import Permutation
from megatron_mamba.data.synthetic import NOISE, SyntheticDataset


def corpus(prefix: Path, lengths: list[int]) -> IndexedReader:
    """Documents of the lengths given; no token occurs twice, so that a token tells its place."""
    with IndexedWriter(prefix, np.int32) as writer:
        first = 0
        for length in lengths:
            writer.add_document(np.arange(first, first + length))
            first += length
    return IndexedReader(prefix)


LENGTHS = [5, 1, 0, 17, 9, 0, 0, 2, 40, 3, 3, 8, 1, 6, 0]


def packed(reader: IndexedReader, documents: range | None = None, **changes) -> PackedDataset:
    options = {"split": "train", "seq_length": 7, "seed": 3, "vocab_size": 10**6, "contents": fingerprint(reader)} | changes
    return PackedDataset(reader, Share.of(reader, documents or range(reader.n_documents)), **options)


def same(a: Dataset, b: Dataset, numbers: list[int]) -> bool:
    pairs = [(a[i], b[i]) for i in numbers]
    return all(np.array_equal(x.tokens, y.tokens) and np.array_equal(x.document_start, y.document_start) for x, y in pairs)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100, 4097, 70000])
def test_permutation_is_a_bijection(size: int) -> None:
    permutation = Permutation(size, "key", 5)
    images = permutation.array()
    assert np.array_equal(np.sort(images), np.arange(size))
    assert [permutation(i) for i in range(0, size, 97)] == images[::97].tolist()


def test_permutation_is_spread_and_fixed_for_good() -> None:
    # These values must never change: runs resume on them.
    assert Permutation(12, 1234, "train", 0).array().tolist() == [8, 9, 0, 11, 4, 7, 3, 1, 2, 6, 10, 5]
    images = np.stack([Permutation(50, "key", n).array() for n in range(2000)])
    counts = np.stack([np.bincount(images[:, place], minlength=50) for place in range(50)])
    assert ((counts - 40) ** 2 / 40).sum() / 49**2 < 1.1  # chi squared over its degrees of freedom, 1 +- 0.03 if uniform
    steps = np.bincount((np.diff(images, axis=1) % 50).ravel(), minlength=50)[1:]
    assert ((steps - 2000) ** 2 / 2000).sum() / 48 < 1.8  # 1 +- 0.2


def slow_epoch(reader: IndexedReader, documents: range, split: str, seed: int, epoch: int) -> tuple[list[int], list[bool]]:
    tokens, starts = [], []
    for place in range(len(documents)):
        document = reader.document(documents[Permutation(len(documents), seed, split, epoch, "documents")(place)])
        tokens += document.tolist()
        starts += [i == 0 for i in range(len(document))]
    return tokens, starts


@pytest.mark.parametrize("seq_length", [1, 7, 30])
@pytest.mark.parametrize("documents", [range(15), range(3, 11)])
def test_samples_equal_a_slow_reference(tmp_path: Path, seq_length: int, documents: range) -> None:
    reader = corpus(tmp_path / "c", LENGTHS)
    dataset = packed(reader, documents, seq_length=seq_length)
    n = dataset.samples_per_epoch
    assert n == (sum(LENGTHS[d] for d in documents) - 1) // seq_length
    for number in range(3 * n):
        epoch, place = divmod(number, n)
        tokens, starts = slow_epoch(reader, documents, "train", 3, epoch)
        begin = Permutation(n, 3, "train", epoch, "samples")(place) * seq_length
        sample = dataset[number]
        assert sample.tokens.dtype == np.int64
        assert sample.tokens.tolist() == tokens[begin : begin + seq_length + 1]
        assert sample.document_start.tolist() == [True, *starts[begin + 1 : begin + seq_length + 1]]


def test_every_token_once_an_epoch_but_for_the_tail(tmp_path: Path) -> None:
    dataset = packed(corpus(tmp_path / "c", LENGTHS))
    n = dataset.samples_per_epoch
    epochs = [[dataset[e * n + i].tokens for i in range(n)] for e in range(4)]
    for samples in epochs:
        inputs = np.concatenate([tokens[:-1] for tokens in samples])
        assert len(set(inputs.tolist())) == len(inputs) == n * 7
        assert sum(LENGTHS) - len(inputs) <= 7
        labels = {int(tokens[-1]) for tokens in samples}
        assert len(labels & {int(tokens[0]) for tokens in samples}) == n - 1
    assert len({np.concatenate(samples).tobytes() for samples in epochs}) == 4


def test_sample_is_pure(tmp_path: Path) -> None:
    """Whatever was read before, by however many ranks, before or after a restart."""
    reader = corpus(tmp_path / "c", LENGTHS)
    whole = packed(reader)
    sequence = [whole[i].tokens.tolist() for i in range(100)]
    backwards = packed(reader)
    assert [backwards[i].tokens.tolist() for i in reversed(range(100))] == sequence[::-1]
    for ranks in (2, 3):
        parts = [packed(IndexedReader(tmp_path / "c")) for _ in range(ranks)]
        assert [parts[i % ranks][i].tokens.tolist() for i in range(100)] == sequence
    assert [packed(reader)[i].tokens.tolist() for i in range(60, 100)] == sequence[60:]
    for other in (packed(reader, seed=4), packed(reader, split="valid")):
        assert [other[i].tokens.tolist() for i in range(100)] != sequence
    with pytest.raises(IndexError):
        whole[-1]


def test_index_on_disk_equals_index_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = corpus(tmp_path / "c", LENGTHS)
    numbers = list(range(2 * packed(reader).samples_per_epoch))
    memory = packed(reader)
    assert same(memory, memory, numbers)
    assert not (tmp_path / "c.cache").exists()
    monkeypatch.setattr(packing, "CACHED_FROM", 0)
    assert same(packed(reader), memory, numbers)
    files = sorted((tmp_path / "c.cache").glob("*.npy"))
    assert len(files) == 2  # one for each epoch
    monkeypatch.setattr(PackedDataset, "_build_index", None)
    assert same(packed(IndexedReader(tmp_path / "c")), memory, numbers)
    for other in ({"seed": 4}, {"split": "valid"}, {"documents": range(2, 15)}):
        with pytest.raises(TypeError):  # another index, so it would be built
            packed(reader, **other)[0]
    monkeypatch.undo()
    monkeypatch.setattr(packing, "CACHED_FROM", 0)
    files[0].write_bytes(files[0].read_bytes()[:-5])
    with pytest.raises(DataError, match=f"{files[0].name}: a damaged index.*Delete it"):
        packed(reader)[0]
    other = corpus(tmp_path / "c", LENGTHS[::-1])
    assert same(packed(other, cache_dir=tmp_path / "x"), packed(other), numbers)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data\.cache_dir"):
        packed(reader, cache_dir=tmp_path / "file")[0]


def test_an_index_is_found_by_contents_not_by_sizes_and_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "CACHED_FROM", 0)

    def stamped(prefix: Path, lengths: list[int]) -> IndexedReader:
        reader = corpus(prefix, lengths)
        for path in (bin_path(prefix), idx_path(prefix)):
            os.utime(path, (1, 1))
        return reader

    folder = {"cache_dir": tmp_path / "cache"}
    first = stamped(tmp_path / "c", LENGTHS)
    packed(first, **folder)[0]
    replaced = stamped(tmp_path / "c", LENGTHS[::-1])
    expected = packed(replaced, cache_dir=tmp_path / "other")
    assert same(packed(replaced, **folder), expected, list(range(20)))
    monkeypatch.setattr(PackedDataset, "_build_index", None)
    moved = corpus(tmp_path / "d", LENGTHS)
    packed(moved, **folder)[0]


def _first_sample(prefix: Path) -> list[int]:
    return packed(IndexedReader(prefix))[0].tokens.tolist()


@pytest.mark.parametrize("locks", [True, False])
def test_processes_that_need_an_index_at_once_build_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool) -> None:
    reader = corpus(tmp_path / "c", [3, 5, 1, 8] * 5000)
    expected = packed(reader)[0].tokens.tolist()
    build = PackedDataset._build_index
    meet = multiprocessing.get_context("fork").Barrier(3)

    def slow(self: PackedDataset, epoch: int) -> np.ndarray:
        with open(tmp_path / "builders", "ab") as file:
            file.write(b".")
        time.sleep(0.5)
        return build(self, epoch)

    def unlockable(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    mapped = packing._mapped

    def at_once(path: Path) -> np.ndarray:
        try:
            return mapped(path)
        except FileNotFoundError:
            meet.wait(60)
            raise

    monkeypatch.setattr(packing, "CACHED_FROM", 0)
    monkeypatch.setattr(packing, "_mapped", at_once)
    monkeypatch.setattr(PackedDataset, "_build_index", slow)
    if not locks:
        monkeypatch.setattr(fcntl, "flock", unlockable)
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert pool.map(_first_sample, [tmp_path / "c"] * 3, chunksize=1) == [expected] * 3
    assert len((tmp_path / "builders").read_bytes()) == (1 if locks else 3)
    assert len(list((tmp_path / "c.cache").glob("*.npy*"))) == 2  # and the file with the lock


def test_an_index_whose_builder_dies_is_built_by_who_waits(tmp_path: Path) -> None:
    index, begun, ended = tmp_path / "index.npy", tmp_path / "begun", tmp_path / "ended"

    def die() -> None:
        begun.touch()
        time.sleep(0.5)
        ended.touch()
        os._exit(1)

    def build() -> None:
        assert ended.exists()
        index.touch()

    process = multiprocessing.get_context("fork").Process(target=build_once, args=(index, die))
    process.start()
    while not begun.exists():
        time.sleep(0.01)
    build_once(index, build)
    assert index.exists()
    process.join()


def test_an_error_of_the_lock_is_not_taken_for_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(packing, "CACHED_FROM", 0)
    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(DataError, match=r"cannot be written .*Input/output error.*data\.cache_dir"):
        packed(corpus(tmp_path / "c", LENGTHS))[0]


@pytest.mark.parametrize("ratios", [(969.0, 30.0, 1.0), (0.5, 0.25, 0.25), (1, 0, 0), (8, 0, 2), (1, 1, 0)])
def test_split_follows_the_ratios_in_file_order(tmp_path: Path, ratios: tuple[float, float, float]) -> None:
    lengths = np.random.default_rng(0).integers(0, 60, 2000).tolist()
    reader = corpus(tmp_path / "c", lengths)
    splits = split_documents(reader, ratios)
    assert [d for share in splits for d in share.documents] == list(range(2000))
    edges = np.cumsum([sum(lengths[d] for d in share.documents) for share in splits])
    assert edges.tolist() == [share.end for share in splits]
    assert np.abs(edges - np.cumsum(ratios) / sum(ratios) * sum(lengths)).max() <= 30  # half the longest document


@pytest.mark.parametrize("lengths", [[400], [0, 400, 0], [399, 1], [100, 0, 300], [40, 350, 10], [0, 1, 199, 199, 1]], ids=str)
@pytest.mark.parametrize("ratios", [(90.0, 8.0, 2.0), (1.0, 1.0, 1.0), (8.0, 0.0, 2.0), (1.0, 0.0, 0.0)])
def test_no_share_is_empty_where_documents_are_few(tmp_path: Path, lengths: list[int], ratios: tuple[float, float, float]) -> None:
    """Documents are cut inside, rather: every token is in one share, in file order, and a sample is what lies there."""
    reader = corpus(tmp_path / "c", lengths)
    splits = split_documents(reader, ratios, least=4)
    assert [share.begin for share in splits] == [0, *(share.end for share in splits[:-1])]
    assert splits[-1].end == 400
    for share, ratio, split in zip(splits, ratios, ("train", "valid", "test"), strict=True):
        if ratio == 0.0:
            assert share.begin == share.end
            continue
        assert share.end - share.begin > 0
        dataset = PackedDataset(reader, share, split=split, seq_length=3, seed=3, vocab_size=10**6, contents="")
        seen = [dataset[i] for i in range(dataset.samples_per_epoch)]
        inputs = np.concatenate([sample.tokens[:-1] for sample in seen])
        assert sorted(inputs.tolist()) == sorted({*inputs.tolist()})
        assert set(inputs.tolist()) <= set(range(share.begin, share.end))
        assert share.end - share.begin - len(inputs) <= 3
        for sample in seen:
            borders = {share.begin, *np.cumsum(lengths).tolist()}
            steps = np.diff(sample.tokens) != 1
            assert set(sample.tokens[1:][steps].tolist()) <= borders
            assert set(sample.tokens[1:][sample.document_start[1:]].tolist()) <= borders


def test_documents_stay_whole_where_no_share_is_empty(tmp_path: Path) -> None:
    """A cut inside is the last resort: what a run has read so far must not change."""
    reader = corpus(tmp_path / "c", [30, 60, 5, 5])
    borders = [share.begin for share in split_documents(reader, (90, 5, 5), least=5)]
    assert borders == [0, 90, 95]


def test_too_small_a_split_is_refused(tmp_path: Path) -> None:
    reader = corpus(tmp_path / "c", LENGTHS)
    with pytest.raises(DataError, match=r"c: the valid split has 2 tokens of 2 documents.* data.seq_length = 7 .*data.split"):
        packed(reader, range(6, 8), split="valid")


def test_ids_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    reader = corpus(tmp_path / "c", LENGTHS)
    assert packed(reader, seq_length=94, vocab_size=95)[0].tokens.max() == 94
    with pytest.raises(DataError, match=r"c\.bin: holds token id 94, but model\.vocab_size = 94"):
        packed(reader, seq_length=94, vocab_size=94)[0]


def test_synthetic_data_is_pure_and_learnable() -> None:
    options = {"vocab_size": 50, "seq_length": 200, "seed": 1}
    data = SyntheticDataset(split="train", **options)
    assert same(data, SyntheticDataset(split="train", **options), [0, 5, 10**9])
    assert not same(data, SyntheticDataset(split="valid", **options), [0])
    assert not np.array_equal(data[0].tokens, data[1].tokens)
    follows: dict[int, list[int]] = {}
    for number in range(300):
        tokens = data[number].tokens.tolist()
        for a, b in itertools.pairwise(tokens):
            follows.setdefault(a, []).append(b)
    assert set(follows) == set(range(50))
    favourites = {a: max(set(b), key=b.count) for a, b in follows.items()}
    assert sorted(favourites.values()) == list(range(50))
    assert all(a != b for a, b in favourites.items())
    hits = np.mean([b == favourites[a] for a, bs in follows.items() for b in bs])
    assert abs(hits - (1 - NOISE + NOISE / 50)) < 0.005
    stay, other = 1 - NOISE + NOISE / 50, NOISE / 50
    assert abs(-hits * np.log(stay) - (1 - hits) * np.log(other) - data.entropy) < 0.02
    starts = np.stack([data[number].document_start for number in range(300)])
    assert starts[:, 0].all()
    assert 0.5 / 512 < starts[:, 1:].mean() < 2 / 512
