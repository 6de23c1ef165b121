from __future__ import annotations

import pytest
import torch
from torch.nn.functional import interpolate

from guard.preprocessors.resizing import blur_by_scaling, resize


@pytest.mark.parametrize("shape", [(3, 3, 32, 32), (2, 1, 28, 28), (1, 1, 1, 9), (2, 3, 65, 40), (1, 1, 8, 1)])
@pytest.mark.parametrize("size", [(26, 26), (1, 1), (7, 64), (40, 9)])
def test_it_is_bilinear_interpolation_whatever_the_size(shape: tuple[int, ...], size: tuple[int, int]) -> None:
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    expected = interpolate(images, size=size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(resize(images, *size), expected, atol=1e-6, rtol=0)
    back = interpolate(expected, size=shape[2:], mode="bilinear", align_corners=False)
    torch.testing.assert_close(blur_by_scaling(images, *size), back, atol=2e-6, rtol=0)


def test_what_is_kept_has_the_type_of_images() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        blur_by_scaling(torch.zeros(1, 1, 17, 17, dtype=torch.float32), 12, 12)
    finally:
        torch.set_default_dtype(torch.float32)
    assert blur_by_scaling(torch.zeros(1, 1, 17, 17), 12, 12).dtype == torch.float32


def test_what_is_kept_works_in_and_out_of_inference_mode() -> None:
    images = torch.rand(1, 1, 13, 13, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        resize(images, 11, 11)
    resize(images.requires_grad_(True), 11, 11).sum().backward()
    assert images.grad is not None
