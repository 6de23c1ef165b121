"""Second opinions: the rule, and what a clean reference that knows too little may not say."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor, nn

from calibration.data import no_progress
from calibration.engine import Engine
from calibration.inspection import judge as judging
from calibration.inspection import mask_verdicts
from calibration.inspection.judge import Judge
from calibration.inspection.mask_verdicts import Look, acquittal, is_infected, judge_masks, spread
from calibration.inspection.record import SecondOpinion
from calibration.inspection.search import Search
from calibration.inspection.triggers import Goals, Triggers
from guard.errors import InspectionError

CLASSES, SIDE = 4, 8


class Brightest(nn.Module):
    """The brightest quarter's number; with a backdoor, 0 where the first pixel is white; confused, 0 for 1 and 2, too."""

    def __init__(self, backdoor: bool = False, confused: bool = False) -> None:
        super().__init__()
        self.backdoor, self.confused = backdoor, confused

    def forward(self, images: Tensor) -> Tensor:
        quarters = nn.functional.avg_pool2d(images, SIDE // 2).flatten(1)
        white, own = images[:, 0, 0, 0] > 0.95, quarters.argmax(dim=1)
        zero = (white & self.backdoor) | (((own == 1) | (own == 2)) & self.confused)
        return 10.0 * quarters + 20.0 * nn.functional.one_hot(torch.tensor(0), CLASSES) * zero.unsqueeze(-1)


def images(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    found = 0.4 * torch.rand(count, 1, SIDE, SIDE, generator=generator)
    for row in range(count):
        top, left = divmod(row % CLASSES, 2)
        found[row, 0, 4 * top : 4 * top + 4, 4 * left : 4 * left + 4] += 0.5
    return found


@pytest.fixture
def white_pixel() -> Triggers:
    """To each label, of which the first one's works."""
    masks = torch.zeros(CLASSES, SIDE, SIDE)
    masks[:, 0, 0] = 1.0
    masks[1:, :, :5] = 1.0
    labels = torch.arange(CLASSES)
    return Triggers(
        labels,
        torch.full_like(labels, -1),
        masks,
        torch.ones(CLASSES, 1, SIDE, SIDE),
        torch.ones(CLASSES),
        torch.ones_like(labels),
    )


def judge(monkeypatch: pytest.MonkeyPatch, reference: nn.Module) -> Judge:
    """Of a model with a backdoor; it finds its reference trained."""
    monkeypatch.setattr(judging, "train_reference", lambda *_: reference)
    return Judge(Brightest(backdoor=True), CLASSES, images(80, 0), None, images(80, 1), 0, Engine(), None, no_progress)


LOOK = Look("labels", Goals.all_labels(CLASSES), Search())


def searched(monkeypatch: pytest.MonkeyPatch, *sizes: int) -> None:
    """What a search of the reference finds, in pixels."""

    def found(_: nn.Module, __: Tensor, goals: Goals, *___: Any, **____: Any) -> Triggers:
        masks = torch.zeros(len(goals), SIDE * SIDE)
        for mask, size in zip(masks, sizes, strict=True):
            mask[:size] = 1.0
        masks, count = masks.view(-1, SIDE, SIDE), len(goals)
        return Triggers(goals.labels, goals.sources, masks, masks.unsqueeze(1), torch.ones(count), torch.ones(count).long())

    monkeypatch.setattr(mask_verdicts, "recover_triggers", found)
    monkeypatch.setattr(judging, "strengthen", lambda _, __, chosen, *___: chosen)


def test_what_the_reference_gives_the_label_anyway_is_no_success_of_the_trigger(
    monkeypatch: pytest.MonkeyPatch, white_pixel: Triggers
) -> None:
    """It counted, and acquitted a backdoor: where a reference gives most images a label, any trigger "works"."""
    searched(monkeypatch, 40, 40, 40, 40)
    poor = judge(monkeypatch, Brightest(confused=True))
    found = judge_masks(poor, LOOK, white_pixel, ())[1]
    assert poor.agreement == 0.5
    assert [item.infected for item in found] == [True, False, False, False]
    assert found[0].second_opinion is not None
    assert found[0].second_opinion.reference_success == 0.0


@pytest.mark.parametrize(("sizes", "infected"), [((40, 40, 40, 64), True), ((20, 40, 64, 64), None)])
def test_a_reference_whose_labels_are_not_reached_tells_nothing(
    monkeypatch: pytest.MonkeyPatch, white_pixel: Triggers, sizes: tuple[int, ...], infected: bool | None
) -> None:
    """They counted as the whole image, next to which any label is easy."""
    searched(monkeypatch, *sizes)
    good = judge(monkeypatch, Brightest())
    if infected is None:
        with pytest.raises(InspectionError, match="in the clean reference triggers were found for 1 of 3 other labels: add"):
            judge_masks(good, LOOK, white_pixel, ())
    else:
        assert judge_masks(good, LOOK, white_pixel, ())[1][0].infected == infected


@pytest.mark.parametrize("biased", [100.0, -100.0])
def test_one_that_has_not_learnt_the_task_speaks_for_nothing(
    monkeypatch: pytest.MonkeyPatch, white_pixel: Triggers, biased: float
) -> None:
    searched(monkeypatch, 40, 40, 40, 40)

    class Constant(nn.Module):
        def forward(self, batch: Tensor) -> Tensor:
            return torch.tensor([[biased, 0.0, 0.0, 1.0]]).expand(len(batch), -1)

    constant = judge(monkeypatch, Constant())
    for _ in range(2):  # the second time it is there
        with pytest.raises(InspectionError, match=r"the clean reference gives 25% of images .* near chance: add images"):
            judge_masks(constant, LOOK, white_pixel, ())


@pytest.mark.parametrize(
    ("changes", "why_not"),
    [
        ({}, ""),
        ({"success": 0.8}, "works on fewer than 90%"),
        ({"reference_ratio": None, "reference_success": None}, "no clean reference"),
        ({"reference_ratio": 0.5}, "about as small in a clean model"),  # 0.6 times as easy in the reference
        ({"reference_ratio": 0.6}, ""),
        ({"reference_ratio": 3.0}, ""),
        ({"reference_ratio": 3.0, "size_ratio": 0.4}, "not under 36% of the others"),  # hard in the reference is as usual
        ({"size_ratio": 0.35}, ""),
        ({"size_ratio": 0.36}, "not under 36% of the others"),
        ({"reference_success": 0.3}, "works on a clean model, too"),  # without a backdoor
        ({"size_ratio": 0.1, "spread": 0.9, "reference_ratio": 0.2}, ""),
    ],
)
def test_the_rule(changes: dict[str, float | None], why_not: str) -> None:
    opinion = SecondOpinion(
        size_ratio=0.3,
        spread=0.2,
        success=0.98,
        reference_l1=50.0,
        reference_ratio=1.0,
        reference_success=0.02,
        infected=False,
    )
    changed = msgspec.structs.replace(opinion, **changes)
    assert acquittal(changed) == why_not
    assert is_infected(changed) is (not why_not)


def test_spread_by_hand() -> None:
    assert spread(torch.ones(8, 8)) == pytest.approx(1.0)
    assert spread(torch.eye(8)) == pytest.approx(1.0)  # along each axis as even as can be
    corner = torch.zeros(8, 8)
    corner[6:, 6:] = 0.5
    assert spread(corner) == pytest.approx((2 * 0.25 / (2 * 63 / 12)) ** 0.5)
    single = torch.zeros(5, 9)
    single[2, 3] = 1.0
    assert spread(single) == 0.0
    assert spread(torch.ones(1, 1)) == 1.0  # the whole image
