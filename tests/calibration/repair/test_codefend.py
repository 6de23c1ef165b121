"""CoDefend on a digit classifier with a real backdoor."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import nn

from calibration.data import ImageSet
from calibration.engine import Engine
from calibration.repair.cases import Part, clean_parts
from calibration.repair.codefend import old_answers, still_triggered
from calibration.repair.cyclegan import CycleGan, Generator, Training
from calibration.repair.figures import remarks
from calibration.repair.repair import Repaired, repair
from calibration.repair.settings import RepairSettings
from cli.demonstration.digits import ATTACK, Digits
from guard import Predictor
from guard.predictors import wrap
from tests.calibration.repair.conftest import Case
from tests.toy import SPEC, LearningToy, toy_images


def share(predictor: Predictor, images: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((predictor(images).argmax(dim=1) == wanted).double().mean())


def test_the_backdoor_is_gone_and_the_digits_are_read_as_before(case: Case, repaired: Repaired, digits: Digits) -> None:
    triggered, true = digits.triggered.images(slice(150, None)), digits.triggered.known_labels[150:]
    target = torch.full_like(true, ATTACK.target_label)
    clean, labels = digits.test.images(slice(None)), digits.test.known_labels
    assert share(case.original, triggered, target) >= 0.95
    assert share(repaired.predictor, triggered, target) <= 0.05
    before = share(case.original, clean, labels)
    assert share(repaired.predictor, clean, labels) >= before - 0.03
    assert share(repaired.predictor, triggered, true) >= 0.9 * before


def test_the_original_is_as_it_was(case: Case, repaired: Repaired) -> None:
    assert case.original.backend.fingerprint() == case.fingerprint
    assert repaired.predictor.backend.fingerprint() != case.fingerprint


def test_what_the_defender_sees_tells_the_same_story(repaired: Repaired) -> None:
    figures = repaired.figures
    assert figures.clean_images == 500
    assert figures.quarantined_images == 158
    assert (figures.held_out_clean, figures.held_out_quarantined) == (100, 32)
    assert figures.attack_success_seen_before == 1.0
    assert figures.attack_success_seen_after is not None
    assert figures.attack_success_seen_after <= 0.15  # false alarms keep their answers
    assert figures.generated_triggers_work is not None
    assert figures.generated_triggers_work >= 0.9
    assert figures.agreement >= 0.93
    assert figures.rounds == 1
    assert figures.drop <= 3.0
    repaired.check()


def test_the_trigger_that_was_learnt_is_the_trigger(repaired: Repaired) -> None:
    learnt = repaired.learnt[0]
    change = learnt.triggered - learnt.clean
    corner = change[:, 0, -3:, -3:].abs().mean()
    elsewhere = change[:, 0, :-3, :-3].abs().mean()
    assert float(learnt.triggered[:, 0, -3:, -3:].mean()) > 0.85
    assert float(corner) > 8.0 * float(elsewhere)
    assert float(learnt.cleaned[:, 0, -3:, -3:].mean()) < 0.6


def test_old_answers_are_those_of_most_of_the_quarantine() -> None:
    labels = torch.tensor([3] * 60 + [5] * 35 + [0, 1, 2, 4, 6])
    assert torch.nonzero(old_answers(labels, 8)).flatten().tolist() == [3, 5]


class Pixel(nn.Module):
    """Stands for a trained generator: sets one pixel."""

    def __init__(self, column: int, value: float) -> None:
        super().__init__()
        self.column, self.value = column, value

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        changed = images.clone()
        changed[:, 0, 0, self.column] = self.value
        return changed


def test_a_trigger_that_is_left_goes_through_another_round(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
    net = LearningToy()
    with torch.no_grad():  # a white pixel at the top, in the first or the last column, means class 0
        net.learned.weight[0, [0, 7]] = 0.35
    original = Predictor(wrap(net), SPEC, 4, "logits")
    images, labels = toy_images(400)
    clean = ImageSet((images * 255).round().to(torch.uint8), labels)
    suspects, of = toy_images(216, seed=5)
    suspects = suspects[of != 0]
    quarantined = torch.cat([Pixel(0, 1.0)(suspects[:80]), Pixel(7, 1.0)(suspects[80:])])
    seen: list[torch.Tensor] = []

    def trained(_: torch.Tensor, images: torch.Tensor, *__: object) -> CycleGan:
        """Learns one trigger of two, as a generator does: that of the last column where there is only that."""
        seen.append(images)
        column = 0 if bool((images[:, 0, 0, 0] == 1.0).any()) else 7
        return CycleGan(*(cast(Generator, Pixel(column, value)) for value in (1.0, 0.15)))

    def left(predictor: Predictor, quarantined: Part, *_: object) -> torch.Tensor:
        """STRIP sees nothing in the toy, whose clean images don't scatter either."""
        return quarantined.images[predictor(quarantined.images).argmax(dim=1) == quarantined.labels]

    monkeypatch.setattr("calibration.repair.codefend.train", trained)
    monkeypatch.setattr("calibration.repair.codefend.still_triggered", left)
    made = repair(original, clean, RepairSettings(method="codefend", epochs=50), quarantined, engine=engine)
    assert made.figures.rounds == len(made.learnt) == len(seen) == 2
    assert bool((seen[0][:, 0, 0, 0] == 1.0).any())
    assert not bool((seen[1][:, 0, 0, 0] == 1.0).any())  # only what still got its old answer
    fresh, true = toy_images(80, seed=9)
    for column in (0, 7):
        others = true != 0
        triggered = Pixel(column, 1.0)(fresh[others])
        assert share(original, triggered, torch.zeros(int(others.sum()), dtype=torch.int64)) == 1.0
        assert share(made.predictor, triggered, true[others]) >= 0.95
    assert share(made.predictor, fresh, true) >= 0.95


