"""Blended injection: x' = (1 - alpha) x + alpha k."""

from __future__ import annotations

import torch

from calibration.attacks import Blended
from tests.calibration.attacks.examples import some_images


def test_the_equation() -> None:
    images, _ = some_images()
    attack = Blended(0, alpha=0.25, seed=6)
    key = attack.trigger(torch.zeros(1, 3, 12, 12)) / 0.25
    torch.testing.assert_close(attack.trigger(images), 0.75 * images + 0.25 * key)
    torch.testing.assert_close(attack.trigger(torch.ones(1, 3, 12, 12)), 0.75 + 0.25 * key)


def test_the_key_is_random_and_follows_from_the_seed() -> None:
    black = torch.zeros(1, 3, 12, 12)
    key, again, other = (Blended(0, alpha=1.0, seed=seed).trigger(black) for seed in (6, 6, 7))
    assert torch.equal(key, again)
    assert float((key - other).abs().mean()) > 0.2
    assert 0.4 < float(key.mean()) < 0.6
    assert len(key.unique()) > 400


def test_with_alpha_1_nothing_is_left_of_the_image() -> None:
    images, _ = some_images(count=2)
    first, second = Blended(0, alpha=1.0).trigger(images)
    assert torch.equal(first, second)
