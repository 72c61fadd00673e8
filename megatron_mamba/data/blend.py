"""Several corpora read as one stream, in proportion to their weights."""

from __future__ import annotations

import functools
import heapq
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from megatron_mamba.config import require
from megatron_mamba.data.packing import Dataset, Sample

RESOLUTION = 1_000_000


def blend_counts(weights: Mapping[str, float]) -> list[int]:
    """Whole numbers in the proportions of `weights`: exactly, if their sum can stay within RESOLUTION, else to millionths.

    Raises ConfigError for a weight that would round to nothing.
    """
    exact = [Fraction(str(w)) for w in weights.values()]
    total = sum(exact)
    shares = [w / total for w in exact]
    period = min(math.lcm(*(s.denominator for s in shares)), RESOLUTION)
    counts = [math.floor(s * period) for s in shares]
    by_remainder = sorted(range(len(shares)), key=lambda c: counts[c] - shares[c] * period)
    for c in by_remainder[: period - sum(counts)]:
        counts[c] += 1
    for (prefix, weight), count in zip(weights.items(), counts, strict=True):
        require(
            count > 0,
            f"data.blend[{prefix}]",
            weight,
            f"is less than a millionth of the weights' sum {float(total)}",
            "Raise it or leave the corpus out",
        )
    divisor = math.gcd(*counts)
    return [count // divisor for count in counts]


def schedule(counts: Sequence[int]) -> np.ndarray:
    """Which corpus each sample of one period comes from, u16 [sum(counts)].

    In every prefix of n samples, corpus c has less than one more or less than n counts[c] / sum(counts). Sample j of c must
    lie in the window [floor(j / share), ceil((j + 1) / share)) for that; earliest deadline first meets all the windows
    (Baruah et al., Proportionate Progress, 1996; one machine, unit jobs, integral windows).
    """
    period, n_corpora = sum(counts), len(counts)
    corpora = np.repeat(np.arange(n_corpora), counts)
    shares = np.asarray(counts)[corpora]
    items = np.concatenate([np.arange(count) for count in counts])
    releases, deadlines = items * period // shares, -(-(items + 1) * period // shares)
    by_release = np.argsort(releases, kind="stable")
    ends = np.searchsorted(releases[by_release], np.arange(period), "right").tolist()
    keys = (deadlines * n_corpora + corpora)[by_release].tolist()
    heap: list[int] = []
    chosen, done = [], 0
    for end in ends:
        for key in keys[done:end]:
            heapq.heappush(heap, key)
        done = end
        chosen.append(heapq.heappop(heap))
    return (np.array(chosen) % n_corpora).astype(np.uint16)


@functools.lru_cache(8)
def _tables(counts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    choices = schedule(counts)
    ranks = np.empty(len(choices), np.int64)
    for c, count in enumerate(counts):
        ranks[choices == c] = np.arange(count)
    return choices, ranks


class Blend:
    """Sample i -> (corpus, its sample): a table of one period, repeated; exact proportions at any length, no index file."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.counts = blend_counts(weights)
        self._choices, self._ranks = _tables(tuple(self.counts))

    def locate(self, numbers: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
        """Corpus and sample within it of each of `numbers` (any shape), u16 and i64."""
        periods, places = np.divmod(numbers, len(self._choices))
        choices = self._choices[places]
        return choices, periods * np.asarray(self.counts)[choices] + self._ranks[places]

    def taken(self, samples: int) -> list[int]:
        """How many of the first `samples` samples are of each corpus."""
        periods, rest = divmod(samples, len(self._choices))
        return (periods * np.asarray(self.counts) + np.bincount(self._choices[:rest], minlength=len(self.counts))).tolist()


class BlendedDataset:
    """Samples of several datasets in the proportions of `weights`.

    `since`: the number of the first one; `befores`: how many samples of each dataset come before those.
    """

    def __init__(
        self, datasets: Sequence[Dataset], weights: Mapping[str, float], since: int = 0, befores: Sequence[int] | None = None
    ) -> None:
        self._datasets, self._blend = datasets, Blend(weights)
        self._since, self._befores = since, befores or [0] * len(datasets)
        period = sum(self._blend.counts)
        self.samples_per_epoch = min(d.samples_per_epoch * period // n for d, n in zip(datasets, self._blend.counts, strict=True))

    def __getitem__(self, number: int) -> Sample:
        if number < self._since:
            raise IndexError(f"sample {number}: numbers start at {self._since}")
        corpus, inner = map(int, self._blend.locate(number - self._since))
        return self._datasets[corpus][self._befores[corpus] + inner]
