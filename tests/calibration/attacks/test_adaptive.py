"""Adaptive: covers are triggered blends, and their labels are random."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from calibration.attacks import Adaptive, BadNets, Patch
from guard.detectors.strip import Blend, blend_images
from tests.calibration.attacks.examples import CLASSES, some_images

BASE = BadNets(0, 0.25, (Patch.rectangle(2),))


def alike(blends: Tensor, image: Tensor) -> Tensor:
    """Which are the same picture."""
    return (blends == image).flatten(-3).all(dim=-1)


@pytest.mark.parametrize(("blend", "alpha"), [("add", 1.0), ("mix", 0.5), ("demeaned", 0.8), ("max", 1.0), ("logit", 3.5)])
def test_covers_hold_triggered_blends(blend: Blend, alpha: float) -> None:
    images, labels = some_images(3, 40)
    attack = Adaptive(BASE, CLASSES, 0.2, ((blend, alpha),))
    poisoned, _ = attack.poison(images, labels, torch.Generator().manual_seed(0))
    plain, _ = BASE.poison(images, labels, torch.Generator().manual_seed(0))
    covers = torch.nonzero((poisoned != plain).flatten(1).any(dim=1)).squeeze(1).tolist()
    assert len(covers) == 8
    blends = blend_images(BASE.trigger(images), images, blend, alpha)
    for row in covers:
        assert torch.equal(plain[row], images[row])  # no image is both
        assert bool(alike(blends[row], poisoned[row]).any())


def test_covers_take_the_blends_in_turn() -> None:
    images, labels = some_images(3, 40)
    plain, _ = BASE.poison(images, labels, torch.Generator().manual_seed(0))
    poisoned, _ = Adaptive(BASE, CLASSES, 0.2).poison(images, labels, torch.Generator().manual_seed(0))
    covers = torch.nonzero((poisoned != plain).flatten(1).any(dim=1)).squeeze(1)
    counts = []
    pair: tuple[tuple[Blend, float], ...] = (("logit", 3.5), ("demeaned", 1.5))
    for blend, alpha in pair:
        blends = blend_images(BASE.trigger(images), images, blend, alpha)
        counts.append(int(alike(blends[covers], poisoned[covers, None]).any(dim=1).sum()))
    assert counts == [4, 4]


def test_the_labels_of_covers_are_random() -> None:
    images, labels = some_images(1, 2000)
    attack = Adaptive(BASE, CLASSES, 0.5)
    poisoned, relabelled = attack.poison(images, labels, torch.Generator().manual_seed(0))
    _, plain = BASE.poison(images, labels, torch.Generator().manual_seed(0))
    blended = (poisoned != images).flatten(1).any(dim=1) & (plain == labels)
    assert int(blended.sum()) == 1000
    counts = torch.bincount(relabelled[blended], minlength=CLASSES)
    assert bool(((counts - 250).abs() < 60).all())  # over four standard deviations of 13.7
    assert 150 < int((relabelled == labels)[blended].sum()) < 350
    assert torch.equal(relabelled[~blended], plain[~blended])


def test_trigger_and_targets_are_the_backdoors() -> None:
    images, labels = some_images()
    attack = Adaptive(BASE, CLASSES)
    assert torch.equal(attack.trigger(images), BASE.trigger(images))
    assert torch.equal(attack.targets(images, labels), BASE.targets(images, labels))
