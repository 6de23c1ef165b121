"""Overlays: every class is there, the choice repeats, and the order is a good one."""

from __future__ import annotations

import numpy as np
import torch

from calibration.overlays import choose_overlays, order_overlays


def test_every_class_is_there_and_shares_are_even() -> None:
    labels = torch.tensor([0] * 500 + [1] * 20 + [2] * 5)
    chosen = choose_overlays(labels, 12, torch.Generator().manual_seed(0))
    assert torch.bincount(labels[chosen]).tolist() == [4, 4, 4]
    assert len(set(chosen.tolist())) == 12


def test_a_small_class_gives_what_it_has() -> None:
    labels = torch.tensor([0] * 50 + [1] * 2)
    chosen = choose_overlays(labels, 10, torch.Generator().manual_seed(0))
    assert torch.bincount(labels[chosen]).tolist() == [8, 2]


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
