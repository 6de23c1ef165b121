"""GDM by what a scan recovered: labels and places, and the whole through the one door."""

from __future__ import annotations

import msgspec
import pytest
import torch
from torch import Tensor, nn

from calibration.discovery import discover
from calibration.engine import Engine
from calibration.fine_tuning import TrainableCopy
from calibration.inspection.neural_cleanse import recover_triggers
from calibration.inspection.search import Search
from calibration.inspection.triggers import Goals, Triggers
from calibration.repair.figures import is_reliable, remarks
from calibration.repair.gdm import TUNING, Backdoor, Gdm, GdmOutcome
from calibration.repair.gdm_places import backdoors_of, bounding_box, widened
from calibration.repair.mesa import Mesa, Place
from calibration.repair.repair import repair
from calibration.repair.report import repair_report
from calibration.repair.settings import RepairSettings
from cli.demonstration.digits import ATTACK, Digits
from guard import Predictor
from guard.errors import RepairError
from guard.predictors import wrap

TARGET = ATTACK.target_label
SHORT = Gdm(mesa=Mesa(levels=(0.9,), steps=8, batch=8), tuning=msgspec.structs.replace(TUNING, epochs=2))


def triggers(labels: list[int], sources: list[int], masks: Tensor) -> Triggers:
    count = len(labels)
    patterns = torch.ones(count, 1, *masks.shape[1:])
    return Triggers(
        torch.tensor(labels), torch.tensor(sources), masks, patterns, torch.ones(count), torch.zeros(count, dtype=torch.int64)
    )


def boxes(*places: tuple[int, int, int, int]) -> Tensor:
    masks = torch.zeros(len(places), 8, 8)
    for mask, (top, left, height, width) in zip(masks, places, strict=True):
        mask[top : top + height, left : left + width] = 1.0
    return masks


@pytest.fixture(scope="module")
def original(digits: Digits, backdoored: nn.Module) -> Predictor:
    return discover(wrap(backdoored), digits.clean)


def test_the_place_that_neural_cleanse_finds_will_do(digits: Digits, original: Predictor, engine: Engine) -> None:
    """Which is not quite the true one."""
    images = digits.clean.images(slice(None))
    goals = Goals.of(torch.tensor([TARGET]))
    found = recover_triggers(TrainableCopy.of(original).answers(), images, goals, Search(steps=192), 0, engine)
    settings = Gdm(mesa=Mesa(levels=(0.5, 0.9), steps=80, batch=48))
    how = RepairSettings(method="gdm", epochs=6, gdm=settings)
    made = repair(original, digits.clean, how, triggers=found, engine=engine)
    assert backdoors_of(found, settings.margin) != [Backdoor(TARGET, (5, 5, 3, 3))]

    def success(predictor: Predictor) -> float:
        return float((predictor(digits.triggered.images(slice(None))).argmax(dim=1) == TARGET).double().mean())

    assert success(original) >= 0.95
    assert success(made.predictor) <= 0.1
    made.check()
    figures = made.figures
    assert figures.generated_triggers_work is not None
    assert figures.generated_triggers_work >= 0.8
    assert figures.recovered_success_after is not None
    assert figures.recovered_success_after <= 0.1
    assert is_reliable(figures)
    assert f"Label {TARGET}: triggers were modelled in the" in figures.said[0]
    page = repair_report(made).decode()
    assert f"The triggers that were modelled, label {TARGET}" in page
    assert "The triggers that a scan recovered" in page
    assert f'<tr><td>{TARGET}</td>\n<td class="number">{figures.recovered_success_before:.2%}</td>' in page
    assert figures.clean_accuracy_interval is not None
    assert figures.clean_accuracy_after is not None
    low, high = figures.clean_accuracy_interval
    assert low < figures.clean_accuracy_after < high <= 1.0
    assert high - low < 0.1


def test_the_box_of_a_mask() -> None:
    mask = torch.zeros(6, 7)
    mask[2:4, 3:6] = 0.8
    mask[0, 0], mask[3, 6] = 0.3, 0.45  # remains of the search, and the rim
    assert bounding_box(mask) == (2, 3, 2, 4)


