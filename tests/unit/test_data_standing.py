"""What a run remembers of its corpora: what they hold, and how far it has read each."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_mamba.config import ConfigError, DataConfig
from megatron_mamba.data import fingerprint as module
from megatron_mamba.data.blend import Blend
from megatron_mamba.data.fingerprint import fingerprint
from megatron_mamba.data.indexed import IndexedReader, IndexedWriter, bin_path, idx_path
from megatron_mamba.data.standing import Standing


def write(prefix: Path, seed: int = 0, lengths: tuple[int, ...] = (300, 1, 0, 699), sequences: int = 1) -> Path:
    rng = np.random.default_rng(seed)
    with IndexedWriter(prefix, np.uint16) as writer:
        for length in lengths:
            first = length // sequences
            writer.add_document(rng.integers(0, 99, length), [first] * (sequences - 1) + [length - first * (sequences - 1)])
    return prefix


def test_fingerprints_are_of_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 16)
    monkeypatch.setattr(module, "BLOCKS", 20)
    monkeypatch.setattr(module, "_DOCUMENTS_AT_ONCE", 3)
    here = fingerprint(IndexedReader(write(tmp_path / "a")))
    for path in (bin_path, idx_path):  # Another name and other times; no record beside it.
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        shutil.copyfile(path(tmp_path / "a"), path(tmp_path / "elsewhere" / "b"))
    assert fingerprint(IndexedReader(tmp_path / "elsewhere" / "b")) == here
    assert fingerprint(IndexedReader(write(tmp_path / "sequences", sequences=3))) == here
    assert fingerprint(IndexedReader(write(tmp_path / "other", seed=1))) != here
    assert fingerprint(IndexedReader(write(tmp_path / "moved", lengths=(300, 1, 699, 0)))) != here
    for place in (0, 999):  # The first token and the last one.
        tokens = np.fromfile(bin_path(tmp_path / "a"), np.uint16)
        tokens[place] += 1
        tokens.tofile(bin_path(tmp_path / "elsewhere" / "b"))
        assert fingerprint(IndexedReader(tmp_path / "elsewhere" / "b")) != here
    with IndexedWriter(tmp_path / "empty", np.uint16):
        pass
    assert fingerprint(IndexedReader(tmp_path / "empty")) != here


def standing(blend: dict[str, float], contents: dict[str, str] | None = None, **settings) -> Standing:
    """A run's own; a corpus holds what its name says unless `contents` says something else."""
    found = Standing.of_config(DataConfig(blend=blend, **settings))
    return found.filled({prefix: prefix for prefix in blend} | (contents or {}))


def saved(of: Standing) -> Standing:
    return Standing.of_checkpoint({"data": of.to_dict()})


def samples(of: Standing, first: int, last: int) -> list[tuple[str, int]]:
    """Which samples of which corpora a run reads."""
    names, befores, blend = list(of.weights), of.befores, Blend(of.weights)
    located = [blend.locate(number - of.since) for number in range(first, last)]
    return [(names[int(corpus)], befores[int(corpus)] + int(inner)) for corpus, inner in located]


def test_a_changed_blend_repeats_and_leaves_out_nothing() -> None:
    """Weights change, b leaves and comes back, c joins: each corpus is read once, from first to last."""
    blends = [
        {"a": 3.0, "b": 1.0}, {"b": 3.0, "a": 1.0}, {"a": 0.5, "c": 0.5}, {"c": 2.0, "b": 1.0, "a": 4.0},
        {"a": 4.0, "b": 1.0, "c": 2.0},
    ]  # fmt: skip
    now, position, seen = standing(blends[0]), 0, []
    for blend, count in zip(blends, (101, 38, 77, 50, 60), strict=True):
        now, _ = saved(now).continued(standing(blend), position, False)
        seen += samples(now, position, position + count)
        position += count
    counts = Counter(corpus for corpus, _ in seen)
    assert sorted(seen) == [(corpus, number) for corpus in "abc" for number in range(counts[corpus])]
    assert now.read(position) == [counts[corpus.prefix] for corpus in now.corpora]
    assert now.since == 101 + 38 + 77, "the last blend is the one before it, in another order"


