"""A guard by votes on a real backdoor: fewer passes than a mean's, the same rates, and what is saved."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from calibration import BlendChoice, Calibration, PassesChoice, Settings, calibrate, evaluate
from calibration.red_team import overlay_counts
from calibration.settings import check_settings
from calibration.trials import Setting, _figures
from cli.demonstration.digits import ATTACK, Digits
from guard import Guard
from guard.errors import CalibrationError

BY_VOTES = Settings(passes="votes")


@pytest.fixture(scope="module")
def voted(digits: Digits, backdoored: nn.Module) -> Calibration:
    return calibrate(backdoored, digits.clean, BY_VOTES)


def test_fewer_passes_at_the_same_rates(digits: Digits, calibration: Calibration, voted: Calibration) -> None:
    clean, triggered = (images.select(torch.arange(200)) for images in (digits.test, digits.triggered))
    pixels = clean.images(slice(None))
    exact, fewer = (
        float(made.strips[0].inspect(pixels, made.thresholds[0].value).passes.double().mean()) for made in (calibration, voted)
    )
    assert fewer < 0.9 * exact
    assert voted.mean_passes < calibration.mean_passes
    figures = evaluate(voted.guard(), clean, triggered, ATTACK.target_label)
    assert figures.guarded_attack_success_rate is not None
    assert figures.guarded_attack_success_rate.value <= 0.02
    assert figures.frr.value <= 0.03


def test_no_image_is_spent_on_more_than_the_threshold(digits: Digits, voted: Calibration) -> None:
    assert voted.strips[0].votes == 5
    assert voted.thresholds[0].images == len(digits.clean) - 100


def test_saved_and_loaded_it_decides_as_it_did(
    tmp_path: Path, digits: Digits, backdoored: nn.Module, voted: Calibration
) -> None:
    voted.save(tmp_path / "profile")
    images = torch.cat([digits.test.images(slice(0, 40)), digits.triggered.images(slice(0, 40))])
    assert Guard.load(tmp_path / "profile", backdoored)(images) == voted.guard()(images)


def test_a_guard_without_votes_writes_none_so_that_older_versions_read_it(
    tmp_path: Path, calibration: Calibration, voted: Calibration
) -> None:
    for made, expected in ((calibration, None), (voted, 5)):
        made.save(tmp_path / "profile")
        (detector,) = json.loads((tmp_path / "profile" / "guard.json").read_bytes())["detectors"]
        assert detector.get("votes") == expected
        assert ("votes" in detector) == (expected is not None)


def test_three_votes_at_least_of_each_of_a_pair(digits: Digits, backdoored: nn.Module) -> None:
    found = calibrate(backdoored, digits.clean, Settings(passes="votes", blend="logit+demeaned", frr=0.04, overlays=20))
    assert [strip.votes for strip in found.strips] == [3, 3]


@pytest.mark.parametrize(("blend", "overlays", "fewest"), [("logit", 9, "10 overlays"), ("logit+demeaned", 19, "20 overlays")])
def test_too_few_overlays_to_vote_are_refused(blend: BlendChoice, overlays: int, fewest: str) -> None:
    with pytest.raises(CalibrationError, match=f"expected at least {fewest}.* got {overlays}: use more --overlays"):
        check_settings(Settings(passes="votes", blend=blend, overlays=overlays, frr=0.04), 1_000)


@pytest.mark.parametrize("overlays", [10, 20, 40, 100])
def test_the_red_team_compares_no_setting_with_too_few_overlays_to_vote(overlays: int) -> None:
    candidates: list[tuple[BlendChoice, float | None]] = [("logit", 3.5)]
    if overlays >= 20:
        candidates.append(("logit+demeaned", None))
    for count in overlay_counts(overlays, candidates, "votes"):
        for blend, alpha in candidates:
            check_settings(Settings(passes="votes", blend=blend, alpha=alpha, overlays=count, frr=0.04), 1_000)
    assert overlay_counts(100, candidates, "exact") == [25, 50, 100]


def test_the_red_team_judges_by_votes() -> None:
    """Six of a hundred overlays hide the trigger: a mean of these does not, five votes do."""
    clean, triggered = np.full((200, 100), 1.0), np.zeros((50, 100))
    triggered[:, :6] = 2.0
    setting = Setting("logit", None, 100)
    by_mean, by_votes = (_figures(setting, [(clean, triggered)], 0.01, how).far.value for how in ("exact", "votes"))
    assert (by_mean, by_votes) == (0.0, 1.0)


def test_the_red_team_judges_sequential_passes_by_soft_votes() -> None:
    """Four overlays hide the trigger, under the others it shows a little: too little for a mean, and for a fifth vote."""
    clean, triggered = np.full((200, 100), 1.0), np.full((50, 100), 0.9)
    triggered[:, :4] = 2.0
    setting = Setting("logit", None, 100)
    ways: list[PassesChoice] = ["exact", "votes", "sequential"]
    found = [_figures(setting, [(clean, triggered)], 0.01, how).far.value for how in ways]
    assert found == [0.0, 0.0, 1.0]


def test_a_model_of_labels_takes_exact_passes(digits: Digits, backdoored: nn.Module) -> None:
    class Labels(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            labels: Tensor = backdoored(images).argmax(dim=1)
            return labels

    with pytest.raises(CalibrationError, match=r"probabilities for --passes votes, got one with labels: take --passes exact"):
        calibrate(Labels().eval(), digits.clean, BY_VOTES)
