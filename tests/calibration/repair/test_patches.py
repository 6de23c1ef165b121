"""Patches: where they are put, what the map learns of them, and that they find a trigger that works at one place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from calibration.repair.patches import Pasted, Patches, exchange

SHAPE = (1, 12, 12)


def patches(focus: float = 0.7, sides: tuple[int, int] = (3, 3), classes: int = 4) -> Patches:
    return Patches(classes, SHAPE, 0.1, focus, sides, 0)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_a_patch_is_a_window_of_its_labels_canvas() -> None:
    found = patches()
    images = torch.rand(500, *SHAPE, generator=generator())
    pasted = found.paste(images, generator())
    changed = pasted.images != images
    assert changed.flatten(1).sum(dim=1).tolist() == [9] * 500
    alike = ((pasted.images == torch.sigmoid(found.canvases)[pasted.labels]) | ~changed).flatten(1).all(dim=1)
    assert 0.2 < float(alike.float().mean()) < 0.5  # the others are of a coarser grain
    rows, columns = changed[:, 0].any(dim=2), changed[:, 0].any(dim=1)
    for places, middles in ((rows, pasted.rows), (columns, pasted.columns)):
        first = places.int().argmax(dim=1)
        assert torch.equal(first, (middles - 1).clamp(0, 9))  # moved into the image
    assert len(set(zip(pasted.rows.tolist(), pasted.columns.tolist(), strict=True))) > 100
    assert len(pasted.labels.unique()) == 4


def test_coarser_grains_are_smooth_and_have_as_much_contrast() -> None:
    found = Patches(40, (1, 24, 24), 0.1, 0.7, (3, 3), 0)
    fine, middle, coarse = (grain.logit()[..., 4:-4, 4:-4] for grain in found._patterns().detach())
    steps = [float((grain[..., 1:] - grain[..., :-1]).square().mean().sqrt()) for grain in (fine, middle, coarse)]
    assert steps[0] > 1.5 * steps[1] > 2.0 * steps[2]
    assert all(float(grain.std()) == pytest.approx(1.0, abs=0.15) for grain in (fine, middle, coarse))
    torch.testing.assert_close(fine, found.canvases.detach()[..., 4:-4, 4:-4], atol=1e-4, rtol=1e-4)


def test_further_windows_and_copies() -> None:
    found, images = patches(), torch.full((400, *SHAPE), 0.123)
    assert float((found.paste(images, generator(), more=4).images != images).float().mean()) > 3.0 * 9.0 / 144.0
    copied = found.paste(images, generator(), copies=3).images
    assert float((copied != images).float().mean()) > 2.0 * 9.0 / 144.0
    assert all(len(image.unique()) <= 1 + 9 for image in copied)  # the same nine pixels


def test_the_map_learns_what_was_raised_nearby_and_draws_by_it() -> None:
    found = patches(focus=1.0)
    found.unit.fill_(2.0)
    pasted = Pasted(torch.zeros(1, *SHAPE), torch.tensor([1]), torch.tensor([5]), torch.tensor([7]))
    for _ in range(40):
        found.note(pasted, torch.tensor([3]), torch.tensor([8.0]))
    most, rows, columns = found.sorest()
    assert float(most[3]) == pytest.approx(8.0 / 2.0, abs=0.01)
    assert abs(int(rows[3]) - 5) <= 1
    assert abs(int(columns[3]) - 7) <= 1
    assert float(found.map[1].max()) == pytest.approx(0.05)  # of label 1 nothing was told
    drawn = found.paste(torch.zeros(500, *SHAPE), generator())
    there = (drawn.labels == 3) & ((drawn.rows - 5).abs() <= 1) & ((drawn.columns - 7).abs() <= 1)
    assert float(there.float().mean()) > 0.9
    found.note(pasted, torch.tensor([3]), torch.tensor([-5.0]))
    assert float(found.map[3, 5, 7]) < 4.0


def test_where_another_model_stands_out_is_tried_as_well() -> None:
    found = patches(focus=1.0)
    found.map[3, 5, 7] = 4.0
    also = torch.full_like(found.map, 0.01)
    also[1, 8, 2] = 4.0
    drawn = found.paste(torch.zeros(500, *SHAPE), generator(), also=also)
    places = list(zip(drawn.labels.tolist(), drawn.rows.tolist(), drawn.columns.tolist(), strict=True))
    assert all(200 < places.count(place) < 300 for place in ((3, 5, 7), (1, 8, 2)))
    moved = found.canvases.detach().clone()
    alone = torch.zeros_like(found.map)  # what the model itself has shown stays the higher
    found.ascend(lambda images: images.flatten(1)[:, :4], torch.rand(64, *SHAPE), generator(), 0, also=alone)
    assert torch.equal(found.canvases[[0, 1, 2]], moved[[0, 1, 2]])


def test_a_trigger_at_one_place_is_found() -> None:
    """Label 2 is raised by white in rows 8 to 10, columns 1 to 3, and by nothing else."""

    def answers(images: Tensor) -> Tensor:
        corner = images[:, 0, 8:11, 1:4].mean(dim=(1, 2))
        lit = 20.0 * (corner - 0.5).relu()
        return torch.stack([0.5 + 0 * corner, images.mean(dim=(1, 2, 3)), lit, 0.4 + 0 * corner], dim=1)

    found, draws = patches(), generator()
    for step in range(300):
        found.ascend(answers, torch.rand(64, *SHAPE, generator=draws), draws, 3 if step % 4 else 0, plain=True)
    most, rows, columns = found.sorest()
    assert int(most.argmax()) == 2
    assert float(most[2]) > 3.0 * float(most[[0, 1, 3]].max())
    assert (abs(int(rows[2]) - 9) <= 1, abs(int(columns[2]) - 2) <= 1) == (True, True)
    assert float(torch.sigmoid(found.canvases.detach())[2, 0, 8:11, 1:4].mean()) > 0.9


def test_a_plain_square_is_found_though_no_gradient_leads_to_it() -> None:
    """Label 1 is raised by nothing but white in all of rows 8 to 10, columns 1 to 3."""

    def answers(images: Tensor) -> Tensor:
        darkest = images[:, 0, 8:11, 1:4].flatten(1).amin(dim=1)
        still = 0.0 * darkest
        return torch.stack([0.5 + images.mean(dim=(1, 2, 3)), 50.0 * (darkest - 0.9).relu(), 0.5 + still, 0.4 + still], dim=1)

    found, draws = patches(), generator()
    for step in range(300):
        found.ascend(answers, 0.8 * torch.rand(64, *SHAPE, generator=draws), draws, 3 if step % 4 else 0, plain=True)
    most, rows, columns = found.sorest()
    assert int(most.argmax()) == 1
    assert float(most[1]) > 3.0 * float(most[[0, 2, 3]].max())
    assert (abs(int(rows[1]) - 9) <= 1, abs(int(columns[1]) - 2) <= 1) == (True, True)
    assert float(torch.sigmoid(found.canvases.detach())[1, 0, 8:11, 1:4].min()) > 0.9


def test_plain_patches_of_any_colour_are_tried() -> None:
    """Label 0 is raised by yellow in rows 2 to 4, columns 6 to 8."""

    def answers(images: Tensor) -> Tensor:
        red, green, blue = images[:, :, 2:5, 6:9].flatten(2).unbind(dim=1)
        least = torch.minimum(torch.minimum(red, green), 1.0 - blue).amin(dim=1)
        return torch.stack([50.0 * (least - 0.9).relu(), 0.5 + 0.0 * least, 0.4 + 0.0 * least], dim=1)

    found, draws = Patches(3, (3, 12, 12), 0.1, 0.7, (3, 5), 0), generator()
    for step in range(300):
        found.ascend(answers, 0.8 * torch.rand(64, 3, 12, 12, generator=draws), draws, 3 if step % 4 else 0, plain=True)
    assert found.sorest()[0].argmax() == 0
    colours = torch.sigmoid(found.canvases.detach())[0, :, 2:5, 6:9].mean(dim=(1, 2))
    assert [round(float(colour)) for colour in colours] == [1, 1, 0]


def test_some_canvases_begin_anew() -> None:
    found = patches(classes=200)
    before = found.canvases.detach().clone()
    found.renew(0.25, generator())
    changed = (found.canvases != before).flatten(1).any(dim=1).float().mean()
    assert 0.15 < float(changed) < 0.35


def test_windows_are_exchanged() -> None:
    images = torch.arange(3.0).view(3, 1, 1, 1).expand(3, *SHAPE)
    mixed = exchange(images, torch.tensor([0, 6, 11]), torch.tensor([6, 6, 6]), 4)
    assert mixed[0, 0, :4, 4:8].unique().tolist() == [2.0]
    assert mixed[1, 0, 4:8, 4:8].unique().tolist() == [0.0]
    assert mixed[2, 0, 8:, 4:8].unique().tolist() == [1.0]
    assert [int((mixed[row] != row).sum()) for row in range(3)] == [16] * 3
