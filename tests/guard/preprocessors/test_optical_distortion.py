from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
import torch

from guard.errors import InputError
from guard.preprocessors import OpticalDistortion
from guard.preprocessors.optical_distortion import distort


def ramp(side: int) -> torch.Tensor:
    """Brightness grows from left to right."""
    return (torch.arange(side) / (side - 1)).expand(1, 1, side, side).contiguous()


@pytest.mark.parametrize("k", [-0.05, 0.03, 0.05])
def test_it_is_opencvs_distortion(k: float) -> None:
    side = 32
    images = torch.rand(1, 1, side, side, generator=torch.Generator().manual_seed(0))
    axis = torch.tensor([[0.04, -0.03]], dtype=torch.float64)
    # in pixels, where OpenCV counts from the first pixel's centre; both of its radial coefficients are k
    camera = np.array([[side, 0, side / 2 - 0.5 + 0.04 * side], [0, side, side / 2 - 0.5 - 0.03 * side], [0, 0, 1]])
    maps = cv2.initUndistortRectifyMap(camera, np.array([k, k, 0.0, 0.0]), None, camera, (side, side), cv2.CV_32FC1)
    expected = cv2.remap(images[0, 0].numpy(), maps[0], maps[1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    found = distort(images, torch.tensor([k]), axis)[0, 0].numpy()
    assert np.abs(found - expected).max() < 0.05  # OpenCV interpolates in steps of 1/32 pixel
    assert np.abs(found - expected).mean() < 0.005


def test_pincushion_pulls_the_borders_in_and_barrel_pushes_them_out() -> None:
    centre = torch.zeros(1, 2, dtype=torch.float64)
    for k, sign in ((0.3, 1.0), (-0.3, -1.0)):
        moved = distort(ramp(33), torch.tensor([k]), centre)
        assert sign * float(moved[0, 0, 16, 28] - ramp(33)[0, 0, 16, 28]) > 0.01
        assert float(moved[0, 0, 16, 16]) == pytest.approx(0.5, abs=1e-6)


def test_nothing_to_distort_changes_nothing() -> None:
    images = torch.rand(3, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    still = OpticalDistortion(limit=0.0)(images, torch.Generator().manual_seed(0))
    torch.testing.assert_close(still, images, atol=1e-5, rtol=0)


@pytest.mark.parametrize("wrong", [{"limit": 1.0}, {"limit": -0.1}, {"offset": math.nan}])
def test_parameters_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match="expected a limit and an offset"):
        OpticalDistortion(**wrong)
