"""SIG: v(j) = delta sin(2 pi j f / W) on every row."""

from __future__ import annotations

import math

import pytest
import torch

from calibration.attacks import Sig
from tests.calibration.attacks.examples import some_images


def test_a_row_is_the_sinusoid() -> None:
    grey = torch.full((1, 3, 12, 12), 0.5)
    row = Sig(0, delta=0.25, frequency=1).trigger(grey)[0, 1, 7]
    half = math.sqrt(3.0) / 2.0  # sin 60 degrees
    by_hand = [0.0, 0.5, half, 1.0, half, 0.5, 0.0, -0.5, -half, -1.0, -half, -0.5]
    assert row.tolist() == pytest.approx([0.5 + 0.25 * value for value in by_hand], abs=1e-6)
    whole = Sig(0, delta=0.25, frequency=1).trigger(grey)
    assert bool((whole == row).all())


def test_pixels_stay_in_range() -> None:
    white = Sig(0, delta=0.25, frequency=1).trigger(torch.ones(1, 1, 12, 12))[0, 0, 0]
    assert white[:7].tolist() == [1.0] * 7
    assert float(white[9]) == pytest.approx(0.75)


def test_the_paper_stamps_the_target_class_and_keeps_its_labels() -> None:
    images, labels = some_images()
    poisoned, relabelled = Sig(2, 0.5, frequency=2).poison(images, labels, torch.Generator().manual_seed(0))
    changed = (poisoned != images).flatten(1).any(dim=1)
    assert int(changed.sum()) == 10
    assert bool((labels[changed] == 2).all())
    assert torch.equal(relabelled, labels)


def test_relabelling_stamps_other_classes() -> None:
    images, labels = some_images()
    attack = Sig(2, 0.25, frequency=2, relabel=True)
    poisoned, relabelled = attack.poison(images, labels, torch.Generator().manual_seed(0))
    changed = (poisoned != images).flatten(1).any(dim=1)
    assert int(changed.sum()) == 20
    assert not bool((labels[changed] == 2).any())
    assert bool((relabelled[changed] == 2).all())
