"""Drawings: in range, different from one another, and the same for the same seed."""

from __future__ import annotations

import pytest
import torch

from calibration.repair.drawings import Drawings, Kind


def drawn(seed: int, kind: Kind) -> torch.Tensor:
    return Drawings((3, 16, 12), 5, seed, kind).draw(4, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (1, 28, 28), (4, 5, 9), (3, 64, 48)])
def test_drawings_are_images(shape: tuple[int, int, int]) -> None:
    images = Drawings(shape, 60, 0).draw(200, torch.Generator().manual_seed(0))
    assert images.shape == (200, *shape)
    assert images.dtype == torch.float32
    assert float(images.min()) >= 0.0
    assert float(images.max()) <= 1.0
    assert 0.3 < float(images.mean()) < 0.7
    assert float(images.std(dim=(1, 2, 3)).median()) > 0.05  # few are of one grey
    assert float((images[:100] - images[100:]).abs().mean()) > 0.1
    if shape[0] == 3:
        assert float((images[:, 0] - images[:, 1]).abs().mean()) > 0.1  # coloured


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 64, 48)])
def test_figures_are_bright_on_black(shape: tuple[int, int, int]) -> None:
    images = Drawings(shape, 60, 0, "figures").draw(200, torch.Generator().manual_seed(0))
    assert images.shape == (200, *shape)
    assert images.dtype == torch.float32
    assert float(images.min()) >= 0.0
    assert float(images.max()) <= 1.0
    assert float(images.median()) < 0.05
    assert float((images.amax(dim=(1, 2, 3)) > 0.4).double().mean()) > 0.7
    assert float((images[:100] - images[100:]).abs().mean()) > 0.03
    if shape[0] == 3:
        assert float((images[:, 0] - images[:, 1]).abs().amax(dim=(1, 2)).gt(0.1).double().mean()) > 0.1  # some are coloured


@pytest.mark.parametrize(
    ("of_scenes", "of_figures", "kind"),
    [(0.39, 0.1, "scenes"), (0.6, 0.3, "figures"), (0.6, 0.5, "figures"), (0.6, 0.6, "scenes")],
)
def test_a_model_that_gives_scenes_one_label_gets_figures_if_it_knows_these_better(
    of_scenes: float, of_figures: float, kind: str
) -> None:
    def alike(images: torch.Tensor) -> float:
        return of_figures if float(images.median()) < 0.1 else of_scenes

    assert Drawings.suited(alike, (1, 28, 28), 60, 0).kind == kind


@pytest.mark.parametrize("kind", ["scenes", "figures"])
def test_the_seed_decides(kind: Kind) -> None:
    assert torch.equal(drawn(0, kind), drawn(0, kind))
    assert not torch.equal(drawn(0, kind), drawn(1, kind))


def test_neighbours_are_alike_as_in_images() -> None:
    images = Drawings((1, 32, 32), 200, 0).stock
    step = (images[..., 1:] - images[..., :-1]).abs().mean()
    assert float(step) < 0.5 * float((images[..., 8:] - images[..., :-8]).abs().mean())
