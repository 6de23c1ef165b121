"""Committed results meet the figures that the README quotes from them."""

from __future__ import annotations

import msgspec
import pytest

from benchmarks.datasets import SetName
from benchmarks.main_path import CHOSEN, DEVELOPMENT, REPORTED, RESULTS, Report

MOST_PASSES = {"mnist": 10.0, "gtsrb": 25.0}


def load(step: str, name: SetName) -> Report:
    return msgspec.json.decode((RESULTS / f"main_path_{step}_{name}.json").read_bytes(), type=Report)


@pytest.mark.parametrize("name", ["mnist", "gtsrb"])
def test_the_chosen_setting_reaches_its_figures(name: SetName) -> None:
    report = load("report", name)
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
    choice, report = load("choose", name), load("report", name)
    assert choice.recipe == DEVELOPMENT[name]
    for field in ("target_label", "seed"):
        assert getattr(choice.recipe, field) != getattr(report.recipe, field)
    where = [(recipe.side, recipe.bottom, recipe.right) for recipe in (choice.recipe, report.recipe)]
    assert where[0] != where[1]