@pytest.mark.parametrize("blend", [{"c": 1.0, "a": 1.0, "b": 1.0}, {"b": 0.2, "c": 0.2, "a": 0.2}])
def test_order_and_scale_of_weights_change_nothing(blend: dict[str, float]) -> None:
    before = standing({"a": 1.0, "b": 1.0, "c": 1.0})
    after, changes = saved(before).continued(standing(blend), 17, False)
    assert changes == []
    assert samples(after, 17, 90) == samples(before, 17, 90)
    assert (after.since, after.befores) == (before.since, before.befores)


def test_a_moved_corpus_is_the_same_and_copies_are_told_by_their_place() -> None:
    contents = {"a": "x", "b": "x"}
    before = standing({"a": 3.0, "b": 1.0, "c": 1.0}, contents)
    now = standing({"/new/c": 1.0, "b": 1.0, "/new/a": 3.0}, {"b": "x", "/new/a": "x", "/new/c": "c"})
    after, changes = saved(before).continued(now, 17, False)
    assert changes == ["c is now /new/c", "a is now /new/a"]
    assert [(Path(prefix).name, n) for prefix, n in samples(after, 17, 60)] == samples(before, 17, 60)


@pytest.mark.parametrize(
    ("now", "field"),
    [
        (standing({"a": 1.0, "b": 1.0}, seed=5), r"data\.seed = 5: 1234 -> 5"),
        (standing({"a": 1.0, "b": 1.0}, seq_length=8), r"data\.seq_length = 8: 4096 -> 8"),
        (standing({"a": 1.0, "b": 1.0}, split=(8.0, 1.0, 1.0)), r"data\.split = .*969.* -> \[8"),
        (standing({"a": 1.0, "./b": 1.0}, {"./b": "other"}), r"data\.path = './b': .*b -> other"),
    ],
)
def test_what_would_repeat_samples_is_refused_or_begins_anew(now: Standing, field: str) -> None:
    before = standing({"a": 1.0, "b": 1.0})
    with pytest.raises(ConfigError, match=rf"^{field}.*data\.on_change=restart$"):
        saved(before).continued(now, 10, False)
    after, changes = saved(before).continued(now, 10, True)
    assert after.since == 10
    assert after.befores[-1] == 0
    assert any("begins at its first sample" in change for change in changes)
    again, changes = saved(after).continued(now, 15, True)  # The same command, after a stop.
    assert (samples(again, 15, 30), changes) == (samples(after, 15, 30), [])
    # Before it was read nothing is lost; nor where the corpora are all others.
    assert saved(before).continued(now, 0, False)[0].befores == [0, 0]
    others = replace(now, corpora=tuple(replace(c, prefix=f"new {c.prefix}", contents=f"new {c.contents}") for c in now.corpora))
    assert saved(before).continued(others, 10, False)[0].befores == [0, 0]


def test_shares_of_the_split_count_not_their_scale() -> None:
    before, now = standing({"a": 1.0}), standing({"a": 1.0}, split=(0.969, 0.03, 0.001))
    assert saved(before).continued(now, 10, False)[1] == []


def test_a_checkpoint_without_a_standing() -> None:
    """It has the settings of its data: a corpus is known by its name, and one that may be it or not is refused."""
    settings = {"kind": "indexed", "path": None, "blend": {"a": 3.0, "b": 1.0}, "seed": 1234, "seq_length": 4096}
    old = Standing.of_checkpoint({"config": {"data": settings | {"split": [969.0, 30.0, 1.0]}}})
    after, _ = old.continued(standing({"b": 1.0, "a": 3.0}), 10, False)
    assert samples(after, 10, 50) == samples(standing({"a": 3.0, "b": 1.0}), 10, 50)
    assert [corpus.contents for corpus in after.corpora] == ["a", "b"]
    with pytest.raises(ConfigError, match=r"^data\.path = '/new/b': .* samples of b .*moved"):
        old.continued(standing({"a": 3.0, "/new/b": 1.0}), 10, False)
    with pytest.raises(ConfigError, match=r"^data\.seed"):
        old.continued(standing({"b": 1.0, "a": 3.0}, seed=1), 10, False)
