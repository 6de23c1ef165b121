from __future__ import annotations

from typing import Any

import pytest
import torch

from guard.errors import InputError
from guard.preprocessors import Flip, RandomShrinkPad, Sat, ShrinkPad
from guard.preprocessors.shrink_pad import place


def extent(image: torch.Tensor) -> tuple[int, int, int, int]:
    """Top, left, height and width of what is not black."""
    rows, columns = torch.nonzero(image.amax(dim=(0, 2)) > 0.25), torch.nonzero(image.amax(dim=(0, 1)) > 0.25)
    top, left = int(rows.min()), int(columns.min())
    return top, left, int(rows.max()) - top + 1, int(columns.max()) - left + 1


def test_shrink_pad_4_leaves_28_of_32_pixels_anywhere() -> None:
    found = [extent(image) for image in ShrinkPad()(torch.ones(200, 1, 32, 32), torch.Generator().manual_seed(0))]
    assert {size for top, left, *sides in found for size in sides} <= {28, 29}  # places are not whole pixels
    assert {top for top, *_ in found} >= {0, 1, 2, 3, 4}
    assert {left for _, left, *_ in found} >= {0, 1, 2, 3, 4}


def test_placing_by_hand() -> None:
    half = torch.full((3,), 0.5, dtype=torch.float64)
    found = place(torch.ones(3, 1, 8, 8), half, half, torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 1.0]], dtype=torch.float64))
    assert [extent(image) for image in found] == [(0, 0, 4, 4), (0, 4, 4, 4), (4, 2, 4, 4)]


def test_random_sizes_lie_between_the_smallest_and_all() -> None:
    sides = [extent(image)[2] for image in RandomShrinkPad()(torch.ones(300, 1, 40, 40), torch.Generator().manual_seed(0))]
    assert min(sides) >= 32
    assert max(sides) == 40
    assert len(set(sides)) >= 8


def test_flip_is_the_mirror_image_and_undoes_itself() -> None:
    images = torch.rand(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    found = Flip()(images, torch.Generator())
    assert torch.equal(found[..., 0], images[..., -1])
    assert torch.equal(Flip()(found, torch.Generator()), images)


@pytest.mark.parametrize(
    ("make", "wrong"), [(ShrinkPad, {"pixels": -1}), (RandomShrinkPad, {"smallest": 0.0}), (Sat, {"shift": 1.0})]
)
def test_parameters_out_of_range(make: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected"):
        make(**wrong)


def test_images_that_are_too_small_to_shrink() -> None:
    with pytest.raises(InputError, match="expected images larger than the 4 pixels to shrink by, got 4x9"):
        ShrinkPad()(torch.ones(1, 1, 4, 9), torch.Generator())