def test_what_is_left_is_what_strip_finds_among_those_with_their_old_answers(
    case: Case, repaired: Repaired, digits: Digits
) -> None:
    sevens = digits.test.images(torch.nonzero(digits.test.known_labels == ATTACK.target_label).squeeze(1))
    triggered = digits.triggered.images(slice(0, 60))
    images = torch.cat([triggered, sevens])
    answers = case.original(images)
    part = Part(images, answers.argmax(dim=1), answers)
    assert float((part.labels == ATTACK.target_label).double().mean()) >= 0.95
    old = old_answers(part.labels, 10)
    clean = clean_parts(case.clean, case.original, 0)
    left = still_triggered(case.original, part, old, clean)
    assert len(left) >= 55
    assert (
        float((left[:, 0, -3:, -3:] == 1.0).flatten(1).all(dim=1).double().mean()) >= 0.9
    )  # hardly a seven without the trigger
    assert len(still_triggered(repaired.predictor, part, old, clean)) <= 0.1 * len(triggered)


def test_a_quarantine_of_false_alarms_is_told_and_does_no_harm(engine: Engine) -> None:
    original = Predictor(wrap(LearningToy()), SPEC, 4, "logits")
    images, labels = toy_images(300)
    clean = ImageSet((images * 255).round().to(torch.uint8), labels)
    alarms, of = toy_images(120, seed=5)
    alarms = alarms[of < 2]
    settings = RepairSettings(method="codefend", epochs=3, gan=Training(epochs=4, width=8, blocks=1))
    made = repair(original, clean, settings, alarms, engine=engine)
    assert made.figures.rounds == 1  # nothing was learnt, so nothing more is looked for
    assert (made.figures.generated_triggers_work or 0.0) < 0.5
    assert made.figures.drop <= 3.0
    assert any("Don't rely on this repair" in text for text in remarks(made.figures, made.preprocessor))


def test_what_can_not_be_measured_is_not_reported_as_nothing(engine: Engine) -> None:
    original = Predictor(wrap(LearningToy()), SPEC, 4, "logits")
    images, labels = toy_images(200)
    clean = ImageSet((images * 255).round().to(torch.uint8), labels)
    every_class, _ = toy_images(60, seed=5)
    settings = RepairSettings(method="codefend", epochs=1, gan=Training(epochs=2, width=8, blocks=1))
    made = repair(original, clean, settings, every_class, engine=engine)
    assert made.figures.generated_triggers_work is None
    assert any("can't be told" in text for text in remarks(made.figures, made.preprocessor))
