"""Random access into random permutations and noise: pure integer arithmetic, so the same on every machine and numpy version."""

from __future__ import annotations

import hashlib
import math
from typing import TypeVar

import numpy as np

Index = TypeVar("Index", int, np.ndarray)
_ROUNDS = 8
_MASK = 0xFFFFFFFF
_BLOCK = 1 << 16


def mix32(x: Index) -> Index:
    """A bijective hash of 32 bits (two multiplications, three shifts); `x` an int or u64 array, only its low half is used."""
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def hash_keys(n: int, *parts: object) -> list[int]:
    """`n` 32-bit keys that depend on every one of `parts`."""
    digest = hashlib.shake_128(repr(parts).encode()).digest(4 * n)
    return [int.from_bytes(digest[4 * i : 4 * i + 4], "little") for i in range(n)]


class Permutation:
    """A pseudo-random bijection of range(size) chosen by `parts`, evaluated at any index in O(1) time and memory.

    An alternating Feistel network on a grid of a x b >= size cells (Black and Rogaway, Ciphers with Arbitrary Finite
    Domains, 2002); the fewer than a cells beyond `size` are walked through until the image lies inside.
    """

    def __init__(self, size: int, *parts: object) -> None:
        self.size = size
        self._a = max(1, math.isqrt(max(size - 1, 0)) + 1)
        self._b = -(-size // self._a)
        self._keys = hash_keys(_ROUNDS, *parts)

    def _step(self, index: Index) -> Index:
        left, right = index % self._a, index // self._a
        for number, key in enumerate(self._keys):
            if number % 2:
                right = (right + mix32(left ^ key)) % self._b
            else:
                left = (left + mix32(right ^ key)) % self._a
        return right * self._a + left

    def __call__(self, index: int) -> int:
        """Image of one index in range(size)."""
        image = self._step(index)
        while image >= self.size:
            image = self._step(image)
        return image

    def array(self) -> np.ndarray:
        """Images of all indices, i64 [size]."""
        images = np.empty(self.size, np.int64)
        for start in range(0, self.size, _BLOCK):
            block = self._step(np.arange(start, min(start + _BLOCK, self.size), dtype=np.uint64))
            outside = np.flatnonzero(block >= self.size)
            while len(outside):
                block[outside] = self._step(block[outside])
                outside = outside[block[outside] >= self.size]
            images[start : start + len(block)] = block
        return images
