from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from guard.errors import InputError, MissingExtraError
from guard.preprocessors.median import median_filter, median_kornia, median_opencv


def random_images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (1, 1, 7, 12), (3, 4, 5, 5), (1, 1, 3, 9), (1, 2, 1, 1), (1, 1, 1, 6)])
def test_opencv_and_kornia_agree(kernel: int, shape: tuple[int, ...]) -> None:
    images = random_images(*shape)
    torch.testing.assert_close(median_opencv(images, kernel), median_kornia(images, kernel), atol=1e-6, rtol=0)


@pytest.mark.parametrize("median", [median_opencv, median_kornia, median_filter])
def test_borders_are_replicated(median: Callable[[Tensor, int], Tensor]) -> None:
    image = torch.tensor([[1.0, 2.0, 9.0], [4.0, 5.0, 6.0], [7.0, 8.0, 3.0]]).reshape(1, 1, 3, 3) / 10
    expected = torch.tensor([[2.0, 4.0, 6.0], [4.0, 5.0, 6.0], [7.0, 6.0, 5.0]]).reshape(1, 1, 3, 3) / 10
    torch.testing.assert_close(median(image, 3), expected)


@pytest.mark.parametrize("kernel", [3, 5])
def test_a_lone_pixel_vanishes_and_edges_stay(kernel: int) -> None:
    images = torch.zeros(1, 2, 9, 9)
    images[0, 0, 4, 4] = 1.0
    images[0, 1, :, 5:] = 1.0
    filtered = median_filter(images, kernel)
    assert filtered[0, 0].max() == 0
    assert torch.equal(filtered[0, 1], images[0, 1])


def test_planes_do_not_mix_and_views_are_read_right() -> None:
    images = random_images(3, 8, 8, 2).permute(0, 3, 1, 2)
    assert not images.is_contiguous()
    filtered = median_filter(images, 3)
    for row in range(3):
        for channel in range(2):
            alone = median_filter(images[row, channel][None, None].contiguous(), 3)
            assert torch.equal(filtered[row, channel], alone[0, 0])


@pytest.mark.parametrize("kernel", [0, 2, 4, 7])
def test_other_kernels(kernel: int) -> None:
    with pytest.raises(InputError, match="expected a median kernel of 1, 3 or 5"):
        median_filter(torch.zeros(1, 1, 4, 4), kernel)


def test_without_kornia(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kornia.filters", None)
    with pytest.raises(MissingExtraError, match=r"backdoor-guard\[gpu\]"):
        median_kornia(torch.zeros(1, 1, 4, 4), 3)
