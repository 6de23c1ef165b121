"""Plain fine-tuning: what it does to images, what it forgets, and what it leaves as it was."""

from __future__ import annotations

import msgspec
import pytest
import torch
from torch import nn

from calibration.engine import Engine
from calibration.fine_tuning import TrainableCopy
from calibration.repair.cases import Parts, clean_parts
from calibration.repair.plain_fine_tuning import OURS, PAPER, FineTuning, Moves, repair_by_fine_tuning, shifted
from calibration.repair.tuning import Tuning
from cli.demonstration.digits import Digits
from guard import Predictor
from guard.errors import RepairError
from tests.calibration.repair.channels import accuracy, digit_predictor, first, success

QUICK = msgspec.structs.replace(OURS, epochs=10)


@pytest.fixture(scope="module")
def original(backdoored: nn.Module) -> Predictor:
    return digit_predictor(backdoored)


@pytest.fixture(scope="module")
def parts(digits: Digits, original: Predictor) -> Parts:
    return clean_parts(digits.clean, original, 0)


def test_shifts_by_hand() -> None:
    image = torch.arange(1.0, 13.0).view(1, 1, 3, 4)
    padded = nn.functional.pad(image, (1, 1, 1, 1))
    wanted = {tuple(padded[0, 0, top : top + 3, left : left + 4].flatten().tolist()) for top in range(3) for left in range(3)}
    moved = shifted(image.expand(200, -1, -1, -1), 0.25, torch.Generator().manual_seed(0))
    assert {tuple(one.flatten().tolist()) for one in moved} == wanted
    assert torch.equal(shifted(image, 0.1, torch.Generator()), image)  # less than half a pixel


def test_an_epoch_shows_each_image_once_in_batches_of_about_one_size(parts: Parts) -> None:
    part = first(parts.tuning, 70)
    lessons = list(Moves(0.0, False).lessons(part, 32, 1))
    assert [len(lesson.labels) for lesson in lessons] == [24, 23, 23]
    shown = torch.cat([lesson.images for lesson in lessons]).flatten(1)
    assert sorted(shown.tolist()) == sorted(part.images.flatten(1).tolist())
    other = torch.cat([lesson.images for lesson in Moves(0.0, False).lessons(part, 32, 2)]).flatten(1)
    assert not torch.equal(shown, other)


def test_about_half_of_the_images_are_mirrored_where_that_is_asked_for() -> None:
    images = torch.arange(4.0).view(1, 1, 1, 4).expand(400, -1, -1, -1)
    mirrored = Moves(0.0, True)(images, torch.Generator().manual_seed(0))[:, 0, 0, 0] == 3.0
    assert 160 <= int(mirrored.sum()) <= 240


def test_the_trigger_goes_and_accuracy_stays(original: Predictor, parts: Parts, digits: Digits, engine: Engine) -> None:
    before, known = original.backend.fingerprint(), torch.get_rng_state()
    copied = TrainableCopy.of(original)
    repair_by_fine_tuning(copied, original, parts, FineTuning(tuning=QUICK), engine, 0)
    assert success(original, digits) == 1.0
    assert success(copied.predictor, digits) <= 0.2
    assert accuracy(copied.predictor, digits) >= accuracy(original, digits) - 0.05
    assert original.backend.fingerprint() == before
    assert torch.equal(torch.get_rng_state(), known)


def test_the_trigger_stays_where_images_are_not_moved(
    original: Predictor, parts: Parts, digits: Digits, engine: Engine
) -> None:
    """No clean digit reaches into the corner: nothing that looks there is unlearnt."""
    copied = TrainableCopy.of(original)
    repair_by_fine_tuning(copied, original, parts, FineTuning(tuning=QUICK, shift=0.0), engine, 0)
    assert success(copied.predictor, digits) >= 0.8
    assert accuracy(copied.predictor, digits) >= accuracy(original, digits) - 0.05


@pytest.mark.parametrize("tuning", [OURS, PAPER])
def test_a_few_images_are_enough_to_run(original: Predictor, digits: Digits, engine: Engine, tuning: Tuning) -> None:
    parts = clean_parts(digits.clean.select(torch.arange(50)), original, 0)
    copied = TrainableCopy.of(original)
    tuning = msgspec.structs.replace(tuning, epochs=3, rate=1e-3)
    repair_by_fine_tuning(copied, original, parts, FineTuning(tuning=tuning), engine, 0)
    assert accuracy(copied.predictor, digits) >= 0.9


def test_a_shift_that_means_nothing_is_refused() -> None:
    with pytest.raises(RepairError, match="expected a shift of 0 or more"):
        FineTuning(shift=1.0)
