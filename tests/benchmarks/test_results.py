"""Committed results meet the figures that the README quotes from them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.datasets import SetName
from benchmarks.main_path import CHOSEN, DEVELOPMENT, REPORTED, load_report, table

MOST_PASSES = {"mnist": 10.0, "gtsrb": 25.0}


def test_the_readme_quotes_them() -> None:
    assert table() in (Path(__file__).parent.parent.parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["mnist", "gtsrb"])
def test_the_chosen_setting_reaches_its_figures(name: SetName) -> None:
    report = load_report("report", name)
    chosen = report.measurements[0]
    figures = chosen.evaluation
    assert report.recipe == REPORTED[name]
    assert (chosen.blend, chosen.alpha) == CHOSEN[name]
    assert chosen.threshold_images == 4_900
    assert figures.attack_success_rate is not None
    assert figures.far_successful is not None
    assert figures.counts.triggered_successful is not None
    assert figures.attack_success_rate.value >= 0.99
    assert figures.counts.clean >= 2_000
    assert figures.counts.triggered_successful >= 2_000
    assert figures.frr.value <= 0.015
    assert figures.far_successful.value <= 0.01
    assert chosen.mean_passes_clean <= MOST_PASSES[name]
    assert chosen.curtailed_inputs >= 10_000
    assert chosen.curtailed_verdicts_that_differ == 0


@pytest.mark.parametrize("name", ["mnist", "gtsrb"])
def test_the_setting_was_chosen_on_another_victim(name: SetName) -> None:
    choice, report = load_report("choose", name), load_report("report", name)
    assert choice.recipe == DEVELOPMENT[name]
    for field in ("target_label", "seed"):
        assert getattr(choice.recipe, field) != getattr(report.recipe, field)
    where = [(recipe.side, recipe.bottom, recipe.right) for recipe in (choice.recipe, report.recipe)]
    assert where[0] != where[1]
