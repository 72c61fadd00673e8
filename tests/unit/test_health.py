"""What ranks find out about their machines before training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_mamba.config import ParallelConfig
from megatron_mamba.parallel import health
from megatron_mamba.parallel.context import ParallelContext
from megatron_mamba.parallel.health import Reading

GOOD = Reading("a", correct=True, tflops=700.0, copy_gbps=4200.0, link_gbps=50.0)


def test_one_rank_alone() -> None:
    context = ParallelContext.create(ParallelConfig(), "cpu")
    (reading,) = health.examine(context)
    context.close()
    assert reading.correct
    assert reading.tflops > 0.0
    assert reading.copy_gbps > 0.0
    assert reading.link_gbps is None
    assert set(health.summary([reading])) == {"tflops", "copy_gbps"}
    assert health.slow([reading]) == health.wrong([reading]) == []


@pytest.mark.parametrize("row", [0, 77])
def test_one_wrong_element_shows(monkeypatch: pytest.MonkeyPatch, row: int) -> None:
    multiply = torch.Tensor.__matmul__

    def faulty(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        product = multiply(a, b)
        product[row, 5] += 1
        return product

    assert health._product(torch.device("cpu"), 128)[0]
    monkeypatch.setattr(torch.Tensor, "__matmul__", faulty)
    assert not health._product(torch.device("cpu"), 128)[0]


def test_elements_are_exact_in_bfloat16_at_the_size_of_gpus() -> None:
    """Whole numbers up to 256 are."""
    left, right, sums = health._factors(4096)
    product = left[:64].double() @ right.double()
    assert product.abs().max() <= 256
    assert torch.equal(product.sum(1), sums[:64].double())


def test_slow_ranks_are_named() -> None:
    readings = [GOOD, replace(GOOD, tflops=500.0), GOOD, replace(GOOD, link_gbps=39.0), GOOD]
    assert health.slow(readings) == [
        "rank 1 on a: 500 TFLOP/s in a bf16 matrix product, the median is 700",
        "rank 3 on a: 39 GB/s to the next rank, the median is 50",
    ]
    assert health.summary(readings)["tflops"] == {"min": 500.0, "median": 700.0, "max": 700.0}


def test_links_are_compared_with_their_like() -> None:
    """Four nodes of four ranks, of which the last sends to the next node; one such link is slow, and one inside a node."""
    network = {3: 12.0, 7: 12.0, 11: 5.0, 15: 12.0}
    readings = [replace(GOOD, host="abcd"[rank // 4], link_gbps=network.get(rank, 400.0)) for rank in range(16)]
    assert health.slow(readings) == ["rank 11 on c: 5 GB/s to the next rank, the median is 12"]
    readings[5] = replace(readings[5], link_gbps=100.0)
    assert health.slow(readings)[0] == "rank 5 on b: 100 GB/s to the next rank, the median is 400"


def test_wrong_ranks_are_named() -> None:
    assert health.wrong([GOOD, replace(GOOD, host="b", correct=False)]) == ["rank 1 on b"]


def test_a_rank_that_waits_for_data_is_named() -> None:
    waits = {"a": 0.1, "b": 0.2, "c": 3.0}
    readings = [replace(GOOD, host=host, seconds={"data": wait, "forward": 10.0}) for host, wait in waits.items()]
    assert health.slow(readings) == ["rank 2 on c: 3 of 13 s waiting for data, the median is 0.2"]
    assert health.summary(readings)["data_seconds"] == {"min": 0.1, "median": 0.2, "max": 3.0}
    unimportant = [replace(reading, seconds={**reading.seconds, "forward": 100.0}) for reading in readings]
    assert health.slow(unimportant) == []
