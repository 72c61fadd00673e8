"""Random tokens with something to learn: data.kind=synthetic, for benchmarks and tests."""

from __future__ import annotations

import math

import numpy as np

from megatron_mamba.data.packing import Sample
from megatron_mamba.data.permutation import Permutation, hash_keys, mix32

NOISE = 1 / 8
"""Share of tokens drawn at random; every other token follows from the one before it."""
DOCUMENT = 1 / 512
"""Chance that a token begins a document (always a random token)."""
_ALPHABET = 4096


class SyntheticDataset:
    """A noisy order-1 Markov chain: with probability 1 - NOISE a token is a fixed bijection of its predecessor.

    Tokens lie below min(vocab_size, 4096). Sample i is a pure function of (seed, split, i); the chain is the same in all splits.
    """

    samples_per_epoch = 1 << 40

    def __init__(self, *, vocab_size: int, seq_length: int, seed: int, split: str) -> None:
        self._length, self._seed, self._split = seq_length, seed, split
        self.n_tokens = min(vocab_size, _ALPHABET)
        self._names = Permutation(self.n_tokens, seed, "names").array()

    @property
    def entropy(self) -> float:
        """Entropy of a token given the one before it, in nats: the least loss that any model can reach."""
        other = NOISE / self.n_tokens
        stay = 1 - NOISE + other
        return -stay * math.log(stay) - (self.n_tokens - 1) * other * math.log(other)

    def __getitem__(self, number: int) -> Sample:
        if number < 0:
            raise IndexError(f"sample {number}: numbers start at 0")
        noise_key, value_key = hash_keys(2, self._seed, self._split, number)
        positions = np.arange(self._length + 1, dtype=np.uint64)
        draw = mix32(positions ^ noise_key) / 2**32
        draw[0] = 0.0
        last_random = np.maximum.accumulate(np.where(draw < NOISE, positions, 0))
        state = mix32(last_random ^ value_key) + positions - last_random
        return Sample(self._names[state % self.n_tokens], draw < DOCUMENT)
