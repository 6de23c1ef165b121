"""Every method that works by recovered triggers, or by clean images alone, through the one door."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from calibration import ImageSet
from calibration.checkpoints import Checkpoints
from calibration.discovery import discover
from calibration.engine import Engine
from calibration.fine_tuning import TrainableCopy
from calibration.inspection.triggers import Triggers
from calibration.repair import methods, unlearning
from calibration.repair.cases import clean_parts
from calibration.repair.figures import figure_rows, is_reliable, remarks
from calibration.repair.record import Method
from calibration.repair.repair import Repaired, repair
from calibration.repair.settings import RepairSettings
from calibration.repair.tuning import Tuning
from calibration.repair.unlearning import put_drawn, repair_by_unlearning
from cli.demonstration.digits import ATTACK, Digits
from guard import Predictor
from guard.errors import InspectionError, RepairError
from guard.predictors import wrap

TARGET = ATTACK.target_label


@pytest.fixture(scope="module")
def original(digits: Digits, backdoored: nn.Module) -> Predictor:
    return discover(wrap(backdoored), digits.clean)


@pytest.fixture(scope="module")
def recovered() -> Triggers:
    """The true trigger, as a scan would give it."""
    grey = torch.full((1, 1, 8, 8), 0.5)
    mask = (ATTACK.trigger(grey) != grey)[0].float()
    return Triggers(
        torch.tensor([TARGET]), torch.tensor([-1]), mask, ATTACK.trigger(grey), torch.ones(1), torch.zeros(1, dtype=torch.int64)
    )


def attack_success(predictor: Predictor, digits: Digits) -> float:
    others = digits.triggered.images(torch.nonzero(digits.triggered.known_labels != TARGET).squeeze(1))
    return float((predictor(others).argmax(dim=1) == TARGET).double().mean())


def accuracy(predictor: Predictor, digits: Digits) -> float:
    answers = predictor(digits.test.images(slice(None))).argmax(dim=1)
    return float((answers == digits.test.known_labels).double().mean())


@pytest.mark.parametrize("method", ["unlearn", "prune"])
def test_a_recovered_trigger_is_removed(
    method: Method, digits: Digits, original: Predictor, recovered: Triggers, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = RepairSettings(method=method, rounds=1, epochs=8 if method == "unlearn" else None)
    made = repair(original, digits.clean, settings, triggers=recovered)
    assert attack_success(original, digits) >= 0.95
    assert attack_success(made.predictor, digits) <= 0.1
    assert accuracy(made.predictor, digits) >= accuracy(original, digits) - 0.03
    figures = made.figures
    assert figures.recovered_triggers == 1
    assert figures.recovered_success_before is not None
    assert figures.recovered_success_before >= 0.95
    assert figures.recovered_success_after is not None
    assert figures.recovered_success_after <= 0.1
    assert is_reliable(figures)
    assert "recovered triggers work after, at most" in [row[0] for row in figure_rows(figures)]
    assert any("the attacker's own may differ" in text for text in remarks(figures, None))
    assert made.triggers is not None


def test_without_triggers_the_model_is_scanned_first(
    digits: Digits, original: Predictor, recovered: Triggers, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[ImageSet] = []

    def find(task: methods.Task) -> Triggers:
        seen.append(ImageSet(task.clean.tuning.images))
        return recovered

    monkeypatch.setattr("calibration.repair.repair.find_triggers", find)
    made = repair(original, digits.clean, RepairSettings(method="prune"))
    assert made.figures.recovered_triggers == 1
    assert len(seen) == 1


def test_a_model_without_an_infected_label_has_nothing_to_unlearn(
    digits: Digits, original: Predictor, recovered: Triggers, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Nothing:
        infected = recovered.select([])

    monkeypatch.setattr(methods, "scan", lambda *_, **__: Nothing())
    with pytest.raises(RepairError, match=r"no label infected.*a method that needs none, like gym"):
        repair(original, digits.clean, RepairSettings(method="unlearn"))


def test_what_is_left_after_a_round_is_unlearnt_together_with_what_was_found_before(
    digits: Digits, original: Predictor, recovered: Triggers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unlearning, "TURNS", 1)
    elsewhere = Triggers(
        recovered.labels, recovered.sources, recovered.masks.flip(-1), recovered.patterns, recovered.success, recovered.passes
    )
    rounds: list[int] = []

    def again(copied: TrainableCopy, before: Triggers, number: int) -> Triggers:
        rounds.append(number)
        return elsewhere if number == 1 else elsewhere.select([])

    unlearnt = repair_by_unlearning(
        TrainableCopy.of(original),
        original,
        clean_parts(digits.clean, original, 0),
        recovered,
        Tuning(epochs=1),
        Engine(),
        0,
        again,
        5,
    )
    assert rounds == [1, 2]
    assert len(unlearnt) == 2


def test_what_was_unlearnt_is_not_lost_where_the_look_for_more_decides_nothing(
    digits: Digits, original: Predictor, recovered: Triggers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def undecided(*_: object) -> None:
        raise InspectionError("expected triggers for more than half")

    monkeypatch.setattr(methods, "scan_again", undecided)
    settings = RepairSettings(method="unlearn", epochs=1, max_accuracy_drop=100.0)
    made = repair(original, digits.clean, settings, triggers=recovered)
    assert made.figures.recovered_success_after is not None
    said = "Whether further triggers are left was not found out: expected triggers for more than half."
    assert said in made.figures.said


@pytest.mark.slow
def test_a_trigger_that_was_recovered_badly_will_do(
    digits: Digits, original: Predictor, recovered: Triggers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that lies beside the true one, hardly works, and without turns leaves most of the backdoor."""
    beside, parts = replace(recovered, masks=recovered.masks.roll((-1, -1), (1, 2))), clean_parts(digits.clean, original, 0)
    left = {}
    for turns in (1, unlearning.TURNS):
        monkeypatch.setattr(unlearning, "TURNS", turns)
        copied = TrainableCopy.of(original)
        repair_by_unlearning(copied, original, parts, beside, unlearning.TUNING, Engine(), 0)
        left[turns] = attack_success(copied.predictor, digits)
        assert accuracy(copied.predictor, digits) >= accuracy(original, digits) - 0.03
    assert left[1] >= 0.5
    assert left[4] <= 0.02


