"""Learning rate and batch size at the corners of their schedules."""

import math
from dataclasses import replace

import pytest

from megatron_mamba.config import BatchRampConfig, ConfigError, OptimConfig, ScheduleConfig, TrainerConfig
from megatron_mamba.optim import global_batch_size, learning_rate

LR, MIN_LR, RUN, SEQ = 4e-3, 1e-3, 1000, 64


def rate(samples: int, **schedule: object) -> float:
    config = OptimConfig(lr=LR, min_lr=MIN_LR, schedule=ScheduleConfig(**schedule))  # type: ignore[arg-type]
    config.validate()
    return learning_rate(config, samples, RUN, SEQ)


@pytest.mark.parametrize("kind", ["cosine", "wsd", "linear", "constant"])
def test_warmup_rises_from_zero_to_the_peak(kind: str) -> None:
    rates = [rate(n, kind=kind, warmup_samples=100) for n in (0, 25, 50, 100)]
    assert rates == [0.0, LR / 4, LR / 2, LR]


@pytest.mark.parametrize("kind", ["cosine", "wsd", "linear", "constant"])
def test_without_warmup_the_first_step_has_the_peak_rate(kind: str) -> None:
    assert rate(0, kind=kind) == LR
    assert rate(0, kind=kind, warmup_samples=0) == LR


def test_cosine_follows_its_closed_form_between_warmup_and_the_end() -> None:
    for n in (100, 101, 325, 550, 775, 999, 1000):
        expected = MIN_LR + (LR - MIN_LR) * (1 + math.cos(math.pi * (n - 100) / 900)) / 2
        assert rate(n, kind="cosine", warmup_samples=100) == pytest.approx(expected, rel=1e-14)
    assert rate(550, kind="cosine", warmup_samples=100) == pytest.approx((LR + MIN_LR) / 2, rel=1e-14)


def test_linear_is_halfway_at_half_time() -> None:
    assert rate(325, kind="linear", warmup_samples=100) == pytest.approx(LR - (LR - MIN_LR) / 4, rel=1e-14)
    assert rate(550, kind="linear", warmup_samples=100) == pytest.approx((LR + MIN_LR) / 2, rel=1e-14)


def test_wsd_is_flat_then_falls_in_a_straight_line() -> None:
    rates = [rate(n, kind="wsd", warmup_samples=100, decay_samples=200) for n in (100, 450, 800, 850, 900, 950, 1000)]
    line = [LR - (LR - MIN_LR) * part for part in (0, 0, 0, 1 / 4, 1 / 2, 3 / 4, 1)]
    assert rates == pytest.approx(line, rel=1e-14)
    assert [rate(n, kind="wsd") for n in (900, 950)] == pytest.approx([LR, (LR + MIN_LR) / 2], rel=1e-14)


@pytest.mark.parametrize("kind", ["cosine", "wsd", "linear"])
def test_end_and_beyond_stay_at_the_least_rate(kind: str) -> None:
    assert [rate(n, kind=kind, warmup_samples=10) for n in (RUN, RUN + 1, 10 * RUN)] == [MIN_LR] * 3


def test_constant_never_falls() -> None:
    assert [rate(n, kind="constant", warmup_samples=10) for n in (10, RUN, 10 * RUN)] == [LR] * 3


def test_a_decay_that_ends_early_or_late_is_respected() -> None:
    assert rate(600, kind="cosine", decay_samples=600) == MIN_LR
    assert rate(601, kind="linear", decay_samples=600) == MIN_LR
    assert rate(RUN, kind="linear", decay_samples=2 * RUN) == pytest.approx((LR + MIN_LR) / 2, rel=1e-14)


@pytest.mark.parametrize("kind", ["cosine", "wsd", "linear"])
def test_tokens_are_samples_times_sequence_length(kind: str) -> None:
    for n in range(0, RUN + 1, 50):
        in_tokens = rate(n, kind=kind, warmup_tokens=100 * SEQ, decay_tokens=300 * SEQ)
        assert in_tokens == rate(n, kind=kind, warmup_samples=100, decay_samples=300)


@pytest.mark.parametrize(
    ("schedule", "field"),
    [
        ({"kind": "cosine", "warmup_samples": 1001}, "optim.schedule.warmup_samples"),
        ({"kind": "constant", "warmup_tokens": 1001 * SEQ}, "optim.schedule.warmup_tokens"),
        ({"kind": "cosine", "warmup_samples": 1000}, "optim.schedule.decay_samples"),
        ({"kind": "linear", "warmup_samples": 500, "decay_tokens": 500 * SEQ}, "optim.schedule.decay_tokens"),
        ({"kind": "wsd", "warmup_samples": 500, "decay_samples": 501}, "optim.schedule.decay_samples"),
        ({"kind": "wsd", "warmup_samples": 901}, "optim.schedule.decay_samples"),
        ({"kind": "constant", "decay_samples": 10}, "optim.schedule.decay_samples"),
    ],
)
def test_lengths_that_do_not_fit_the_run_are_refused(schedule: dict, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        rate(0, **schedule)
    assert caught.value.field == field
    assert caught.value.remedy


def test_batch_ramp_follows_megatrons_rule() -> None:
    trainer = TrainerConfig(train_samples=10**6, global_batch_size=100, batch_ramp=BatchRampConfig(40, 20, 999))
    trainer.validate()
    # Three increments: one for each third of the 999 samples.
    sizes = {0: 40, 332: 40, 333: 60, 665: 60, 666: 80, 998: 80, 999: 100, 10**9: 100}
    assert {n: global_batch_size(trainer, n) for n in sizes} == sizes
    assert global_batch_size(replace(trainer, batch_ramp=None), 0) == 100
    assert global_batch_size(replace(trainer, batch_ramp=BatchRampConfig(100, 20, 999)), 500) == 100
