"""CoDefend on a digit classifier with a real backdoor."""

from __future__ import annotations

import torch

from calibration.repair.codefend import old_answers
from cli.demonstration.digits import ATTACK, Digits
from guard import Predictor
from tests.calibration.repair.conftest import Case


def share(predictor: Predictor, images: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((predictor(images).argmax(dim=1) == wanted).double().mean())


def test_the_backdoor_is_gone_and_the_digits_are_read_as_before(case: Case, digits: Digits) -> None:
    triggered, true = digits.triggered.images(slice(150, None)), digits.triggered.known_labels[150:]
    target = torch.full_like(true, ATTACK.target_label)
    clean, labels = digits.test.images(slice(None)), digits.test.known_labels
    assert share(case.original, triggered, target) >= 0.95
    assert share(case.repaired.predictor, triggered, target) <= 0.05
    before = share(case.original, clean, labels)
    assert share(case.repaired.predictor, clean, labels) >= before - 0.03
    assert share(case.repaired.predictor, triggered, true) >= 0.9 * before


def test_the_original_is_as_it_was(case: Case) -> None:
    assert case.original.backend.fingerprint() == case.fingerprint
    assert case.repaired.predictor.backend.fingerprint() != case.fingerprint


def test_what_the_defender_sees_tells_the_same_story(case: Case) -> None:
    figures = case.repaired.figures
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
    case.repaired.check()


def test_the_trigger_that_was_learnt_is_the_trigger(case: Case) -> None:
    learnt = case.repaired.learnt[0]
    change = learnt.triggered - learnt.clean
    corner = change[:, 0, -3:, -3:].abs().mean()
    elsewhere = change[:, 0, :-3, :-3].abs().mean()
    assert float(learnt.triggered[:, 0, -3:, -3:].mean()) > 0.85
    assert float(corner) > 8.0 * float(elsewhere)
    assert float(learnt.cleaned[:, 0, -3:, -3:].mean()) < 0.6


def test_old_answers_are_those_of_most_of_the_quarantine() -> None:
    labels = torch.tensor([3] * 60 + [5] * 35 + [0, 1, 2, 4, 6])
    assert torch.nonzero(old_answers(labels, 8)).flatten().tolist() == [3, 5]
