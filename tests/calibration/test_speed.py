"""What a guard costs is measured on images of all classes."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import torch
from torch import Tensor

from calibration.data import ImageSet
from calibration.speed import measure_speed
from guard import Guard


class Passing:
    """Spends 1 pass on a dark image, 9 on a bright one."""

    device = "cpu"
    predictor: Callable[[Tensor], Tensor] = torch.nn.Identity()

    def __call__(self, images: Tensor) -> list[SimpleNamespace]:
        return [SimpleNamespace(passes=9 if float(image.mean()) > 0.5 else 1) for image in images]


def test_images_that_are_sorted_by_class_are_drawn_from_all() -> None:
    """The first ones were taken: of a folder all are of its first class."""
    pixels = torch.cat([torch.zeros(400, 1, 4, 4), torch.full((400, 1, 4, 4), 255.0)]).byte()
    one_by_one, together = measure_speed(cast(Guard, Passing()), ImageSet(pixels))
    assert 3.0 < one_by_one.passes < 7.0
    assert 4.0 < together.passes < 6.0
    assert (one_by_one.images, together.images) == (32, 256)
