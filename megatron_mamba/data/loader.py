"""Samples gathered into batches by a thread that reads ahead."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_mamba.data.packing import Dataset
from megatron_mamba.parallel.vocab import IGNORE


@dataclass(frozen=True)
class Batch:
    """One micro-batch."""

    inputs_BS: torch.Tensor
    """int64"""
    labels_BS: torch.Tensor
    """int64: the token after each input, or IGNORE."""
    document_start_BS: torch.Tensor | None
    """bool: where conv, state and attention begin anew; None: nowhere but at the beginning of each sequence."""

    def pieces(self, rank: int, ranks: int) -> Batch:
        """The contiguous pieces `[B, S / ranks]` of the sequences that context-parallel rank `rank` works on, as views."""
        starts = self.document_start_BS
        inputs, labels = (t.chunk(ranks, dim=1)[rank] for t in (self.inputs_BS, self.labels_BS))
        return Batch(inputs, labels, None if starts is None else starts.chunk(ranks, dim=1)[rank])

    def to(self, device: torch.device | str) -> Batch:
        """The batch on `device`; from pinned memory the copy does not wait."""
        starts = self.document_start_BS
        return Batch(
            self.inputs_BS.to(device, non_blocking=True),
            self.labels_BS.to(device, non_blocking=True),
            None if starts is None else starts.to(device, non_blocking=True),
        )


def collate(dataset: Dataset, numbers: Sequence[int], *, document_reset: bool, mask_document_ends: bool) -> Batch:
    """Batch of the samples `numbers`, on the CPU."""
    samples = [dataset[number] for number in numbers]
    tokens = torch.from_numpy(np.stack([s.tokens for s in samples]))
    starts = torch.from_numpy(np.stack([s.document_start for s in samples]))
    labels = tokens[:, 1:].masked_fill(starts[:, 1:], IGNORE) if mask_document_ends else tokens[:, 1:].contiguous()
    return Batch(tokens[:, :-1].contiguous(), labels, starts[:, :-1].contiguous() if document_reset else None)


class Loader(Iterator[Batch]):
    """Batches of `dataset`, one for each sequence of sample numbers in `index_batches`, on `device`.

    `piece`: context-parallel rank and number of ranks, of which each gets a contiguous part of every sequence.
    A thread keeps `prefetch` batches ready; what goes wrong in it is raised by `next`. :meth:`close` ends it early.
    """

    def __init__(
        self, dataset: Dataset, index_batches: Iterable[Sequence[int]], *, document_reset: bool = False,
        mask_document_ends: bool = False, prefetch: int = 2, device: torch.device | str = "cpu",
        piece: tuple[int, int] = (0, 1),
    ) -> None:  # fmt: skip
        self._device = torch.device(device)
        if self._device.type == "cuda" and self._device.index is None:
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._ready: queue.Queue[Batch | BaseException] = queue.Queue(prefetch)
        self._closed = threading.Event()

        def read() -> None:
            try:
                if self._device.type == "cuda":
                    torch.cuda.set_device(self._device)  # a new thread starts on device 0, where pinning would open a context
                for numbers in index_batches:
                    batch = collate(dataset, numbers, document_reset=document_reset, mask_document_ends=mask_document_ends)
                    batch = batch.pieces(*piece)
                    if not self._put(_pinned(batch) if self._device.type == "cuda" else batch):
                        return
                self._put(StopIteration())
            except BaseException as error:
                self._put(error)

        self._thread = threading.Thread(target=read, name="data-loader", daemon=True)
        self._thread.start()

    def _put(self, item: Batch | BaseException) -> bool:
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __next__(self) -> Batch:
        if self._closed.is_set():
            raise StopIteration
        item = self._ready.get()
        if isinstance(item, BaseException):
            self.close()
            raise item
        return item.to(self._device)

    def close(self) -> None:
        """Stop reading ahead; the loader is at its end."""
        self._closed.set()
        self._thread.join()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _pinned(batch: Batch) -> Batch:
    starts = batch.document_start_BS
    return Batch(batch.inputs_BS.pin_memory(), batch.labels_BS.pin_memory(), None if starts is None else starts.pin_memory())
