"""Committed figures of passes: few each, by votes and sequential, and as many triggers found on victims that STRIP sees."""

from __future__ import annotations

import pytest

from benchmarks import passes

REPORTS = passes.load_reports()
SEEN = [report for report in REPORTS if report.figures[0].far is not None and report.figures[0].far.value <= 0.01]
MOST = {"mnist": 4.0, "gtsrb": 10.0, "cifar10": 10.0}
"""Mean passes of a clean input, sequential."""
OVER = {"mnist-a", "mnist-conv-badnets", "mnist-all-to-all", "mnist-steganographic", "mnist-amplified"}
"""Where more than two votes take up to a pass more."""
VOTED = 16.0
"""By votes. On MNIST, 6 were asked for."""


def test_there_are_victims_of_every_set() -> None:
    assert {report.plan.images for report in SEEN} == set(MOST)


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: report.name)
def test_few_passes_for_clean_inputs_at_the_rate_asked_for(report: passes.Report) -> None:
    exact, sequential = (item for item in report.figures if item.passes != "votes")
    assert sequential.passes == "sequential"
    assert sequential.clean_passes <= MOST[report.plan.images] + (report.name in OVER)
    assert sequential.clean_passes < exact.clean_passes
    assert sequential.frr.low <= 0.0125  # the threshold's own spread, and frames of one sign that stand or fall together


@pytest.mark.parametrize("report", SEEN, ids=lambda report: report.name)
def test_few_passes_for_triggered_inputs_and_as_many_of_them_found(report: passes.Report) -> None:
    exact, sequential = (item for item in report.figures if item.passes != "votes")
    assert exact.far is not None
    assert sequential.far is not None
    assert sequential.triggered_passes is not None
    assert sequential.triggered_passes <= 16.0
    assert sequential.far.value <= exact.far.value + 0.005


@pytest.mark.parametrize("report", [item for item in REPORTS if len(item.figures) == 3], ids=lambda report: report.name)
def test_votes_take_fewer_passes_than_a_mean_and_let_in_hardly_more(report: passes.Report) -> None:
    exact, votes, _ = report.figures
    assert votes.passes == "votes"
    assert votes.clean_passes < exact.clean_passes
    assert votes.clean_passes <= VOTED
    assert votes.frr.low <= 0.0125
    if exact.far is not None and exact.far.value <= 0.01:
        assert votes.far is not None
        assert votes.far.value <= exact.far.value + 0.005
