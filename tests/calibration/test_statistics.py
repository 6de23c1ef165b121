"""Rates and AUROC: known values, and intervals that do not collapse at the ends."""

from __future__ import annotations

import numpy as np
import pytest

from calibration.statistics import auroc, proportion


def test_exact_interval_of_a_share() -> None:
    estimate = proportion(0, 100)  # the rule of three, exactly: 1 - 0.025**(1/100)
    assert (estimate.value, estimate.low) == (0.0, 0.0)
    assert estimate.high == pytest.approx(1 - 0.025 ** (1 / 100))
    assert proportion(100, 100).low == pytest.approx(0.025 ** (1 / 100))


def test_auroc_is_the_chance_to_score_higher() -> None:
    estimate = auroc(np.array([0.0, 1.0, 2.0]), np.array([1.5, 3.0]))
    assert estimate.value == pytest.approx(5 / 6)
    assert estimate.low < 5 / 6 < estimate.high


def test_auroc_of_one_keeps_an_interval() -> None:
    estimate = auroc(np.arange(50.0), np.arange(100.0, 150.0))
    assert (estimate.value, estimate.high) == (1.0, 1.0)
    assert 0.9 < estimate.low < 1.0


def test_auroc_of_zero_and_chance() -> None:
    assert auroc(np.arange(100.0, 150.0), np.arange(50.0)).low == 0.0
    chance = auroc(np.arange(200.0), np.arange(200.0))
    assert chance.value == pytest.approx(0.5)
    assert chance.high - chance.low == pytest.approx(2 * 0.0565, abs=0.005)  # Hanley and McNeil's 1.96 standard errors


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    truth = 0.7602  # P(X < Y) for Y one standard deviation above X
    covered = []
    for _ in range(300):
        estimate = auroc(rng.normal(size=40), rng.normal(1.0, size=40))
        covered.append(estimate.low <= truth <= estimate.high)
    assert 0.91 <= np.mean(covered) <= 0.99
