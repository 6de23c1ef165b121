"""The figures, computed by hand on a handful of judged inputs."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch

from calibration import Calibration, ImageSet
from calibration.evaluation import Judged, align_sets, evaluate, judge, summarise
from cli.demonstration.digits import ATTACK, Digits
from guard import Guard
from guard.errors import InputError


def judged(answers: list[int], rejected: list[bool], scores: list[float]) -> Judged:
    return Judged(torch.tensor(answers), torch.tensor(rejected), np.array(scores), np.array([scores], dtype=np.float32))


CLEAN = judged([0, 1, 2, 0, -1], [False, True, False, False, True], [-2.0, -0.1, -3.0, -1.5, np.nan])
CLEAN_LABELS = torch.tensor([0, 1, 1, 0, 1])
# true labels 7 are the target's own: they count nowhere
TRIGGERED = judged([7, 7, 3, 7, 7], [True, False, False, True, False], [-0.01, -1.0, -2.0, -0.02, -0.5])
TRUE_LABELS = torch.tensor([1, 2, 3, 4, 7])


def test_rates_by_hand() -> None:
    figures = summarise(CLEAN, CLEAN_LABELS, TRIGGERED, TRUE_LABELS, 7)
    values = {
        name: getattr(figures, name).value
        for name in (
            "clean_accuracy",
            "guarded_clean_accuracy",
            "frr",
            "attack_success_rate",
            "guarded_attack_success_rate",
            "far",
            "far_successful",
            "auroc",
        )
    }
    assert values == pytest.approx(
        {
            "clean_accuracy": 3 / 5,  # 0, 1 and the second 0
            "guarded_clean_accuracy": 2 / 5,  # the 1 was rejected
            "frr": 2 / 5,  # no answer is a rejection
            "attack_success_rate": 3 / 4,
            "guarded_attack_success_rate": 1 / 4,
            "far": 2 / 4,
            "far_successful": 1 / 3,
            "auroc": 11 / 12,  # of -0.01, -1, -0.02 against -2, -0.1, -3, -1.5 only -1 against -0.1 is the wrong way round
        }
    )
    assert figures.counts.triggered == 4
    assert figures.counts.triggered_successful == 3
    assert figures.counts.successful_accepted == 1


def test_without_attack_and_labels_the_rest_is_none() -> None:
    figures = summarise(CLEAN, None, None, None, None)
    assert figures.frr.value == pytest.approx(0.4)
    assert figures.clean_accuracy is None
    assert figures.far is None
    assert figures.auroc is None


def test_an_attack_that_never_succeeds_has_no_far_among_successes() -> None:
    figures = summarise(CLEAN, CLEAN_LABELS, judged([1, 2], [False, False], [-1.0, -1.0]), torch.tensor([1, 2]), 7)
    assert figures.attack_success_rate is not None
    assert figures.attack_success_rate.value == 0.0
    assert figures.far_successful is None
    assert figures.auroc is None


def test_every_figure_lies_in_its_interval(digits: Digits, calibration: Calibration) -> None:
    clean, triggered = (images.select(torch.arange(200)) for images in (digits.test, digits.triggered))
    figures = evaluate(calibration.guard(), clean, triggered, ATTACK.target_label)
    for name in ("clean_accuracy", "frr", "far", "auroc", "attack_success_rate"):
        estimate = getattr(figures, name)
        assert 0.0 <= estimate.low <= estimate.value <= estimate.high <= 1.0
        assert estimate.low < estimate.high


def test_judging_agrees_with_serving(digits: Digits, calibration: Calibration) -> None:
    guard = calibration.guard()
    some = digits.triggered.select(torch.arange(60))
    seen = judge(guard, some, "")
    verdicts = guard(some.images(slice(None)))
    assert seen.rejected.tolist() == [not verdict.accepted for verdict in verdicts]
    assert seen.answers.tolist() == [verdict.label_index for verdict in verdicts]


def test_sets_that_do_not_fit_are_refused(digits: Digits, calibration: Calibration) -> None:
    guard = calibration.guard()
    with pytest.raises(InputError, match="--target"):
        align_sets(guard, digits.test, digits.triggered, None)
    with pytest.raises(InputError, match="0 to 9"):
        align_sets(guard, digits.test, digits.triggered, 10)
    with pytest.raises(InputError, match="true labels"):
        align_sets(guard, digits.test, ImageSet(digits.triggered.pixels), 7)
    with pytest.raises(InputError, match="expected images of shape"):
        align_sets(guard, ImageSet(torch.zeros(3, 3, 8, 8, dtype=torch.uint8)), None, None)
    with pytest.raises(InputError, match="other than the target"):
        summarise(CLEAN, CLEAN_LABELS, judged([7], [False], [0.0]), torch.tensor([7]), 7)


def test_labels_of_folders_are_matched_by_name(digits: Digits, calibration: Calibration) -> None:
    """A folder without the target's sub-folder shifts the positions of those after it."""
    guard = calibration.guard()
    names = tuple(str(label) for label in range(10) if label != ATTACK.target_label)
    true = digits.triggered.known_labels
    shifted = ImageSet(digits.triggered.pixels, torch.where(true > ATTACK.target_label, true - 1, true), names)
    _, aligned = align_sets(guard, digits.test, shifted, ATTACK.target_label)
    assert aligned is not None
    assert torch.equal(aligned.known_labels, true)
    with pytest.raises(InputError, match="expected class folders that the profile knows, got 'eleven'"):
        align_sets(guard, ImageSet(digits.test.pixels, digits.test.labels, ("eleven",) * 10), None, None)
    with pytest.raises(InputError, match="expected labels from 0 to 9, got 10"):
        align_sets(guard, ImageSet(digits.test.pixels, digits.test.known_labels + 1), None, None)


def test_triggered_images_that_no_figure_counts_are_in_no_picture_either(digits: Digits, calibration: Calibration) -> None:
    guard, triggered = calibration.guard(), digits.triggered
    _, counted = align_sets(guard, digits.test, triggered, 3)
    assert counted is not None
    assert torch.equal(counted.pixels, triggered.pixels[triggered.known_labels != 3])
    assert len(counted) < len(triggered)
    own = triggered.select(torch.nonzero(triggered.known_labels == 3).squeeze(1))
    with pytest.raises(InputError, match="other than the target"):
        align_sets(guard, digits.test, own, 3)


def test_equal_class_names_stay_where_they_are(calibration: Calibration, digits: Digits) -> None:
    """ImageNet has two cranes."""
    names = ("crane", *map(str, range(1, 9)), "crane")
    spec = msgspec.structs.replace(calibration.predictor.spec, class_names=names)
    guard = Guard(replace(calibration.predictor, spec=spec), [])
    test = replace(digits.test, class_names=names)
    aligned, _ = align_sets(guard, test, None, None)
    assert torch.equal(aligned.known_labels, digits.test.known_labels)
    with pytest.raises(InputError, match=r"expected class names that differ, .*got 'crane' of several classes"):
        align_sets(guard, replace(test, class_names=(names[1], names[0], *names[2:])), None, None)
