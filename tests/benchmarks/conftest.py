"""Real digits in the three parts of an image set, at MNIST's size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from benchmarks.parts import Parts
from calibration.data import ImageSet


@pytest.fixture(scope="session")
def parts() -> Parts:
    loaded = load_digits()
    enlarged = np.kron(loaded.images / 16.0 * 255.0, np.ones((1, 3, 3)))
    pixels = torch.from_numpy(np.pad(enlarged, ((0, 0), (2, 2), (2, 2))).round().astype(np.uint8))[:, None]
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    images = ImageSet(pixels[order], torch.from_numpy(loaded.target.astype(np.int64))[order])
    rows = torch.arange(len(images))
    return Parts(images.select(rows[:1_000]), images.select(rows[1_000:1_400]), images.select(rows[1_400:]), 10)
