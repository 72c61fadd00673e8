"""Blends: exact proportions at any length, every corpus read in its own order."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from megatron_mamba.config import ConfigError
from megatron_mamba.data.blend import Blend, BlendedDataset, schedule
from megatron_mamba.data.synthetic import SyntheticDataset


def deviation(corpora: np.ndarray, shares: np.ndarray) -> float:
    """Largest difference, over all prefixes and corpora, of samples taken from samples due."""
    taken = np.cumsum(corpora[:, None] == np.arange(len(shares)), axis=0)
    return float(np.abs(taken - np.arange(1, len(corpora) + 1)[:, None] * shares).max())


@pytest.mark.parametrize("seed", range(30))
def test_every_prefix_is_within_one_sample(seed: int) -> None:
    rng = random.Random(seed)
    counts = [rng.choice([1, rng.randint(1, 10), rng.randint(1, 300)]) for _ in range(rng.randint(1, 12))]
    order = schedule(counts)
    assert np.bincount(order).tolist() == counts
    assert deviation(order, np.array(counts) / sum(counts)) < 1


WEIGHTS = [{"a": 0.7, "b": 0.15, "c": 0.15}, {"a": 70, "b": 29.5, "c": 0.5}, {"a": 1.0}, {"a": 1, "b": 1, "c": 1}]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_samples_of_each_corpus_come_in_order_without_gaps(weights: dict[str, float]) -> None:
    blend = Blend(weights)
    corpora, inner = blend.locate(np.arange(5000))
    shares = np.array(list(weights.values())) / sum(weights.values())
    assert deviation(corpora, shares) < 1 + 1e-9
    for c in range(len(weights)):
        assert inner[corpora == c].tolist() == list(range(int((corpora == c).sum())))
    shuffled = np.random.default_rng(0).permutation(5000)
    assert all(np.array_equal(a, b[shuffled]) for a, b in zip(blend.locate(shuffled), (corpora, inner), strict=True))
    assert [tuple(map(int, blend.locate(i))) for i in (0, 1, 777)] == [(corpora[i], inner[i]) for i in (0, 1, 777)]


def test_weights_without_a_short_period_hold_to_a_millionth() -> None:
    weights = {"a": math.pi, "b": math.e, "c": 0.001}
    blend = Blend(weights)
    shares = np.array(list(weights.values())) / sum(weights.values())
    assert sum(blend.counts) <= 1_000_000
    assert np.abs(np.array(blend.counts) / sum(blend.counts) - shares).max() <= 1e-6
    corpora, _ = blend.locate(np.arange(300_000))
    assert deviation(corpora, shares) < 1.3
    with pytest.raises(ConfigError, match=r"data\.blend\[b\] = 1e-07.*millionth"):
        Blend({"a": math.pi, "b": 1e-7})


def test_blended_dataset_reads_what_the_blend_says() -> None:
    parts = [SyntheticDataset(vocab_size=99, seq_length=5, seed=seed, split="train") for seed in (1, 2)]
    for part, size in zip(parts, (10, 100), strict=True):
        part.samples_per_epoch = size
    data = BlendedDataset(parts, {"a": 0.25, "b": 0.75})
    assert data.samples_per_epoch == 40  # where the first corpus begins again
    for number in (0, 1, 2, 3, 4, 41, 10**6):
        corpus, inner = Blend({"a": 0.25, "b": 0.75}).locate(number)
        assert np.array_equal(data[number].tokens, parts[int(corpus)][int(inner)].tokens)
    with pytest.raises(IndexError):
        data[-1]
