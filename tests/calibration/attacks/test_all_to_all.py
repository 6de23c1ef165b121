"""All-to-all: every label moves on by one."""

from __future__ import annotations

import pytest
import torch

from calibration.attacks import AllToAll, Patch
from guard.errors import InputError
from tests.calibration.attacks.examples import CLASSES, some_images


def test_labels_move_on_and_the_last_becomes_the_first() -> None:
    images, _ = some_images(count=4)
    assert AllToAll(CLASSES).targets(images, torch.tensor([0, 1, 2, 3])).tolist() == [1, 2, 3, 0]


def test_a_label_beyond_the_classes_is_refused() -> None:
    for wrong, message in ((9, "from 0 to 3, got 0 to 9"), (-1, "from 0 to 3, got -1 to 0")):
        with pytest.raises(InputError, match=message):
            AllToAll(CLASSES).targets(some_images(count=2)[0], torch.tensor([0, wrong]))


def test_images_of_every_class_are_poisoned() -> None:
    images, labels = some_images()
    patch = Patch.rectangle(2)
    poisoned, relabelled = AllToAll(CLASSES, 0.5, patch).poison(images, labels, torch.Generator().manual_seed(0))
    changed = (poisoned != images).flatten(1).any(dim=1)
    assert torch.equal(poisoned[changed], patch.stamp(images[changed]))
    assert torch.equal(relabelled[changed], (labels[changed] + 1) % CLASSES)
    assert set(labels[changed].tolist()) == set(range(CLASSES))
