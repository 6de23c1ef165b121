"""Committed figures of the repair without any data: what is left of the attack, and what it cost."""

from __future__ import annotations

import pytest

from benchmarks import dhbe

REPORTS = dhbe.load_reports()


def test_all_victims_are_there() -> None:
    assert {report.name for report in REPORTS} == set(dhbe.ERASED)


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: report.name)
def test_nothing_is_left_of_the_attack_but_what_is_answered_anyway(report: dhbe.Report) -> None:
    first, last = report.curve[0].exams, report.curve[-1].exams
    assert first.marks.attack_success.value > 0.99
    assert last.marks.attack_success.value <= min(0.016, last.marks.target_share.value + 0.003)
    assert last.amplified is not None
    assert last.amplified[0].value <= max(0.0028, last.marks.target_share.value)  # of the paper's mean, or what is natural
    assert last.amplified[1].value <= (0.19 if report.plan.images == "mnist" else 0.012)  # MNIST's is a failure, and told so
    assert first.marks.accuracy.value - last.marks.accuracy.value <= 0.01
