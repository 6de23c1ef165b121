"""The tripwire: after a repair the original goes on detecting, with the same verdicts, while the repaired model answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from calibration import Calibration, Hints, ImageSet, Settings, calibrate
from calibration.calibrate import Tripwire
from calibration.data import digests
from calibration.sources import open_model, open_tripwire
from cli.demonstration.digits import ATTACK, Digits, digit_net, save_exported
from export import export_mar
from guard import Guard, load_profile
from guard.errors import CalibrationError, ProfileError
from guard.predictors import wrap
from guard.preprocessors import Gym
from guard.profile import ModelRecord
from tests.guard.models import save_torchscript

SETTINGS = Settings(overlays=40)


@pytest.fixture(scope="module")
def calibration(digits: Digits, backdoored: nn.Module) -> Calibration:
    """Of the original alone."""
    return calibrate(backdoored, digits.clean, SETTINGS)


@pytest.fixture(scope="module")
def repaired(digits: Digits) -> nn.Module:
    """A model without the backdoor, as a good repair leaves one: it has seen the trigger with true labels."""
    torch.manual_seed(0)
    net = digit_net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    images, labels = digits.train.images(slice(None)), digits.train.known_labels
    for _ in range(20):
        for rows in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            both = torch.cat([images[rows], ATTACK.trigger(images[rows])])
            nn.functional.cross_entropy(net(both), labels[rows].repeat(2)).backward()
            optimizer.step()
    return net.eval()


def verdicts(guard: Guard, digits: Digits) -> list[bool]:
    images = torch.cat([digits.test.images(slice(0, 150)), digits.triggered.images(slice(0, 150))])
    return [verdict.suspicious for verdict in guard(images)]


def tripwired(repaired: nn.Module, backdoored: nn.Module, digits: Digits) -> Calibration:
    original = wrap(backdoored)
    record = ModelRecord(kind="module", output="logits", num_classes=10)
    return calibrate(repaired, digits.clean, SETTINGS, tripwire=Tripwire(original, record, Hints()))


@pytest.mark.usefixtures("one_order")
def test_the_verdicts_are_those_before_the_repair_and_the_answers_those_after(
    digits: Digits, backdoored: nn.Module, repaired: nn.Module
) -> None:
    calibration = calibrate(backdoored, digits.clean, SETTINGS)
    before = verdicts(calibration.guard(), digits)
    made = tripwired(repaired, backdoored, digits)
    guard = made.guard(seed=0)
    assert verdicts(guard, digits) == before
    assert sum(before[150:]) >= 145
    assert made.thresholds[0].value == calibration.thresholds[0].value
    without = calibrate(repaired, digits.clean, SETTINGS).guard()
    assert sum(verdicts(without, digits)[150:]) <= 0.2 * sum(before[150:])  # a model without a backdoor shows no trigger

    triggered, true = digits.triggered.images(slice(None)), digits.triggered.known_labels
    answers = guard.answer(triggered).argmax(dim=1)
    assert float((answers == true).double().mean()) >= 0.85
    assert float((answers == ATTACK.target_label).double().mean()) <= 0.05


def test_a_profile_holds_both_models(
    digits: Digits, backdoored: nn.Module, repaired: nn.Module, tmp_path: Path, calibration: Calibration
) -> None:
    example = digits.train.images(slice(0, 2))
    save_exported(backdoored, example, tmp_path / "original.pt2")
    save_exported(repaired, example, tmp_path / "repaired.pt2")
    source = open_model(str(tmp_path / "repaired.pt2"), None, tmp_path)
    tripwire, file = open_tripwire(str(tmp_path / "original.pt2"), None, tmp_path, Hints())
    made = calibrate(source.backend, digits.clean, SETTINGS, record=source.record, tripwire=tripwire)
    made.save(tmp_path / "profile", source.file, tripwire_file=file)
    names = {path.name for path in (tmp_path / "profile").iterdir()}
    assert names == {"guard.json", "arrays.safetensors", "model.pt2", "tripwire.pt2"}
    guard = Guard.load(tmp_path / "profile")
    assert verdicts(guard, digits) == verdicts(calibration.guard(), digits)
    assert export_mar(tmp_path / "profile", tmp_path / "store", "digits").is_file()

    profile, _ = load_profile(tmp_path / "profile")
    assert profile.tripwire is not None
    assert profile.tripwire.model.file == "tripwire.pt2"
    made.save(tmp_path / "profile", source.file, tripwire_file=file)  # a profile is replaced
    (tmp_path / "profile" / "tripwire.pt2").write_bytes((tmp_path / "repaired.pt2").read_bytes())
    with pytest.raises(ProfileError, match=r"belongs to another model \(tripwire\.pt2 differs\)"):
        Guard.load(tmp_path / "profile")
    (tmp_path / "profile" / "tripwire.pt2").unlink()
    with pytest.raises(ProfileError, match=r"expected the model tripwire\.pt2"):
        Guard.load(tmp_path / "profile")


class Otherwise(nn.Module):
    """The same net, with something done to its answers."""

    def __init__(self, net: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.net, self.change = net, change
        self.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.change(self.net(images))


def test_a_tripwire_of_other_classes_is_refused(digits: Digits, backdoored: nn.Module, repaired: nn.Module) -> None:
    record = ModelRecord(kind="module", output="logits", num_classes=9)
    with pytest.raises(CalibrationError, match="expected a tripwire of 10 classes, got 9"):
        calibrate(
            repaired,
            digits.clean,
            Settings(),
            tripwire=Tripwire(wrap(Otherwise(backdoored, lambda answers: answers[:, :9])), record, Hints()),
        )


def test_images_that_a_repair_learnt_from_set_no_threshold_of_its_own_and_measure_nothing(
    digits: Digits, backdoored: nn.Module
) -> None:
    clean = digits.clean
    known = digests(clean.images(slice(None)))
    learnt, half = frozenset(known[: len(known) // 2]), len(known) - len(known) // 2
    # accuracy would be flattered: the first half has the model's own answers for labels, the second half wrong ones
    own = backdoored(clean.images(slice(None))).argmax(dim=1)
    flattered = ImageSet(clean.pixels, torch.cat([own[: len(known) // 2], (own[len(known) // 2 :] + 1) % 10]))

    without = calibrate(backdoored, flattered, Settings(overlays=50, allow_missing_classes=True), learnt=learnt)
    assert without.learnt == len(learnt)
    assert without.thresholds[0].images == without.measured == half - 50
    assert without.profile.clean_accuracy == 0.0
    overlays = digests(without.strips[0].overlays)
    assert learnt.isdisjoint(overlays)

    original = Tripwire(wrap(backdoored), ModelRecord(kind="module", output="logits", num_classes=10), Hints())
    watched = calibrate(
        backdoored, flattered, Settings(overlays=50, allow_missing_classes=True), tripwire=original, learnt=learnt
    )
    assert watched.thresholds[0].images == len(known) - 50  # the tripwire has learnt from none of them
    assert watched.measured == half  # overlays are taken from the images that are good for nothing else
    assert watched.profile.clean_accuracy == 0.0

    with pytest.raises(CalibrationError, match=r"the repair learnt from \d+ of \d+ clean images.*--tripwire ORIGINAL"):
        calibrate(backdoored, clean, Settings(), learnt=frozenset(known[:-20]))


def test_a_preprocessor_that_the_model_was_tuned_for_needs_no_labels(digits: Digits, backdoored: nn.Module) -> None:
    unlabelled = ImageSet(digits.clean.pixels)
    made = calibrate(backdoored, unlabelled, Settings(), preprocessor=Gym(kernel=1))
    assert made.profile.preprocessor == Gym(kernel=1)
    assert made.profile.clean_accuracy is None
    with pytest.raises(CalibrationError, match="expected labels with the clean images"):
        calibrate(backdoored, unlabelled, Settings(preprocess="gym"))


def test_a_tripwire_that_answers_otherwise_is_refused(digits: Digits, backdoored: nn.Module, repaired: nn.Module) -> None:
    record = ModelRecord(kind="module", output="logits", num_classes=10)
    with pytest.raises(CalibrationError, match=r"answers clean images mostly as the model does, got one that does for \d+%"):
        calibrate(
            repaired,
            digits.clean,
            Settings(),
            tripwire=Tripwire(wrap(Otherwise(backdoored, lambda answers: answers.roll(1, dims=1))), record, Hints()),
        )


def test_a_tripwire_is_fed_as_the_repaired_model_is(tmp_path: Path, digits: Digits, backdoored: nn.Module) -> None:
    example = digits.train.images(slice(0, 2))
    save_exported(backdoored, example, tmp_path / "original.pt2")
    save_torchscript(backdoored, tmp_path / "repaired.pt")
    given = Hints(mean=(0.1,), std=(0.3,), dtype="uint8", layout="NHWC", output="logits", container="torch")
    answering = open_model(str(tmp_path / "repaired.pt"), None, tmp_path)
    known = open_tripwire(str(tmp_path / "original.pt2"), None, tmp_path, given, answering)[0].hints
    assert (known.dtype, known.layout, known.output, known.mean) == ("uint8", "NHWC", "logits", (0.1,))
