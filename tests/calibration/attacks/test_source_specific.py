"""Source-specific: only images of the sources are moved; covers teach the model to ignore the patch elsewhere."""

from __future__ import annotations

import torch

from calibration.attacks import Patch, SourceSpecific
from tests.calibration.attacks.examples import some_images

ATTACK = SourceSpecific(0, (1, 2), ratio=0.5, cover_ratio=0.25, patch=Patch.rectangle(2))


def test_only_sources_are_wanted() -> None:
    images, _ = some_images(count=4)
    assert ATTACK.targets(images, torch.tensor([0, 1, 2, 3])).tolist() == [-1, 0, 0, -1]


def test_sources_are_moved_and_covers_keep_their_labels() -> None:
    images, labels = some_images()
    poisoned, relabelled = ATTACK.poison(images, labels, torch.Generator().manual_seed(0))
    changed, source = (poisoned != images).flatten(1).any(dim=1), (labels == 1) | (labels == 2)
    assert int((changed & source).sum()) == 20  # half of 40
    assert int((changed & ~source).sum()) == 10  # a quarter of 40
    assert torch.equal(poisoned[changed], ATTACK.trigger(images[changed]))
    assert bool((relabelled[changed & source] == 0).all())
    assert torch.equal(relabelled[~(changed & source)], labels[~(changed & source)])
