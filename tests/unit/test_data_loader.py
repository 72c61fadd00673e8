"""The loader: what a batch holds, and a thread that neither hides errors nor outlives its loader."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from megatron_mamba.data.loader import IGNORE, Loader
from megatron_mamba.data.packing import Sample


class Counting:
    """Sample i holds 10 i, 10 i + 1, ...; a document starts at every multiple of 4."""

    samples_per_epoch = 100

    def __init__(self) -> None:
        self.read: list[int] = []

    def __getitem__(self, number: int) -> Sample:
        if number == 13:
            raise OSError("sample 13 is lost")
        self.read.append(number)
        tokens = np.arange(10 * number, 10 * number + 7)
        return Sample(tokens, (tokens % 4 == 0) | (np.arange(7) == 0))


def test_labels_are_the_inputs_shifted() -> None:
    batches = list(Loader(Counting(), [[0, 2], [5, 1]]))
    assert len(batches) == 2
    assert batches[0].inputs_BS.tolist() == [list(range(6)), list(range(20, 26))]
    assert batches[0].labels_BS.tolist() == [list(range(1, 7)), list(range(21, 27))]
    assert batches[1].inputs_BS[:, 0].tolist() == [50, 10]
    assert batches[0].inputs_BS.dtype == batches[0].labels_BS.dtype == torch.int64
    assert batches[0].document_start_BS is None


def test_document_ends_are_masked_and_starts_passed_on() -> None:
    (batch,) = Loader(Counting(), [[0, 1]], document_reset=True, mask_document_ends=True)
    assert batch.labels_BS.tolist() == [[1, 2, 3, IGNORE, 5, 6], [11, IGNORE, 13, 14, 15, IGNORE]]
    assert batch.document_start_BS is not None
    assert batch.document_start_BS.tolist() == [[i in (0, 4) for i in range(6)], [i in (0, 2) for i in range(6)]]


def test_error_in_the_thread_is_raised_by_next() -> None:
    loader = Loader(Counting(), [[1], [13], [2]])
    assert next(loader).inputs_BS[0, 0] == 10
    with pytest.raises(OSError, match="sample 13 is lost"):
        next(loader)
    assert list(loader) == []
    assert not loader._thread.is_alive()

    def broken() -> Iterator[list[int]]:
        yield [1]
        raise ZeroDivisionError

    with Loader(Counting(), broken()) as loader:
        next(loader)
        with pytest.raises(ZeroDivisionError):
            next(loader)


def test_reads_ahead_but_no_further_than_prefetch() -> None:
    data = Counting()
    loader = Loader(data, ([i] for i in itertools.count(100)), prefetch=3)
    deadline = time.monotonic() + 10
    while len(data.read) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert data.read == [100, 101, 102, 103]  # three waiting, one in the thread's hands
    assert next(loader).inputs_BS[0, 0] == 1000
    before = threading.active_count()
    loader.close()
    assert threading.active_count() == before - 1
    with pytest.raises(StopIteration):
        next(loader)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_arrive_on_the_device() -> None:
    loader = Loader(Counting(), [[i] for i in range(12)], document_reset=True, device="cuda")
    for number, batch in enumerate(loader):
        assert batch.inputs_BS.device.type == "cuda"
        assert batch.document_start_BS is not None
        assert batch.document_start_BS.device.type == "cuda"
        assert batch.labels_BS.tolist() == [list(range(10 * number + 1, 10 * number + 7))]
