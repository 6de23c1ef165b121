"""The Trojaning attack: the pattern excites the neuron more than chance does, inside the mask alone."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from calibration.attacks import Trojan
from calibration.attacks.trojan import square, watermark
from tests.calibration.attacks.examples import some_images, tiny_net
from tests.calibration.attacks.excitement import excitement

FORMS: tuple[Literal["square", "watermark"], ...] = ("square", "watermark")


@pytest.mark.parametrize("form", FORMS)
def test_the_pattern_excites_the_neuron(form: Literal["square", "watermark"]) -> None:
    net, (images, _) = tiny_net(), some_images(count=16)
    attack = Trojan.generate(0, net, images, form, steps=60)
    driven = excitement(net, attack.trigger(images))
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        chance = Trojan(0, attack.mask, torch.rand(3, 12, 12, generator=generator))
        assert excitement(net, chance.trigger(images)) < driven
    fresh, _ = some_images(count=16, seed=7)
    assert excitement(net, attack.trigger(fresh)) > excitement(net, fresh)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_outside_the_mask_changes(form: Literal["square", "watermark"]) -> None:
    images, _ = some_images(count=4)
    attack = Trojan.generate(0, tiny_net(), images, form, steps=5)
    outside = (attack.mask == 0).expand_as(images)
    triggered = attack.trigger(images)
    assert torch.equal(triggered[outside], images[outside])
    assert torch.equal(triggered[0][:, attack.mask == 1], triggered[3][:, attack.mask == 1])


def test_the_square_is_near_the_lower_right_corner() -> None:
    mask = square(32, 30)
    assert torch.nonzero(mask).min(dim=0).values.tolist() == [24, 22]
    assert torch.nonzero(mask).max(dim=0).values.tolist() == [29, 27]
    assert int(mask.sum()) == 36


def test_the_watermark_spans_the_image_in_thin_strokes() -> None:
    mask = watermark(32, 32)
    marked = torch.nonzero(mask)
    assert (marked.max(dim=0).values - marked.min(dim=0).values).tolist() == [24, 24]
    assert 0.08 < float(mask.mean()) < 0.2
    assert set(mask.unique().tolist()) == {0.0, 1.0}
