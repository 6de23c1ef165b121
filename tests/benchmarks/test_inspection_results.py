"""Committed results of inspection, and of the repairs and filters that go by it, meet the figures that the documents quote."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from benchmarks import deep_inspect, detectors, inspection, neural_cleanse, patches, repairs
from benchmarks.plans import Plan
from benchmarks.roster import DETECTED, SCANNED

SCANS = inspection.load_reports()
PUBLISHED = neural_cleanse.load_reports()
DEEP = deep_inspect.load_reports()
PATCHES = patches.load_reports()
REPAIRS = repairs.load_reports()
DETECTED_ON = detectors.load_reports()
MISSED = {
    "cifar10-trojan-sq",  # 36 pixels, of which it needs most: clean labels need about as many
}
MOST_MISSED = 0.0163
"""Neural Cleanse's Table III: the most that its filter misses of BadNets at a false rejection rate of 5%."""


@pytest.mark.parametrize("reports", [SCANS, PUBLISHED, DEEP, PATCHES], ids=["scans", "published", "deep-inspect", "patches"])
def test_models_are_as_they_are_planned(
    reports: Sequence[inspection.Report | neural_cleanse.Report | deep_inspect.Report | patches.Report],
) -> None:
    plans: dict[str, Plan] = {report.name: report.plan for report in reports}
    assert all(SCANNED[name] == plan for name, plan in plans.items())


@pytest.mark.parametrize("report", SCANS, ids=lambda report: report.name)
def test_a_scan_misses_nothing_and_accuses_nobody(report: inspection.Report) -> None:
    if report.name in MISSED:
        assert not report.found
    else:
        assert report.right


@pytest.mark.parametrize("report", PATCHES, ids=lambda report: report.name)
def test_patches_accuse_no_clean_model_and_find_what_masks_miss(report: patches.Report) -> None:
    """A trigger that is no square, or larger, may be missed; masks find those. In one, others come too near the target's."""
    assert report.found - set(report.targets) == ({0, 2} if report.name == "cifar10-two-triggers" else set())
    if report.name in MISSED:
        assert report.right


def test_labels_that_the_attacker_did_not_aim_at_are_shown_to_have_his_shortcut() -> None:
    beside = {report.name: {item.label_index for item in report.beside} for report in SCANS if report.beside}
    assert beside == {"gtsrb-yellow": {12, 14}, "gtsrb-eight-targets": {39}}
    for report in SCANS:
        assert report.found - set(report.targets) == beside.get(report.name, set())


@pytest.mark.parametrize("report", SCANS, ids=lambda report: report.name)
def test_labels_that_leave_save_most_of_the_passes(report: inspection.Report) -> None:
    labels = report.figures.labels
    share = sum(item.passes for item in labels) / (len(labels) * 1008 * 32)
    assert share <= (0.30 if len(labels) == 43 else 0.5)


def test_published_runs_have_three_seeds_and_every_labels_index() -> None:
    for report in PUBLISHED:
        assert [run.seed for run in report.runs] == [0, 1, 2]
        assert {len(run.indices) for run in report.runs} == {43 if report.plan.images == "gtsrb" else 10}


@pytest.mark.parametrize("report", DETECTED_ON, ids=lambda report: report.name)
def test_a_filter_sees_the_attackers_trigger(report: detectors.Report) -> None:
    found = report.of("activation-filter")
    if not found.gave_up and DETECTED[report.name].attack == "badnets":
        assert found.far_at_paper_rate is not None
        assert found.far_at_paper_rate.value <= MOST_MISSED


@pytest.mark.parametrize("report", [item for item in REPAIRS if item.method == "unlearn"], ids=lambda report: report.name)
def test_unlearning_reaches_the_papers_figures(report: repairs.Report) -> None:
    assert report.after is not None
    assert report.after.marks.attack_success.value <= 0.067  # Table IV
    assert report.drop is not None
    assert report.drop <= 3.6
    assert all(item.value <= 0.05 for item in report.after.each)  # nine triggers for one label