def test_triggers_are_drawn_for_each_image() -> None:
    masks = torch.stack([torch.zeros(2, 2), torch.ones(2, 2)])
    both = Triggers(
        torch.tensor([0, 1]),
        torch.tensor([-1, -1]),
        masks,
        torch.ones(2, 1, 2, 2),
        torch.ones(2),
        torch.zeros(2, dtype=torch.int64),
    )
    drawn = put_drawn(both, torch.zeros(64, 1, 2, 2), torch.Generator().manual_seed(0))
    white: Tensor = drawn.flatten(1).mean(dim=1)
    assert set(white.tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("method", ["fine-prune", "fine-tune", "nad", "mcr"])
def test_clean_images_alone_will_do(method: Method, digits: Digits, original: Predictor, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, method)
    made: Repaired = repair(original, digits.clean, RepairSettings(method=method, epochs=2), checkpoints=checkpoints)
    assert made.figures.agreement >= 0.6  # after two epochs; what each is worth stands in its own tests
    assert made.figures.recovered_success_after is None
    assert not torch.equal(made.predictor(digits.test.images(slice(0, 8))), original(digits.test.images(slice(0, 8))))
    if method in ("fine-prune", "mcr"):
        assert made.figures.said


@pytest.mark.parametrize(("method", "known"), [("unlearn", True), ("prune", False)])
def test_too_few_images_for_its_scans_are_refused_before_any_work(
    digits: Digits, original: Predictor, recovered: Triggers, method: Method, known: bool
) -> None:
    some = digits.clean.select(torch.arange(60))
    settings = RepairSettings(method=method, allow_missing_classes=True)
    with pytest.raises(RepairError, match=f"at least 72 different clean images for {method}, .*, got 60: add images"):
        repair(original, some, settings, triggers=recovered if known else None)


@pytest.mark.parametrize("method", ["unlearn", pytest.param("gdm", marks=pytest.mark.slow)])
def test_few_images_get_more_epochs_and_the_target_is_not_forgotten(
    original: Predictor, recovered: Triggers, digits: Digits, method: Method
) -> None:
    shown: list[tuple[str, int]] = []
    few = digits.clean.select(torch.arange(150))
    settings = RepairSettings(method=method, rounds=1, max_accuracy_drop=100.0)
    made = repair(original, few, settings, triggers=recovered, progress=lambda what, _, total: shown.append((what, total)))
    assert max(total for what, total in shown if "unlearning" in what or "tuning" in what) >= 50  # 4 steps an epoch
    targets = digits.test.select(torch.nonzero(digits.test.known_labels == TARGET).flatten()).images(slice(None))
    assert float((made.predictor(targets).argmax(dim=1) == TARGET).double().mean()) >= 0.7
    assert made.figures.forgotten_labels == ()
