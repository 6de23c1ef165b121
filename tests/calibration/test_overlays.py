"""Overlays: every class is there, the choice repeats, and the order is a good one."""

from __future__ import annotations

import numpy as np
import torch
from scipy import stats

from calibration.overlays import choose_overlays, order_overlays
from calibration.thresholds import set_threshold


def test_every_class_is_there_and_a_rare_one_is_not_used_up() -> None:
    labels = torch.tensor([0] * 500 + [1] * 20 + [2] * 5)
    for seed in range(20):
        chosen = choose_overlays(labels, 40, torch.Generator().manual_seed(seed))
        counts = torch.bincount(labels[chosen], minlength=3)
        assert len(set(chosen.tolist())) == 40
        assert counts.min() >= 1
        assert counts[2] <= 3  # five would be its even share


def test_what_is_left_keeps_the_bound_for_a_rare_class_that_scores_high() -> None:
    rates = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        labels = torch.from_numpy(np.where(rng.random(1000) < 0.02, 9, rng.integers(0, 9, 1000)))
        scores = rng.normal(size=1000) + 10.0 * (labels.numpy() == 9)
        left = np.ones(1000, dtype=bool)
        left[choose_overlays(labels, 100, torch.Generator().manual_seed(seed)).numpy()] = False
        threshold = set_threshold(scores[left].astype(np.float32), 0.01).value
        rates.append(0.02 * stats.norm.sf(threshold - 10.0) + 0.98 * stats.norm.sf(threshold))
    assert np.mean(rates) <= 0.0115  # 0.018 with even shares per class


def test_fewer_overlays_than_classes_are_of_different_classes() -> None:
    labels = torch.arange(30).repeat(4)
    chosen = choose_overlays(labels, 7, torch.Generator().manual_seed(3))
    assert len(set(labels[chosen].tolist())) == 7


def test_the_same_seed_chooses_the_same() -> None:
    labels = torch.arange(10).repeat(10)
    first, second = (choose_overlays(labels, 20, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second)


def test_order_is_a_permutation_that_passes_the_bound_sooner_than_the_reverse() -> None:
    rng = np.random.default_rng(0)
    table = rng.gamma(0.5, 0.4, size=(200, 30)) * rng.uniform(0.0, 2.0, size=30)
    bound = 2.0
    order = order_overlays(table, bound)
    assert sorted(order.tolist()) == list(range(30))

    def mean_passes(columns: np.ndarray[tuple[int], np.dtype[np.int64]]) -> float:
        over = np.cumsum(table[:, columns], axis=1) > bound
        return float(np.where(over.any(axis=1), over.argmax(axis=1) + 1, 30).mean())

    assert mean_passes(order) < 0.6 * mean_passes(order[::-1])
    assert mean_passes(order) < mean_passes(np.arange(30))


def test_order_picks_complementary_overlays() -> None:
    table = np.array([[3.0, 2.9, 0.0], [0.0, 0.0, 2.0]])  # two overlays for the first image, one for the second
    assert order_overlays(table, 1.5).tolist()[:2] in ([0, 2], [2, 0])


def test_preferred_images_are_taken_first_and_every_class_is_still_there() -> None:
    labels = torch.arange(100) % 4
    preferred = (torch.arange(100) < 40) & (labels != 3)  # none of class 3
    chosen = choose_overlays(labels, 20, torch.Generator().manual_seed(0), preferred)
    assert int(preferred[chosen].sum()) == 19
    assert set(labels[chosen].tolist()) == {0, 1, 2, 3}
    few = choose_overlays(labels, 50, torch.Generator().manual_seed(0), preferred)
    assert bool(preferred[few].sum() == preferred.sum())
    assert len(set(few.tolist())) == 50
