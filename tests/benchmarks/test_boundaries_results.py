"""What sequential STRIP lets in beyond all passes where chance puts an overlay first that hides the trigger."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import boundaries
from calibration.boundaries import choose_boundaries

REPORTS = boundaries.load_reports()


def tables(hidden: int) -> boundaries.Tables:
    """Under some overlays of 60 triggered inputs look as clean ones do, under all others the model is certain."""
    drawn = np.random.default_rng(0)
    choosing, clean, triggered = (
        np.clip(drawn.beta(2.0, 3.0, (count, 1)) + 0.5 + 0.3 * drawn.normal(size=(count, 60)), 0.0, 2.0)
        for count in (700, 500, 200)
    )
    triggered[:, hidden:] = 0.01
    return boundaries.Tables(choosing, clean, triggered)


def test_an_overlay_that_hides_the_trigger_is_put_first_and_lets_it_in_where_less_than_one_vote_may_accept() -> None:
    far, figures = boundaries.compare(tables(1), draws=3, overlays=60)
    assert far == 0.0
    assert len(figures) == len(boundaries.ORDERS) * len(boundaries.MORE_THAN)
    found = {(item.order, item.more_than): item for item in figures}
    assert found["worst first", 0.0].more > 0.7
    assert found["worst first", 0.0].draws_with_more == 3
    assert found["worst first", 2.0].most_more <= 0.02
    for order in boundaries.ORDERS:
        passes = [found[order, rule].clean_passes for rule in boundaries.MORE_THAN]
        assert passes == sorted(passes)
        assert passes[3] >= 3.0


def test_all_development_victims_are_measured() -> None:
    assert [report.name for report in REPORTS] == list(boundaries.NAMES)


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: report.name)
def test_the_rule_that_is_ours_lets_in_no_more_on_average(report: boundaries.Report) -> None:
    assert choose_boundaries.__defaults__ == (2.0,)
    found = {(item.order, item.more_than): item for item in report.figures}
    assert found["ours", 2.0].more <= 0.001
    assert found["random", 2.0].more <= 0.005
    assert found["worst first", 2.0].more <= 0.005
    assert found["worst two first", 2.0].more <= 0.02
    for order in boundaries.ORDERS:
        assert found[order, 2.0].more <= 0.5 * found[order, 0.0].more or found[order, 0.0].more <= 0.005
