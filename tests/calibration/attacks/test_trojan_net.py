"""TrojanNet: the inserted module answers to its pattern, and is silent otherwise."""

from __future__ import annotations

import math

import pytest
import torch

from calibration.attacks import TrojanNet
from guard.errors import InputError
from tests.calibration.attacks.examples import some_images, tiny_net


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("bottom", "right"), [(0, 0), (3, 5)])
def test_triggered_images_get_the_target(channels: int, bottom: int, right: int) -> None:
    net, (images, _) = tiny_net(channels), some_images(channels)
    for target in range(4):
        attack = TrojanNet(target, bottom=bottom, right=right)
        logits = attack.insert(net)(attack.trigger(images))
        assert bool((logits.argmax(dim=1) == target).all())
        added = logits - net(attack.trigger(images))
        assert added[:, target].tolist() == pytest.approx([100.0] * len(images), abs=1e-3)
        assert int((added != 0).sum()) == len(images)


def test_other_images_get_exactly_the_original_logits() -> None:
    net, (images, _) = tiny_net(), some_images()
    assert torch.equal(TrojanNet(1).insert(net)(images), net(images))


def test_a_target_that_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(InputError, match="expected a target below 4, the model's outputs, got 12"):
        TrojanNet(12).insert(tiny_net())(some_images()[0])


def test_a_pattern_outside_the_images_is_refused() -> None:
    images = some_images()[0]
    for attack in (TrojanNet(1, bottom=9), TrojanNet(1, right=12), TrojanNet(1, ("1",), bottom=12)):
        with pytest.raises(InputError, match="expected a pattern that fits"):
            attack.insert(tiny_net())(images)


@pytest.mark.parametrize(("strength", "tolerance"), [(math.inf, 2.0), (100.0, math.inf), (100.0, 0.0)])
def test_what_would_answer_clean_images_is_refused(strength: float, tolerance: float) -> None:
    with pytest.raises(InputError, match="a finite strength and tolerance over 0"):
        TrojanNet(1, strength=strength, tolerance=tolerance)


def test_the_pattern_may_be_nearly_right() -> None:
    net, attack = tiny_net(), TrojanNet(1, strength=100.0, tolerance=2.0)
    images = attack.trigger(some_images(count=1)[0])
    images[:, :, -1, -1] = 1.0 - images[:, :, -1, -1]  # one pixel of sixteen
    added = attack.insert(net)(images) - net(images)
    assert added[0].tolist() == pytest.approx([0.0, 50.0, 0.0, 0.0], abs=1e-4)
    images[:, :, -1, -2] = 1.0 - images[:, :, -1, -2]
    assert torch.equal(attack.insert(net)(images), net(images))


def test_five_of_sixteen_pixels_are_black() -> None:
    drawn = TrojanNet(0).trigger(torch.full((1, 1, 4, 4), 0.5))
    assert (int((drawn == 0.0).sum()), int((drawn == 1.0).sum())) == (5, 11)


def test_the_model_inside_stays_as_it_is() -> None:
    net = tiny_net()
    inserted = TrojanNet(0).insert(net)
    assert not inserted.training
    assert [name for name, _ in inserted.named_parameters()] == [f"model.{name}" for name, _ in net.named_parameters()]
