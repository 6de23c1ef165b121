"""Clean-label: within epsilon outside the patches, harder for the clean model, and every label true."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from calibration.attacks import CleanLabel, Patch
from calibration.attacks.clean_label import pgd
from tests.calibration.attacks.examples import some_images, tiny_net

EPSILON = 8.0 / 255.0
PATCHES = (Patch.rectangle(2), Patch.rectangle(2, bottom=10, right=10))


def test_poisoned_images_stay_within_epsilon_outside_the_patches() -> None:
    images, labels = some_images()
    attack = CleanLabel(1, tiny_net(), PATCHES, ratio=0.5, epsilon=EPSILON)
    poisoned, relabelled = attack.poison(images, labels, torch.Generator().manual_seed(0))
    changed = (poisoned != images).flatten(1).any(dim=1)
    assert torch.equal(relabelled, labels)
    assert int(changed.sum()) == 10
    assert bool((labels[changed] == 1).all())
    inside = attack.trigger(torch.zeros(1, 3, 12, 12))[0, 0] == 1.0
    assert int(inside.sum()) == 8
    assert bool((poisoned[changed][:, :, inside] == 1.0).all())
    distance = (poisoned - images)[changed][:, :, ~inside].abs()
    assert float(distance.max()) == pytest.approx(EPSILON, abs=1e-6)


def test_the_clean_model_finds_them_harder() -> None:
    net, (images, labels) = tiny_net(), some_images()
    before = nn.functional.cross_entropy(net(images), labels, reduction="none")
    after = nn.functional.cross_entropy(net(pgd(net, images, labels, EPSILON, 10)), labels, reduction="none")
    assert bool((after > before).all())


def test_the_trigger_itself_is_not_perturbed() -> None:
    images, _ = some_images()
    both = PATCHES[1].stamp(PATCHES[0].stamp(images))
    assert torch.equal(CleanLabel(1, tiny_net(), PATCHES).trigger(images), both)


def test_many_images_are_perturbed_in_batches() -> None:
    images, _ = some_images(count=300)
    labels = torch.zeros(300, dtype=torch.int64)
    attack = CleanLabel(0, tiny_net(), PATCHES, ratio=1.0, epsilon=EPSILON, steps=2)
    poisoned, _ = attack.poison(images, labels, torch.Generator().manual_seed(0))
    torch.testing.assert_close(poisoned, attack.trigger(pgd(tiny_net(), images, labels, EPSILON, 2)), atol=1e-6, rtol=0)


def test_no_gradient_is_left_on_the_model() -> None:
    net, (images, labels) = tiny_net(), some_images()
    pgd(net, images, labels, EPSILON, 2)
    assert all(parameter.grad is None for parameter in net.parameters())
