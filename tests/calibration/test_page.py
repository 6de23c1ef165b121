"""Pages: what a montage shows."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from calibration.page import montage


def shown(picture: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))


def share(pixels: np.ndarray, colour: tuple[int, int, int]) -> float:
    return float((np.abs(pixels.astype(int) - colour).max(axis=2) < 3).mean())


@pytest.mark.parametrize(("height", "width"), [(8, 8), (28, 20), (64, 128), (300, 300), (1, 1)])
def test_images_stand_in_rows_whatever_their_size(height: int, width: int) -> None:
    red, blue = (torch.zeros(1, 3, height, width) for _ in range(2))
    red[:, 0], blue[:, 2] = 1.0, 1.0
    pixels = shown(montage([("first", red.expand(3, -1, -1, -1)), ("second", blue)]))
    rows, columns = np.nonzero((pixels == (255, 0, 0)).all(axis=2))
    below, beside = np.nonzero((pixels == (0, 0, 255)).all(axis=2))
    assert rows.max() < below.min()
    assert columns.min() == pytest.approx(beside.min(), abs=2)
    assert len(rows) == pytest.approx(3 * len(below), rel=0.05)
    assert len(below) / (np.ptp(below) + 1) ** 2 == pytest.approx(width / height, rel=0.1)


def test_grey_masks_beside_coloured_images_and_what_is_out_of_range() -> None:
    mask = torch.full((1, 1, 8, 8), 0.5)
    bright = torch.full((1, 3, 8, 8), 2.0)
    bright[:, 1:] = -1.0
    pixels = shown(montage([("mask", mask), ("image", bright)], ["7"]))
    assert share(pixels, (128, 128, 128)) == pytest.approx(share(pixels, (255, 0, 0)), rel=0.05)
    assert share(pixels, (128, 128, 128)) > 0.1
