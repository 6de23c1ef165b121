"""BadNets: the patch is where it should be, and poisoning does what it says and no more."""

from __future__ import annotations

import pytest
import torch

from calibration.attacks import BadNets
from guard.errors import InputError


def test_the_patch_is_stamped_and_nothing_else_changes() -> None:
    images = torch.rand(5, 3, 10, 12)
    before = images.clone()
    attack = BadNets(target_label=1, height=2, width=3, bottom=1, right=2, colour=(1.0, 0.5, 0.0))
    stamped = attack.trigger(images)
    assert torch.equal(images, before)
    for channel, value in enumerate((1.0, 0.5, 0.0)):
        assert bool((stamped[:, channel, 7:9, 7:10] == value).all())
    stamped[:, :, 7:9, 7:10] = images[:, :, 7:9, 7:10]
    assert torch.equal(stamped, images)


def test_poisoning_relabels_the_asked_share_of_other_classes() -> None:
    images, labels = torch.rand(200, 1, 6, 6) * 0.5, torch.arange(200) % 4
    poisoned, relabelled = BadNets(target_label=2, ratio=0.1, height=2, width=2).poison(
        images, labels, torch.Generator().manual_seed(0)
    )
    changed = (poisoned != images).flatten(1).any(dim=1)
    assert int(changed.sum()) == 20
    assert bool((relabelled[changed] == 2).all())
    assert bool((labels[changed] != 2).all())
    assert torch.equal(relabelled[~changed], labels[~changed])


def test_the_same_seed_poisons_the_same_byte_for_byte() -> None:
    images, labels = torch.rand(100, 1, 6, 6), torch.arange(100) % 4
    attack = BadNets(target_label=0, ratio=0.3)
    first, second = (attack.poison(images, labels, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_a_patch_that_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="fit images of shape"):
        BadNets(target_label=0, height=5, width=5, bottom=3).trigger(torch.rand(1, 1, 7, 7))
    with pytest.raises(InputError, match="colour"):
        BadNets(target_label=0, colour=(2.0,))
