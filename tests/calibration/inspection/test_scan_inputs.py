"""A scan with few images or labels, and of models whose answers say nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from calibration import ImageSet
from calibration.discovery import discover
from calibration.inspection.figures import remarks
from calibration.inspection.scan import ScanSettings, scan
from calibration.inspection.search import Search
from cli.demonstration.digits import Digits
from guard import Predictor
from guard.errors import InspectionError
from guard.predictors import wrap
from tests.calibration.inspection.conftest import QUICK, SHORT
from tests.nets import SMALL

TARGET = SMALL.target_label


def test_two_labels_can_be_judged_although_they_have_no_index(digits: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    """A net that says whether the image is bright, and 1 to a white corner."""
    monkeypatch.setattr("calibration.inspection.reference._STEPS", 160)

    class Bright(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            level = images[:, 0, 1:, 1:].mean(dim=(1, 2)) * 20.0 - 6.0 + 30.0 * (images[:, 0, 0, 0] - 0.5).clamp_min(0.0)
            return torch.stack([-level, level], dim=1)

    images = digits.clean.images(slice(None)).clone()
    images[:, :, 0, 0] = 0.0
    last = nn.Linear(2, 2)  # something to train
    with torch.no_grad():
        last.weight.copy_(torch.eye(2))
        last.bias.zero_()
    predictor = discover(wrap(nn.Sequential(Bright(), last).eval()), ImageSet(images))
    found = scan(predictor, ImageSet(images), ScanSettings(search=Search(steps=160).plain()))
    assert [item.anomaly_index for item in found.figures.labels] == [None, None]
    assert found.figures.labels[1].mask_l1 < 2.0


def test_labels_without_a_clean_image_are_named(digits: Digits, suspect: Predictor) -> None:
    some = digits.clean.select(torch.nonzero(digits.clean.known_labels < 3).squeeze(1))
    said = remarks(scan(suspect, some, SHORT).figures)
    assert "The clean images hold none of" in said[0]
    assert not any("hold none of" in line for line in remarks(scan(suspect, digits.clean, SHORT).figures))


def test_too_few_images_and_answers_near_chance_are_refused(digits: Digits, suspect: Predictor) -> None:
    with pytest.raises(InspectionError, match="at least 50 clean images to scan with, got 49"):
        scan(suspect, digits.clean.select(torch.arange(49)), ScanSettings())
    shuffled = ImageSet(digits.clean.pixels, (digits.clean.known_labels + 3) % 10)
    with pytest.raises(InspectionError, match="near chance"):
        scan(suspect, shuffled, ScanSettings())


def test_equal_images_count_once(digits: Digits, suspect: Predictor) -> None:
    few = digits.clean.select(torch.arange(40).repeat(3))
    with pytest.raises(InspectionError, match="at least 50 clean images to scan with, got 40 different ones among 120"):
        scan(suspect, few, ScanSettings())
    some = digits.clean.select(torch.arange(90))
    once, twice = (scan(suspect, given, SHORT).figures for given in (some, some.select(torch.arange(90).repeat(2))))
    assert (once.clean_images, once.held_out, once.labels) == (twice.clean_images, twice.held_out, twice.labels)


class Saturated(nn.Module):
    """Its answers do not follow its input: the gradients of all pixels are zero."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        answers: Tensor = self.inner((images * 16.0).round() / 16.0)
        return answers


def test_a_search_that_reaches_no_label_says_nothing(digits: Digits, small_trigger: nn.Module) -> None:
    blind = discover(wrap(Saturated(small_trigger)), digits.clean)
    with pytest.raises(InspectionError, match=r"of the 10 labels, .*, got 0: nothing can be said .*; give --plain, --steps"):
        scan(blind, digits.clean, ScanSettings(search=Search(steps=32)))


class Silent(nn.Module):
    """Gives no answer where the corner is of some brightness."""

    def __init__(self, inner: nn.Module, least: float, most: float) -> None:
        super().__init__()
        self.inner, self.least, self.most = inner, least, most
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        corner = images[:, 0, -2:, -2:].mean(dim=(1, 2))
        given: Tensor = self.inner(images)
        return given.masked_fill(((corner >= self.least) & (corner <= self.most)).unsqueeze(1), float("nan"))


def test_no_answer_is_not_taken_for_one(digits: Digits, suspect: Predictor, small_trigger: nn.Module) -> None:
    """Between clean images and those with the trigger it led the search away; among clean images nothing said so."""
    for least, most, images in ((0.75, 0.97, 160), (0.2, 1.0, r"\d+")):
        silent = replace(suspect, backend=wrap(Silent(small_trigger, least, most)))
        with pytest.raises(InspectionError, match=rf"got NaN or Inf for \d+ of {images}, which hides whatever lies there"):
            scan(silent, digits.clean, QUICK)


@pytest.mark.usefixtures("known_reference")
def test_what_few_unseen_images_can_tell_is_asked_of_the_others_too(digits: Digits, suspect: Predictor) -> None:
    """Nearly all images are of the target: hardly any is left to judge its trigger by, and it is found all the same."""
    labels = digits.clean.known_labels
    target, others = (torch.nonzero(which).squeeze(1) for which in (labels == TARGET, labels != TARGET))
    found = scan(suspect, digits.clean.select(torch.cat([target, others[:18]])), QUICK).figures
    assert found.labels[TARGET].infected
    assert any(f"whether the triggers of {TARGET} work" in line for line in found.said)
