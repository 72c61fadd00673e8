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
    left, right = health._factors(4096)
    assert (left[:64].double() @ right.double()).abs().max() <= 256


def test_slow_ranks_are_named() -> None:
    readings = [GOOD, replace(GOOD, host="b", tflops=500.0), GOOD, replace(GOOD, host="c", link_gbps=39.0), GOOD]
    assert health.slow(readings) == [
        "rank 1 on b: 500 TFLOP/s in a bf16 matrix product, the median is 700",
        "rank 3 on c: 39 GB/s to the next rank, the median is 50",
    ]
    assert health.summary(readings)["tflops"] == {"min": 500.0, "median": 700.0, "max": 700.0}


def test_wrong_ranks_are_named() -> None:
    assert health.wrong([GOOD, replace(GOOD, host="b", correct=False)]) == ["rank 1 on b"]
