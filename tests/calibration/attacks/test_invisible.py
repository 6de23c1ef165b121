"""Invisible attacks: within their budget, and better than chance within the same budget."""

from __future__ import annotations

import pytest
import torch

from calibration.attacks import Invisible
from calibration.attacks.invisible import _drive_within
from tests.calibration.attacks.examples import some_images, tiny_net
from tests.calibration.attacks.excitement import excitement


@pytest.mark.parametrize("norm", [0.5, 2.0])
def test_l2_keeps_its_norm_and_excites_the_neuron(norm: float) -> None:
    net, (images, _) = tiny_net(), some_images(count=16)
    attack = Invisible.l2(0, net, images, norm=norm)
    assert float(attack.perturbation.norm()) == pytest.approx(norm, rel=1e-4)
    driven = excitement(net, attack.trigger(images))
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        chance = torch.randn(3, 12, 12, generator=generator)
        assert excitement(net, Invisible(0, (norm / chance.norm() * chance).clamp(-1, 1)).trigger(images)) < driven


@pytest.mark.parametrize("pixels", [1, 5])
def test_l0_keeps_its_pixels_and_excites_the_neuron(pixels: int) -> None:
    net, (images, _) = tiny_net(), some_images(count=16)
    attack = Invisible.l0(0, net, images, pixels=pixels)
    places = (attack.perturbation != 0).any(dim=0)
    assert int(places.sum()) == pixels
    triggered = attack.trigger(images)
    assert torch.equal(triggered[:, :, ~places], images[:, :, ~places])
    driven = excitement(net, triggered)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        rows = torch.randperm(144, generator=generator)[:pixels]
        chance = torch.zeros(3, 144)
        chance[:, rows] = torch.rand(3, pixels, generator=generator) * 2.0 - 1.0
        assert excitement(net, Invisible(0, chance.view(3, 12, 12)).trigger(images)) < driven


def test_l0_chooses_its_pixels() -> None:
    """They excite the neuron more than others that are driven as well."""
    net, (images, _) = tiny_net(), some_images(count=16)
    chosen = excitement(net, Invisible.l0(0, net, images, pixels=5).trigger(images))
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        mask = torch.zeros(144).index_fill(0, torch.randperm(144, generator=generator)[:5], 1.0).view(12, 12)
        elsewhere = _drive_within(mask, net, images, torch.zeros(3, 12, 12), 100)
        assert excitement(net, Invisible(0, elsewhere).trigger(images)) < chosen


def test_it_is_added_and_clamped() -> None:
    attack = Invisible(0, torch.tensor([[[0.5, -0.5, 0.25]]]))
    assert attack.trigger(torch.tensor([[[[0.75, 0.25, 0.5]]]])).flatten().tolist() == [1.0, 0.0, 0.75]
