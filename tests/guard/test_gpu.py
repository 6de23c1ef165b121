"""On a GPU the same results as on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from guard import Guard
from guard.preprocessors import (
    Flip,
    Gym,
    GymIntensive,
    OpticalDistortion,
    Preprocessor,
    RandomShrinkPad,
    Sat,
    ShrinkPad,
    ThreeMedians,
)
from guard.preprocessors.affine import draw_affine, warp
from guard.preprocessors.median import median_filter
from tests.toy import save_toy_profile, toy_images, toy_trigger

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def random_images() -> torch.Tensor:
    return torch.rand(8, 3, 33, 47, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kernel", [3, 5])
def test_medians_are_equal(kernel: int) -> None:
    images = random_images()
    torch.testing.assert_close(median_filter(images.cuda(), kernel).cpu(), median_filter(images, kernel), atol=1e-6, rtol=0)


def test_warps_are_equal() -> None:
    images = random_images()
    drawn = draw_affine(len(images), 33, 47, 0.16, 4.0, 0.16, torch.Generator().manual_seed(1))
    torch.testing.assert_close(warp(images.cuda(), drawn).cpu(), warp(images, drawn), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "preprocess",
    [Gym(), Gym(kernel=1), GymIntensive(), OpticalDistortion(), ThreeMedians(), RandomShrinkPad(), ShrinkPad(), Sat(), Flip()],
)
def test_preprocessors_are_equal(preprocess: Preprocessor) -> None:
    images = random_images()
    results = [preprocess(place, torch.Generator().manual_seed(2)).cpu() for place in (images, images.cuda())]
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=0)  # gammas and warps in float32


def test_verdicts_are_equal(tmp_path: Path) -> None:
    profile = save_toy_profile(tmp_path / "profile")
    images, _ = toy_images(64, seed=3)
    batch = torch.cat([images, toy_trigger(images)])
    results = [[item.accepted for item in Guard.load(profile, device=device)(batch)] for device in ("cpu", "cuda")]
    assert results[0] == results[1]
    assert results[0] == [True] * 64 + [False] * 64
