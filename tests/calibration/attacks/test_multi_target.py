"""Several infected labels: the label wanted is that of the patch which the image got."""

from __future__ import annotations

import torch

from calibration.attacks import MultiTarget, Patch
from tests.calibration.attacks.examples import some_images

CORNER, OPPOSITE = Patch.rectangle(2), Patch.rectangle(2, bottom=10, right=10)
ATTACK = MultiTarget((0, 2), (CORNER, OPPOSITE), 0.5)


def test_the_target_is_that_of_the_patch() -> None:
    images, labels = some_images()
    triggered, targets = ATTACK.trigger(images), ATTACK.targets(images, labels)
    first = (triggered == CORNER.stamp(images)).flatten(1).all(dim=1)
    second = (triggered == OPPOSITE.stamp(images)).flatten(1).all(dim=1)
    assert bool((first ^ second).all())
    wanted = torch.where(first, 0, 2)
    assert torch.equal(targets, torch.where(wanted == labels, -1, wanted))
    assert set(targets.tolist()) == {-1, 0, 2}


def test_poisoned_images_carry_the_patch_of_their_new_label() -> None:
    images, labels = some_images()
    poisoned, relabelled = ATTACK.poison(images, labels, torch.Generator().manual_seed(0))
    changed = torch.nonzero((poisoned != images).flatten(1).any(dim=1)).squeeze(1)
    assert len(changed) == 40
    for row in changed.tolist():
        patch = {0: CORNER, 2: OPPOSITE}[int(relabelled[row])]
        assert torch.equal(poisoned[row : row + 1], patch.stamp(images[row : row + 1]))
