"""A patch replaces the drawn pixels, with the drawn colours, and no others."""

from __future__ import annotations

import torch

from calibration.attacks import Patch
from tests.calibration.attacks.examples import some_images


def test_pixels_colours_and_dots() -> None:
    images, _ = some_images(3, 4)
    patch = Patch(("0.1", "110"), ((1.0, 0.5, 0.0), (0.25,)), bottom=1, right=2)
    stamped = patch.stamp(images)
    first, second = torch.tensor([1.0, 0.5, 0.0]), torch.tensor([0.25, 0.25, 0.25])
    drawn = {(9, 7): first, (9, 9): second, (10, 7): second, (10, 8): second, (10, 9): first}  # 12 - 1 - 2 = 9, 12 - 2 - 3 = 7
    for (row, column), colour in drawn.items():
        assert bool((stamped[:, :, row, column] == colour).all())
        stamped[:, :, row, column] = images[:, :, row, column]
    assert torch.equal(stamped, images)


def test_a_rectangle_in_the_corner() -> None:
    stamped = Patch.rectangle(2, 3, colour=(0.5,)).stamp(torch.zeros(1, 1, 4, 5))
    assert stamped[0, 0].tolist() == [[0.0] * 5, [0.0] * 5, [0.0, 0.0, 0.5, 0.5, 0.5], [0.0, 0.0, 0.5, 0.5, 0.5]]


def test_a_square_may_fill_the_image() -> None:
    assert bool((Patch.rectangle(3).stamp(torch.zeros(1, 3, 3, 3)) == 1.0).all())


def test_noise_is_made_of_the_eight_corners_of_the_colour_cube() -> None:
    stamped = Patch.noise(6, seed=4, bottom=3, right=2).stamp(torch.full((1, 3, 12, 12), 0.5))
    assert set(stamped[0, :, 3:9, 4:10].unique().tolist()) == {0.0, 1.0}
    assert int((stamped != 0.5).sum()) == 3 * 36
    assert Patch.noise(6, seed=4) == Patch.noise(6, seed=4)
    assert Patch.noise(6, seed=4) != Patch.noise(6, seed=5)
