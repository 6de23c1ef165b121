from __future__ import annotations

import pytest
import torch

from guard.errors import InputError
from guard.preprocessors import ThreeMedians
from guard.preprocessors.three_medians import median_at


@pytest.mark.parametrize(("value", "expected"), [(0.0, 0.0), (0.2, (1.53 * 0.2**0.6) ** 2.6), (0.6, 1.0), (1.0, 1.0)])
def test_constant_images_by_hand(value: float, expected: float) -> None:
    found = ThreeMedians()(torch.full((2, 3, 12, 9), value), torch.Generator())
    torch.testing.assert_close(found, torch.full((2, 3, 12, 9), expected), atol=1e-5, rtol=0)


def test_a_small_patch_disappears_and_a_large_one_stays() -> None:
    images = torch.zeros(2, 1, 32, 32)
    images[0, 0, 10:12, 10:12] = 1.0
    images[1, 0, 8:24, 8:24] = 1.0
    found = ThreeMedians()(images, torch.Generator())
    assert float(found[0].max()) == 0.0
    assert float(found[1, 0, 16, 16]) == 1.0


def test_a_median_at_full_size_is_a_median() -> None:
    images = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(median_at(images, 1, 1.0), images)


@pytest.mark.parametrize("wrong", [{"kernel": 2}, {"gain": 0.0}, {"compression": -1.0}, {"extension": 0.0}])
def test_parameters_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match="expected"):
        ThreeMedians(**wrong)  # type: ignore[arg-type]
