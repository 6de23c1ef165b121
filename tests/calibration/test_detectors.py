"""Profiles without STRIP, and what can't be asked for."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor, nn

from calibration import Calibration, DetectorChoice, Settings, calibrate
from calibration.settings import check_settings
from calibration.statistics import proportion
from calibration.thresholds import joint_rate
from cli.demonstration.digits import Digits, save_exported
from export.original import Original
from guard import Guard, load_profile
from guard.errors import CalibrationError, ProfileError, TooFewImagesError
from guard.predictors import load_backend
from guard.profile import ModelRecord, save_profile

SQUEEZING = Settings(detectors=("feature-squeezing",), frr=0.04)


@pytest.fixture(scope="module")
def squeezing(digits: Digits, backdoored: nn.Module) -> Calibration:
    return calibrate(backdoored, digits.clean, SQUEEZING)


def test_all_images_set_the_threshold_of_feature_squeezing(digits: Digits, squeezing: Calibration) -> None:
    (threshold,) = squeezing.thresholds
    assert (threshold.images, threshold.frr, squeezing.most_passes, squeezing.mean_passes) == (len(digits.clean), 0.04, 4, 4.0)
    rate = joint_rate(squeezing.thresholds)
    refused = [not verdict.accepted for verdict in squeezing.guard()(digits.test.images(slice(None)))]
    found = proportion(sum(refused), len(refused))
    assert found.low <= rate.high
    assert found.high >= rate.low


def test_a_profile_without_overlays_survives_the_disk(
    tmp_path: Path, digits: Digits, backdoored: nn.Module, clean_twin: nn.Module, squeezing: Calibration
) -> None:
    squeezing.save(tmp_path / "profile")
    profile, arrays = load_profile(tmp_path / "profile")
    assert set(arrays) == {"probe.images", "probe.probabilities"}
    images = digits.test.images(slice(0, 100))
    expected = squeezing.guard()(images)
    assert Guard.load(tmp_path / "profile", backdoored)(images) == expected
    assert 0 < sum(verdict.suspicious for verdict in expected) < 20

    def another(batch: Tensor) -> Tensor:
        answers: Tensor = clean_twin(batch)
        return answers

    with pytest.raises(ProfileError, match="answers differently than at calibration"):
        Guard.load(tmp_path / "profile", another)
    del arrays["probe.images"]
    save_profile(profile, arrays, tmp_path / "profile")
    with pytest.raises(ProfileError, match=r"expected the array strip\.overlays"):
        Guard.load(tmp_path / "profile", backdoored)


def test_it_can_be_exported(tmp_path: Path, digits: Digits, backdoored: nn.Module) -> None:
    save_exported(backdoored, digits.train.images(slice(0, 2)), tmp_path / "model.pt2")
    record = ModelRecord(kind="torch-export", output="logits", num_classes=10, file="model.pt2")
    made = calibrate(load_backend(tmp_path / "model.pt2"), digits.clean, SQUEEZING, record=record)
    made.save(tmp_path / "profile", tmp_path / "model.pt2")
    original = Original.load(tmp_path / "profile")
    assert original.compare(original.predictor.backend) < 1e-5


def test_a_rate_at_which_squeezing_can_reject_nothing_is_refused(digits: Digits, backdoored: nn.Module) -> None:
    few = msgspec.structs.replace(SQUEEZING, frr=0.002)  # some clean answers turn round completely
    with pytest.raises(CalibrationError, match=r"rejected by feature squeezing: .* drop --detector"):
        calibrate(backdoored, digits.clean, few)


@pytest.mark.parametrize(
    ("detectors", "options", "images", "message"),
    [
        ((), {}, 500, "expected at least one detector, got none"),
        (("strip", "strip"), {}, 500, "expected each detector once, got strip, strip"),
        (
            ("feature-squeezing",),
            {},
            98,
            r"at least 99 clean images, got 98: add images, allow a higher rate$",
        ),
        (
            ("strip", "feature-squeezing"),
            {},
            298,
            "2 detectors together needs at least 199 clean images besides the overlays",
        ),
        (
            ("strip", "feature-squeezing"),
            {"blend": "logit+demeaned", "triggers": 1},
            498,
            "for 4 detectors together needs at least 399 .*, got 398: .*, or use fewer detectors",
        ),
        ((), {"triggers": 1, "overlays": 0}, 500, "at least 2 overlays, got 0"),
    ],
)
def test_what_can_not_be_asked_for(
    detectors: tuple[DetectorChoice, ...], options: dict[str, object], images: int, message: str
) -> None:
    settings = msgspec.convert({"detectors": detectors, **options}, Settings)
    with pytest.raises(CalibrationError, match=message) as caught:
        check_settings(settings, images)
    if isinstance(caught.value, TooFewImagesError):
        check_settings(settings, images + 1)


def test_feature_squeezing_needs_no_overlays() -> None:
    check_settings(Settings(detectors=("feature-squeezing",), overlays=0), 99)


@pytest.mark.usefixtures("one_order")
def test_the_overlays_are_those_of_strip_alone(digits: Digits, backdoored: nn.Module) -> None:
    """And its threshold, at its share of the rate, is the same as if it were alone with that."""
    alone = calibrate(backdoored, digits.clean, Settings(frr=0.04))
    both = calibrate(backdoored, digits.clean, Settings(detectors=("strip", "feature-squeezing"), frr=0.08))
    assert torch.equal(both.strips[0].overlays, alone.strips[0].overlays)
    assert both.thresholds[0] == alone.thresholds[0]