def test_a_stray_pixel_is_no_part_of_a_place() -> None:
    mask = torch.zeros(12, 12)
    mask[8:11:2, 8:11:2] = 1.0  # a pixel between them
    mask[0, 0] = 0.9
    assert bounding_box(mask) == (8, 8, 3, 3)
    mask[0:2, 0] = 1.0  # half as heavy: it has two places
    assert bounding_box(mask) == (0, 0, 11, 11)


@pytest.mark.parametrize(
    ("place", "margin", "expected"),
    [
        ((10, 12, 4, 6), 0.5, (8, 9, 8, 12)),
        ((10, 12, 4, 6), 0.0, (10, 12, 4, 6)),
        ((10, 12, 1, 2), 0.25, (9, 11, 3, 4)),
        ((0, 1, 4, 6), 0.5, (0, 0, 6, 10)),
        ((28, 26, 4, 6), 0.5, (26, 23, 6, 9)),
        ((0, 0, 32, 32), 0.5, (0, 0, 32, 32)),
    ],
)
def test_a_place_is_widened_as_far_as_the_image_goes(place: Place, margin: float, expected: Place) -> None:
    assert widened(place, margin, (32, 32)) == expected


def test_labels_and_places_of_a_scan() -> None:
    corner, wider, elsewhere = (6, 6, 2, 2), (5, 5, 3, 3), (0, 0, 2, 3)
    found = triggers([7, 7, 3, 7, 7], [-1, 2, -1, 4, 1], boxes(wider, corner, corner, wider, elsewhere))
    assert backdoors_of(found, 0.0) == [Backdoor(7, wider), Backdoor(3, corner), Backdoor(7, elsewhere)]
    assert backdoors_of(found.select([2]), 0.5) == [Backdoor(3, wider)]


def test_what_is_told_of_each_label(digits: Digits, original: Predictor, engine: Engine) -> None:
    found = triggers([TARGET, 3], [-1, 2], boxes((5, 5, 3, 3), (0, 0, 2, 2)))
    settings = RepairSettings(method="gdm", gdm=msgspec.structs.replace(SHORT, margin=0.0))
    made = repair(original, digits.clean, settings, triggers=found, engine=engine)
    first, second = made.figures.said
    assert first.startswith(f"Label {TARGET}: triggers were modelled in the 3x3 pixels from row 5, column 5; they worked on ")
    assert second.startswith("Label 3: triggers were modelled in the 2x2 pixels from row 0, column 0; they worked on ")
    assert [exhibit.heading for exhibit in made.exhibits] == [
        f"The triggers that were modelled, label {TARGET}",
        "The triggers that were modelled, label 3",
    ]
    assert made.figures.recovered_triggers == 2


def test_classes_are_named() -> None:
    outcome = GdmOutcome(Backdoor(1, (0, 2, 3, 4)), torch.tensor([0.5, 0.75]), torch.tensor([0.25, 0.0]), torch.zeros(2, 1))
    assert outcome.words(("go", "stop")) == (
        "Label 1 (stop): triggers were modelled in the 3x4 pixels from row 0, column 2; they worked on 75.0% of held-out "
        "images of other labels in the original, and on 25.0% after."
    )
    assert outcome.words().startswith("Label 1: ")


def test_triggers_that_hardly_work_are_told(digits: Digits, original: Predictor, engine: Engine) -> None:
    settings = RepairSettings(method="gdm", gdm=SHORT)
    made = repair(original, digits.clean, settings, triggers=triggers([1], [-1], boxes((0, 0, 1, 1))), engine=engine)
    assert made.figures.generated_triggers_work is not None
    assert made.figures.generated_triggers_work < 0.5
    assert not is_reliable(made.figures)
    assert any("The triggers that were modelled hardly work on the original" in text for text in remarks(made.figures, None))


def test_an_empty_mask_is_refused(digits: Digits, original: Predictor, engine: Engine) -> None:
    with pytest.raises(RepairError, match="expected the mask of a trigger, got an empty one"):
        repair(
            original,
            digits.clean,
            RepairSettings(method="gdm"),
            triggers=triggers([1], [-1], torch.zeros(1, 8, 8)),
            engine=engine,
        )
