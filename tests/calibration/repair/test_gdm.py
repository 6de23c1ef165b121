"""GDM on digits: triggers that work are drawn from nothing but the model, and unlearnt; the true one goes with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import torch
from torch import nn

from calibration.checkpoints import Checkpoints
from calibration.engine import Engine
from calibration.fine_tuning import TrainableCopy
from calibration.repair.cases import Parts, clean_parts
from calibration.repair.gdm import TUNING, Backdoor, Gdm, GdmOutcome, repair_by_gdm
from calibration.repair.mesa import Mesa, Place, Stamp
from cli.demonstration.digits import ATTACK, Digits
from guard import Predictor
from guard.errors import RepairError
from guard.predictors import wrap
from tests.calibration.repair.conftest import SPEC

TARGET = ATTACK.target_label
CORNER, ELSEWHERE = Backdoor(TARGET, (5, 5, 3, 3)), Backdoor(3, (0, 0, 2, 2))
SETTINGS = Gdm(mesa=Mesa(levels=(0.5, 0.9), steps=120, batch=48), tuning=msgspec.structs.replace(TUNING, epochs=8))
SHORT = Gdm(mesa=Mesa(levels=(0.5, 0.9), steps=6, batch=8), tuning=msgspec.structs.replace(TUNING, epochs=3))


@dataclass(frozen=True)
class Repair:
    """What went in, and what came out."""

    original: Predictor
    parts: Parts
    copied: TrainableCopy
    outcome: GdmOutcome
    other: GdmOutcome


@pytest.fixture(scope="module")
def repair(digits: Digits, backdoored: nn.Module, engine: Engine) -> Repair:
    original = Predictor(wrap(backdoored), SPEC, 10, "logits")
    parts = clean_parts(digits.clean, original, 0)
    copied = TrainableCopy.of(original)
    outcome, other = repair_by_gdm(copied, original, parts, [CORNER, ELSEWHERE], SETTINGS, engine, 0)
    return Repair(original, parts, copied, outcome, other)


def test_the_true_trigger_is_unlearnt_and_accuracy_stays(repair: Repair, digits: Digits) -> None:
    def accuracy(predictor: Predictor) -> float:
        return float((predictor(digits.test.images(slice(None))).argmax(dim=1) == digits.test.known_labels).double().mean())

    def success(predictor: Predictor) -> float:
        return float((predictor(digits.triggered.images(slice(None))).argmax(dim=1) == TARGET).double().mean())

    assert success(repair.original) >= 0.95
    assert success(repair.copied.predictor) <= 0.1
    assert accuracy(repair.copied.predictor) >= accuracy(repair.original) - 0.03


def test_several_backdoors_are_unlearnt_together(repair: Repair) -> None:
    """One after the other, the first would come back."""
    assert (repair.outcome.backdoor, repair.other.backdoor) == (CORNER, ELSEWHERE)
    assert repair.other.triggers.shape == (2, 8, 1, 2, 2)
    assert float(repair.outcome.still_works.max()) <= 0.1
    assert float(repair.other.still_works.max()) <= 0.1


def test_triggers_of_each_level_work_until_they_are_unlearnt(repair: Repair) -> None:
    assert float(repair.outcome.works.min()) >= 0.8
    assert float(repair.outcome.still_works.max()) <= 0.1


def test_triggers_differ_and_are_patches(repair: Repair) -> None:
    triggers = repair.outcome.triggers
    assert triggers.shape == (2, 8, 1, 3, 3)
    assert triggers.min() >= 0.0
    assert triggers.max() <= 1.0
    assert float(triggers.std(dim=1).mean()) >= 0.03


def test_an_interrupted_repair_goes_on(
    repair: Repair, digits: Digits, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calibration.repair.mesa._BETWEEN", 0.0)
    before, parts = torch.get_rng_state(), clean_parts(digits.clean.select(torch.arange(60)), repair.original, 0)

    def run(checkpoints: Checkpoints | None, at: tuple[str, int] | None) -> list[torch.Tensor]:
        def interrupt(what: str, done: int, _: int) -> None:
            if (what, done) == at:
                raise KeyboardInterrupt

        copied = TrainableCopy.of(repair.original)
        repair_by_gdm(copied, repair.original, parts, [CORNER, ELSEWHERE], SHORT, engine, 0, checkpoints, interrupt)
        return [value.detach() for value in copied.parameters]

    whole, checkpoints = run(None, None), Checkpoints(tmp_path / "checkpoint", 1)
    for at in (("modelling triggers", 3), ("modelling triggers 2", 8), ("fine-tuning", 2)):
        with pytest.raises(KeyboardInterrupt):
            run(checkpoints, at)
    for ours, other in zip(run(checkpoints, None), whole, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_stamp_by_hand() -> None:
    images, generator = torch.zeros(2, 1, 4, 4), torch.Generator().manual_seed(0)
    patches = torch.tensor([[[[1.0, 2.0, 3.0]]], [[[4.0, 5.0, 6.0]]]])
    stamped = Stamp((1, 4, 4), (2, 1, 1, 3), False)(images, patches, generator)
    assert stamped[0, 0].tolist() == [[0.0] * 4, [0.0] * 4, [0.0, 1.0, 2.0, 3.0], [0.0] * 4]
    assert stamped[1, 0, 2].tolist() == [0.0, 4.0, 5.0, 6.0]
    assert float(images.abs().sum()) == 0.0


def test_scattered_stamps_lie_anywhere_in_the_image() -> None:
    generator = torch.Generator().manual_seed(0)
    stamped = Stamp((3, 5, 6), (0, 0, 2, 3), True)(torch.zeros(200, 3, 5, 6), torch.ones(200, 3, 2, 3), generator)
    assert bool((stamped.sum(dim=(1, 2, 3)) == 18.0).all())
    assert bool((stamped.amax(dim=0) == 1.0).all())
    assert len({image.numpy().tobytes() for image in stamped}) == 4 * 4


@pytest.mark.parametrize(
    ("target", "place", "message"),
    [
        (TARGET, (6, 5, 3, 3), r"got \(6, 5, 3, 3\)"),
        (TARGET, (0, 0, 0, 3), r"got \(0, 0, 0, 3\)"),
        (10, CORNER.place, "from 0 to 9, got 10"),
    ],
)
def test_what_is_not_there_is_refused(repair: Repair, engine: Engine, target: int, place: Place, message: str) -> None:
    copied = TrainableCopy.of(repair.original)
    with pytest.raises(RepairError, match=message):
        repair_by_gdm(copied, repair.original, repair.parts, [Backdoor(target, place)], SHORT, engine, 0)


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(RepairError, match="levels of success"):
        Mesa(levels=(0.0,))
    with pytest.raises(RepairError, match="at least one step"):
        Mesa(batch=1)
    with pytest.raises(RepairError, match="share of the images"):
        Gdm(share=0.0)
    with pytest.raises(RepairError, match="margin"):
        Gdm(margin=-0.5)
