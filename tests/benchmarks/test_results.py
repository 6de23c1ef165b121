"""Committed results of the guard, CoDefend and GYM meet the figures that the documents quote from them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import codefend, gym, gym_cost, red_team, strip
from benchmarks.roster import REPORTED
from calibration.repair.gym import lightweight

RESULTS = Path(strip.__file__).parent / "results"
REPORTS = strip.load_reports()
CHOICES = red_team.load_reports()
REPAIRED = codefend.load_reports()
TUNED = gym.load_reports()
COSTS = gym_cost.load_costs()
PATCHES = {
    "mnist-a",
    "mnist-conv-badnets",
    "mnist-amplified",
    "gtsrb-b",
    "gtsrb-lenet8-noise",
    "gtsrb-multi-target",
    "cifar10-c",
    "cifar10-d",
    "cifar10-two-triggers",
    "cifar10-trojan-sq",
    "cifar10-trojan-wm",
}
WHITE_ON_WHITE = {"gtsrb-lenet8", "gtsrb-lenet8-rim", "cifar10-clean-label"}
"""White patches where many images are white already: there the trigger is hardly in the image."""


def test_every_victim_is_reported_as_it_is_planned() -> None:
    assert {report.name: report.plan for report in REPORTS} == dict(REPORTED)
    assert len(REPORTS) >= 14
    assert {report.plan.images for report in REPORTS} == {"mnist", "gtsrb", "cifar10"}


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: report.name)
def test_a_victim_carries_its_backdoor_and_works_as_well_as_its_clean_twin(report: strip.Report) -> None:
    success = report.evaluation.attack_success_rate
    assert success is not None
    assert success.value >= report.plan.lowest_success
    assert report.accuracy >= report.twin_accuracy - 0.015
    assert report.accuracy >= report.plan.lowest_accuracy


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: report.name)
def test_the_false_rejection_rate_is_at_its_target(report: strip.Report) -> None:
    assert report.threshold_images == 4_900
    assert report.evaluation.frr.value <= 0.015
    assert report.curtailed_verdicts_that_differ == 0


@pytest.mark.parametrize("report", [item for item in REPORTS if item.name in PATCHES], ids=lambda report: report.name)
def test_patch_triggers_are_seen(report: strip.Report) -> None:
    assert report.evaluation.far_successful is not None
    assert report.evaluation.far_successful.value <= 0.01


@pytest.mark.parametrize("report", [item for item in REPORTS if item.name in WHITE_ON_WHITE], ids=lambda report: report.name)
def test_white_patches_are_seen_where_they_show(report: strip.Report) -> None:
    assert report.far_where_it_shows is not None
    assert report.far_where_it_shows.value <= 0.01


def test_the_red_team_chooses_as_well_as_hindsight_on_eight_of_ten() -> None:
    assert [report.name for report in CHOICES] == list(red_team.VICTIMS)
    assert sum(report.within for report in CHOICES) >= 8


def test_the_false_rejection_rate_is_at_its_target_after_choosing() -> None:
    rates = [report.calibrated.evaluation.frr for report in CHOICES]  # each of 1,500 images, so only together of use
    assert 0.0075 <= sum(rate.value for rate in rates) / len(rates) <= 0.0125
    assert all(rate.low <= 0.0125 for rate in rates)


def test_every_victim_of_codefend_and_gym_is_reported_as_it_is_planned() -> None:
    assert [report.name for report in REPAIRED] == list(codefend.VICTIMS)
    assert [report.name for report in TUNED] == list(gym.VICTIMS)
    assert all(report.plan == REPORTED[report.name] for report in REPAIRED)
    assert all(report.plan == REPORTED[report.name] for report in TUNED)


@pytest.mark.parametrize("report", REPAIRED, ids=lambda report: report.name)
def test_codefend_reaches_the_papers_figures(report: codefend.Report) -> None:
    assert report.stream.quarantined == report.figures.clean_images == 500
    assert report.stream.false_alarms > 0  # not hand-picked
    assert report.before.attack_success.value >= 0.98
    assert report.after.attack_success.value <= codefend.HIGHEST_SUCCESS[report.name]
    assert report.drop <= 1.1


@pytest.mark.parametrize("report", TUNED, ids=lambda report: report.name)
def test_gym_reaches_the_papers_figures_with_four_draws_averaged(report: gym.Report) -> None:
    paper, ours = gym.PAPER[report.name], report.of("distilled", 5_000).averaged
    assert ours is not None
    if report.name == "cifar10-trojan-sq":  # cat, which so many clean images are taken for anyway
        assert paper.attack_success_after < ours.target_share.value
        assert ours.attack_success.value <= ours.target_share.value + 0.01
    else:
        assert ours.attack_success.value <= paper.attack_success_after
    lost = report.before.accuracy.value - ours.accuracy.value
    assert lost <= paper.accuracy - paper.accuracy_after


def test_gyms_lightweight_function_is_light() -> None:
    assert COSTS is not None
    assert all(cost.share < 0.15 for cost in COSTS.costs if cost.kernel == lightweight((3, 32, 32)).kernel)


def test_no_result_knows_where_it_was_made() -> None:
    files = sorted(RESULTS.rglob("*.json"))
    assert files
    assert not [file.name for file in files if re.search(r"(?<![\w.:/])/\w+/\w", file.read_text(encoding="utf-8"))]
