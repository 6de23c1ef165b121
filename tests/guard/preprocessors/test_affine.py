from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from guard.errors import MissingExtraError
from guard.preprocessors.affine import draw_affine, warp, warp_kornia, warp_torch

SHAPES = [(2, 3, 16, 16), (3, 1, 9, 14), (1, 2, 20, 7), (4, 1, 2, 2)]


def random_images(shape: tuple[int, ...]) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def shift_of(columns: float, rows: float) -> Tensor:
    return torch.tensor([[[1.0, 0.0, columns], [0.0, 1.0, rows]]], dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [(0.16, 4.0, 0.16), (0.5, 180.0, 0.9)])
def test_torch_and_kornia_agree(shape: tuple[int, ...], size: tuple[float, float, float]) -> None:
    images = random_images(shape)
    drawn = draw_affine(shape[0], shape[2], shape[3], *size, torch.Generator().manual_seed(1))
    torch.testing.assert_close(warp_torch(images, drawn), warp_kornia(images, drawn), atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [*SHAPES, (1, 1, 1, 1), (1, 1, 1, 5), (2, 3, 5, 1)])
def test_identity(shape: tuple[int, ...]) -> None:
    images = random_images(shape)
    torch.testing.assert_close(warp(images, shift_of(0, 0).expand(shape[0], 2, 3)), images, atol=1e-6, rtol=0)


@pytest.mark.parametrize("moved", [warp_torch, warp_kornia])
@pytest.mark.parametrize(("columns", "rows"), [(1, 0), (0, 2), (-3, 1), (2, -2)])
def test_whole_shifts_move_pixels_exactly(moved: Callable[[Tensor, Tensor], Tensor], columns: int, rows: int) -> None:
    images = random_images((1, 2, 7, 9))
    expected = torch.zeros_like(images)
    for row in range(7):
        for column in range(9):
            if 0 <= row - rows < 7 and 0 <= column - columns < 9:
                expected[:, :, row, column] = images[:, :, row - rows, column - columns]
    torch.testing.assert_close(moved(images, shift_of(columns, rows)), expected, atol=1e-6, rtol=0)


def test_half_a_pixel_is_interpolated() -> None:
    image = torch.tensor([0.2, 0.4, 0.8]).reshape(1, 1, 1, 3)
    expected = torch.tensor([0.1, 0.3, 0.6]).reshape(1, 1, 1, 3)
    torch.testing.assert_close(warp_torch(image, shift_of(0.5, 0)), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("moved", [warp_torch, warp_kornia])
def test_a_quarter_turn_goes_round_the_centre(moved: Callable[[Tensor, Tensor], Tensor]) -> None:
    image = torch.arange(9.0).reshape(1, 1, 3, 3) / 10
    turn = torch.tensor([[[0.0, 1.0, 0.0], [-1.0, 0.0, 2.0]]], dtype=torch.float64)
    torch.testing.assert_close(moved(image, turn), torch.rot90(image, 1, dims=(2, 3)), atol=1e-6, rtol=0)


def test_parameters_keep_their_bounds() -> None:
    drawn = draw_affine(4000, 20, 30, 0.16, 4.0, 0.16, torch.Generator().manual_seed(2))
    zoom = torch.linalg.det(drawn[:, :, :2]).sqrt()
    angle = torch.atan2(drawn[:, 0, 1], drawn[:, 0, 0]).rad2deg()
    centre = torch.tensor([14.5, 9.5], dtype=torch.float64)
    shift = (drawn[:, :, :2] @ centre + drawn[:, :, 2] - centre) / torch.tensor([30.0, 20.0], dtype=torch.float64)
    for values, bound, middle in ((zoom, 0.16, 1.0), (angle, 4.0, 0.0), (shift[:, 0], 0.16, 0.0), (shift[:, 1], 0.16, 0.0)):
        offset = values - middle
        assert offset.abs().max() <= bound + 1e-12
        assert offset.max() > 0.99 * bound
        assert offset.min() < -0.99 * bound
        assert abs(float(offset.mean())) < 0.05 * bound


def test_generators_decide_the_draws() -> None:
    first, again, other = (draw_affine(5, 8, 8, 0.16, 4.0, 0.16, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.dtype == torch.float64


def test_each_image_gets_its_own_matrix() -> None:
    images = random_images((1, 1, 6, 6)).expand(2, 1, 6, 6)
    moved = warp_torch(images, torch.cat([shift_of(0, 0), shift_of(1, 0)]))
    torch.testing.assert_close(moved[0], images[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(moved[1, :, :, 1:], images[1, :, :, :-1], atol=1e-6, rtol=0)


def test_without_kornia(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kornia.geometry.transform", None)
    with pytest.raises(MissingExtraError, match=r"backdoor-guard\[gpu\]"):
        warp_kornia(torch.zeros(1, 1, 4, 4), shift_of(0, 0))


@pytest.mark.parametrize("shape", [(5, 3, 32, 32), (2, 1, 9, 14), (3, 3, 1, 7)])
def test_the_fast_way_is_the_exact_way(shape: tuple[int, ...]) -> None:
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    drawn = draw_affine(shape[0], shape[2], shape[3], 0.3, 25.0, 0.3, torch.Generator().manual_seed(1))
    torch.testing.assert_close(warp(images, drawn), warp_torch(images, drawn), atol=2e-5, rtol=0)
