"""Amplified: the patch where it was learnt, and disjoint copies of it."""

from __future__ import annotations

import pytest
import torch

from calibration.attacks import Amplified, BadNets, Patch
from tests.calibration.attacks.examples import some_images


@pytest.mark.parametrize("copies", [1, 4, 9])
@pytest.mark.parametrize(("bottom", "right"), [(0, 0), (1, 3), (10, 10), (5, 2)])
def test_disjoint_copies_the_learnt_place_among_them(copies: int, bottom: int, right: int) -> None:
    patch = Patch.rectangle(2, bottom=bottom, right=right)
    triggered = Amplified(BadNets(0, patches=(patch,)), copies).trigger(torch.zeros(1, 1, 12, 12))
    assert int(triggered.sum()) == 4 * copies
    assert bool((triggered[patch.stamp(torch.zeros(1, 1, 12, 12)) == 1.0] == 1.0).all())


@pytest.mark.parametrize(("copies", "rows"), [(4, [0, 1, 9, 10]), (9, [0, 1, 5, 6, 9, 10])])
def test_copies_are_in_the_corners_then_at_the_edges_and_the_centre(copies: int, rows: list[int]) -> None:
    patch = Patch.rectangle(2, bottom=1, right=1)  # in rows 9 and 10; a corner would be 10 and 11
    triggered = Amplified(BadNets(0, patches=(patch,)), copies).trigger(torch.zeros(1, 1, 12, 12))[0, 0]
    assert torch.nonzero(triggered.any(dim=1)).flatten().tolist() == rows
    assert torch.nonzero(triggered.any(dim=0)).flatten().tolist() == rows


def test_other_patches_of_the_backdoor_are_not_pasted() -> None:
    patch, other = Patch.rectangle(2), Patch.rectangle(3, bottom=4)
    images, _ = some_images()
    one, two = (Amplified(BadNets(0, patches=patches)).trigger(images) for patches in ((patch,), (patch, other)))
    assert torch.equal(one, two)


def test_the_model_is_trained_with_a_single_patch() -> None:
    base = BadNets(0, 0.25, (Patch.rectangle(2),))
    images, labels = some_images()
    once, many = (attack.poison(images, labels, torch.Generator().manual_seed(0)) for attack in (base, Amplified(base, 9)))
    assert torch.equal(once[0], many[0])
    assert torch.equal(once[1], many[1])
