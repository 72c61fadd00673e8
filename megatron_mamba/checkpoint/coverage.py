"""Whether the chunks that an index lists are a checkpoint's tensors: each element in one chunk, each chunk in bytes of its own.

What no chunk covers would stay what it was in memory, and nothing else would notice.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence


def are_sizes(values: object) -> bool:
    """Whether `values` is a list of whole numbers from 0 on."""
    return isinstance(values, list | tuple) and all(type(value) is int and value >= 0 for value in values)


def check_cover(shape: Sequence[int], chunks: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
    """Raise ValueError unless `chunks` (offsets, sizes) cover a tensor of `shape` exactly: in its bounds, no hole, no overlap."""
    if not are_sizes(shape):
        raise ValueError(f"{shape!r} is not a shape")
    for offsets, sizes in chunks:
        right = are_sizes(offsets) and are_sizes(sizes) and len(offsets) == len(sizes) == len(shape)
        if not right or any(o + s > n or s == 0 for o, s, n in zip(offsets, sizes, shape, strict=True)):
            raise ValueError(f"the chunk at {offsets} of sizes {sizes} does not lie in its shape {list(shape)}")
    boxes = sorted((list(offsets) or [0], list(sizes) or [1]) for offsets, sizes in chunks)  # A scalar is one row.
    reaching: list[tuple[list[int], list[int]]] = []  # Those before that go on into the rows of the one at hand.
    for box in boxes:
        reaching = [other for other in reaching if other[0][0] + other[1][0] > box[0][0]]
        for other in reaching:
            if all(a < b + t and b < a + s for a, s, b, t in zip(*box, *other, strict=True)):
                raise ValueError(f"the chunks at {other[0]} of sizes {other[1]} and at {box[0]} of sizes {box[1]} overlap")
        reaching.append(box)
    listed, whole = sum(math.prod(sizes) for _, sizes in boxes), math.prod(shape)
    if listed != whole:
        raise ValueError(f"{whole - listed:,} of the {whole:,} elements of its shape {list(shape)} are in no chunk")


def check_apart(spans: Iterable[tuple[str, int, int, str]]) -> None:
    """Raise ValueError if two tensors share bytes. `spans`: file, first byte, byte after the last and tensor."""
    for (file, _, end, name), (next_file, start, _, next_name) in itertools.pairwise(sorted(spans)):
        if file == next_file and start < end:
            raise ValueError(f"tensor {next_name}: shares bytes of file {file} with {name}")
