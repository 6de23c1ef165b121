"""Thresholds: the bound holds, ties don't break it, and too few images are an error that says how many would do."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from calibration.thresholds import needed_images, rank, set_threshold
from guard.errors import CalibrationError, TooFewImagesError


def draws(count: int, seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=count).astype(np.float32)


def test_conformal_rejects_strictly_over_the_kth_largest() -> None:
    scores = np.arange(1, 200, dtype=np.float32)  # n = 199, frr 0.01: k = 2, the second largest is 198
    record = set_threshold(scores, 0.01)
    assert record.rank == 2
    assert (scores >= np.float32(record.value)).sum() == 1
    assert np.float32(record.value) > np.float32(198.0)
    assert np.nextafter(np.float32(record.value), np.float32(-np.inf)) == np.float32(198.0)


def test_conformal_bound_holds_on_average() -> None:
    rates = []
    for seed in range(400):
        record = set_threshold(draws(300, seed), 0.05)
        rates.append(stats.norm.sf(record.value))
    assert np.mean(rates) <= 0.05
    assert np.mean(rates) > 0.04  # and is not idle


def test_ties_do_not_break_the_bound() -> None:
    scores = np.zeros(500, dtype=np.float32)
    scores[:100] = -1.0
    record = set_threshold(scores, 0.01)
    assert not (scores >= np.float32(record.value)).any()


def test_confidence_holds_as_often_as_asked() -> None:
    kept = [stats.norm.sf(set_threshold(draws(1000, seed), 0.02, confidence=0.9).value) <= 0.02 for seed in range(300)]
    assert np.mean(kept) >= 0.86  # 0.9 less three standard errors
    assert rank(1000, 0.02, 0.9) < rank(1000, 0.02)


@pytest.mark.parametrize(
    ("frr", "confidence", "needed"), [(0.01, None, 99), (0.05, None, 19), (0.01, 0.95, 299), (0.01, 0.5, 99), (0.07, None, 14)]
)
def test_needed_images_are_enough_and_one_less_is_not(frr: float, confidence: float | None, needed: int) -> None:
    assert needed_images(frr, confidence) == needed
    assert rank(needed, frr, confidence) >= 1
    with pytest.raises(TooFewImagesError, match=f"at least {needed} clean images") as caught:
        set_threshold(draws(needed - 1, 0), frr, confidence=confidence)
    assert (caught.value.needed, caught.value.available) == (needed, needed - 1)


def test_interval_is_the_beta_distributions() -> None:
    record = set_threshold(draws(999, 0), 0.01)
    assert record.rank == 10
    low, high = stats.beta.interval(0.95, 10, 990)
    assert [record.frr_low, record.frr_high] == pytest.approx([low, high])


def test_normal_cuts_at_the_percentile() -> None:
    scores = draws(5000, 1) * 3 + 7
    record = set_threshold(scores, 0.01, "normal")
    assert record.value == pytest.approx(stats.norm.ppf(0.99, scores.mean(), scores.std()), rel=1e-4)
    assert record.frr_low < 0.01 < record.frr_high


@pytest.mark.parametrize("frr", [0.0, 1.0, -0.1, float("nan")])
def test_rates_out_of_range_are_refused(frr: float) -> None:
    with pytest.raises(CalibrationError, match="between 0 and 1"):
        set_threshold(draws(100, 0), frr)


def test_a_normal_fit_of_equal_scores_would_reject_them_all() -> None:
    equal = np.full(50, -0.1, np.float32)
    nearly = np.append(equal, np.nextafter(equal[0], np.float32(0.0)))
    for scores in (equal, nearly):
        with pytest.raises(CalibrationError, match=r"a normal fit needs scores that differ, got 5[01] that hardly do"):
            set_threshold(scores, 0.01, "normal")


def test_confidence_with_normal_is_refused() -> None:
    with pytest.raises(CalibrationError, match="conformal method only"):
        set_threshold(draws(100, 0), 0.01, "normal", confidence=0.9)


def test_scores_that_are_not_finite_are_refused() -> None:
    scores = draws(200, 0)
    scores[3] = np.nan
    with pytest.raises(CalibrationError, match="1 of 200"):
        set_threshold(scores, 0.01)
