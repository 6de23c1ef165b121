"""BadNets: one patch, or one of several, and the label of choice."""

from __future__ import annotations

import torch

from calibration.attacks import BadNets, Patch
from tests.calibration.attacks.examples import some_images

CORNER, OPPOSITE = Patch.rectangle(2), Patch.rectangle(2, bottom=10, right=10)


def test_one_patch_is_stamped_on_every_image() -> None:
    images, _ = some_images()
    assert torch.equal(BadNets(0, patches=(CORNER,)).trigger(images), CORNER.stamp(images))


def test_of_several_patches_each_image_gets_exactly_one() -> None:
    images, _ = some_images()
    triggered = BadNets(0, patches=(CORNER, OPPOSITE)).trigger(images)
    with_first = (triggered == CORNER.stamp(images)).flatten(1).all(dim=1)
    with_second = (triggered == OPPOSITE.stamp(images)).flatten(1).all(dim=1)
    assert bool((with_first ^ with_second).all())
    assert 20 <= int(with_first.sum()) <= 60


def test_which_patch_follows_from_the_sum_of_the_pixels() -> None:
    images = torch.zeros(2, 1, 12, 12)
    images[1, 0, 5, 5] = 3 / 255.0
    triggered = BadNets(0, patches=(CORNER, OPPOSITE)).trigger(images)
    assert (float(triggered[0, 0, 11, 11]), float(triggered[0, 0, 0, 0])) == (1.0, 0.0)
    assert (float(triggered[1, 0, 11, 11]), float(triggered[1, 0, 0, 0])) == (0.0, 1.0)


def test_poisoning_relabels_images_of_other_classes() -> None:
    images, labels = some_images()
    poisoned, relabelled = BadNets(2, 0.1, (CORNER,)).poison(images, labels, torch.Generator().manual_seed(0))
    changed = (poisoned != images).flatten(1).any(dim=1)
    assert int(changed.sum()) == 8
    assert torch.equal(poisoned[changed], CORNER.stamp(images[changed]))
    assert bool((relabelled[changed] == 2).all())
    assert bool((labels[changed] != 2).all())
    assert torch.equal(relabelled[~changed], labels[~changed])


def test_no_more_can_be_poisoned_than_there_are_images_of_other_classes() -> None:
    images, labels = some_images()
    _, relabelled = BadNets(2, 1.0, (CORNER,)).poison(images, labels, torch.Generator().manual_seed(0))
    assert bool((relabelled == 2).all())
