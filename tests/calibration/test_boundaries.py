"""Boundaries from clean images: what they promise on tables made for it, and a guard that stops early on a real backdoor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from calibration import Calibration, Settings, calibrate, evaluate
from calibration.boundaries import choose_boundaries, images_for_boundaries, images_needed, order_for_boundaries
from calibration.settings import check_settings
from cli.demonstration.digits import ATTACK, Digits
from guard import Guard
from guard.detectors import Boundaries
from guard.detectors.boundaries import Evidence, final_scores
from guard.errors import CalibrationError, TooFewImagesError

SEQUENTIAL = Settings(passes="sequential")


def entropies(count: int, seed: int, overlays: int = 60) -> NDArray[np.float64]:
    """Inputs differ in how far overlays confuse the model, overlays in how far they do."""
    drawn = np.random.default_rng(seed)
    sure, strong = drawn.beta(2.0, 3.0, (count, 1)), np.linspace(0.2, 1.0, overlays)[None]
    return 2.0 * np.clip(sure + strong + 0.3 * drawn.normal(size=(count, overlays)), 0.0, 2.0)


def chosen(table: NDArray[np.float64], threshold: float, frr: float) -> Boundaries:
    boundaries = choose_boundaries(table, threshold, frr)
    assert boundaries is not None
    return boundaries


@pytest.fixture(scope="module")
def sequential(digits: Digits, backdoored: nn.Module) -> Calibration:
    return calibrate(backdoored, digits.clean, SEQUENTIAL)


def test_inputs_at_the_threshold_mostly_get_the_verdict_of_all_passes() -> None:
    table, others = entropies(1000, 0), entropies(20_000, 1)
    limit = float(np.quantile(table.mean(axis=1), 0.01))
    boundaries = chosen(table, limit, 0.01)
    rejected = final_scores(torch.from_numpy(others), boundaries).numpy() >= -limit
    by_all = others.mean(axis=1) <= limit
    assert np.mean(~rejected & by_all) < 0.35 * np.mean(by_all)  # these lie at the threshold; a trigger's lie far below
    assert np.mean(rejected & ~by_all) < 0.01
    assert boundaries.ends[-1] == 60
    assert boundaries.accept[:2] == (1.0, 1.0)
    assert np.all(np.diff(boundaries.accept[2:]) >= 0.0)


def test_the_order_is_led_by_the_overlays_that_tell_soonest() -> None:
    table = np.zeros((50, 5))
    table[:, 3], table[:25, 1], table[25:, 2] = 0.9, 1.5, 1.4
    assert order_for_boundaries(table, 0.1)[0] == 3  # 8 x 0.1: enough for every image, where the others do for half of them


def test_what_all_overlays_leave_at_nothing_has_no_part() -> None:
    table = entropies(400, 2)
    table[:20] = 0.0
    boundaries = chosen(table, 1.0, 0.06)
    assert all(np.isfinite(boundaries.accept))
    assert min(boundaries.accept) > 0.0


def test_nothing_is_chosen_where_entropies_are_all_alike() -> None:
    assert choose_boundaries(np.full((300, 20), 0.5), 0.5, 0.01) is None
    mostly_none = np.zeros((300, 20))
    mostly_none[60:] = 1.0
    assert choose_boundaries(mostly_none, 1.0, 0.25) is None
    assert choose_boundaries(np.ones((300, 1)), 0.5, 0.01) is None


def test_nothing_is_accepted_whose_mean_so_far_is_not_over_the_threshold() -> None:
    """Not even where clean images gain all their entropy late."""
    table = np.zeros((300, 20))
    table[:, -1] = np.linspace(1.0, 2.0, 300)
    boundaries = chosen(table, 0.051, 0.01)
    assert boundaries.accept[2:5] == pytest.approx([3 / 20, 4 / 20, 5 / 20])


def test_one_overlay_that_hides_a_trigger_lets_nothing_in_where_it_comes_first() -> None:
    """Under it the model is as uncertain as on clean inputs, under all others certain."""
    table, others = (entropies(count, seed)[:, ::-1] for count, seed in ((1000, 0), (5000, 1)))
    limit = float(np.quantile(table.mean(axis=1), 0.01))
    boundaries = chosen(table, limit, 0.01)
    triggered = np.zeros_like(others)
    triggered[:, 0] = others[:, 0]
    assert np.all(final_scores(torch.from_numpy(triggered), boundaries).numpy() >= -limit)


@pytest.mark.parametrize("overlays", [2, 3])
def test_with_hardly_any_overlays_nothing_is_accepted_early(overlays: int) -> None:
    table = entropies(400, 3, overlays)
    boundaries = chosen(table, float(np.quantile(table.mean(axis=1), 0.01)), 0.01)
    assert boundaries.accept == (1.0,) * overlays


@pytest.mark.parametrize(("count", "used"), [(301, 300), (1200, 300), (1600, 400), (2400, 600), (90_000, 600)])
def test_how_many_images_choose(count: int, used: int) -> None:
    assert images_for_boundaries(count) == used


@pytest.mark.parametrize("setting", [1, 99, 899, 901, 1000, 1800, 5000])
def test_how_many_images_are_needed(setting: int) -> None:
    needed = images_needed(setting)
    assert needed - images_for_boundaries(needed) >= setting
    assert needed - 1 - images_for_boundaries(needed - 1) < setting


def test_too_few_images_say_how_many() -> None:
    message = "sequential passes need at least 399 clean images besides the overlays, 300 of them for boundaries, got 398"
    with pytest.raises(TooFewImagesError, match=message) as caught:
        check_settings(SEQUENTIAL, 498)
    check_settings(SEQUENTIAL, caught.value.needed + SEQUENTIAL.overlays)
    with pytest.raises(TooFewImagesError, match="got 20"):
        check_settings(SEQUENTIAL, 120)


def test_few_passes_for_clean_and_triggered_inputs_alike(
    digits: Digits, calibration: Calibration, sequential: Calibration
) -> None:
    exact, early = (item.strips[0] for item in (calibration, sequential))
    for images, fewer in ((digits.test, 0.75), (digits.triggered, 0.25)):
        pixels = images.images(slice(0, 200))
        (before, _), (after, _) = (
            (strip.inspect(pixels, item.thresholds[0].value).passes.double().mean(), strip)
            for item, strip in ((calibration, exact), (sequential, early))
        )
        assert float(after) < fewer * float(before)
    clean, triggered = (images.select(torch.arange(200)) for images in (digits.test, digits.triggered))
    figures = evaluate(sequential.guard(), clean, triggered, ATTACK.target_label)
    assert figures.guarded_attack_success_rate is not None
    assert figures.guarded_attack_success_rate.value <= 0.02
    assert figures.frr.value <= 0.03
    assert sequential.mean_passes < calibration.mean_passes


def test_boundaries_are_chosen_on_images_that_set_no_threshold(digits: Digits, sequential: Calibration) -> None:
    assert sequential.thresholds[0].images == len(digits.clean) - 100 - 300
    assert sequential.measured == len(digits.clean) - 100  # accuracy is measured on both


def test_saved_and_loaded_it_stops_where_it_did(
    tmp_path: Path, digits: Digits, backdoored: nn.Module, sequential: Calibration
) -> None:
    sequential.save(tmp_path / "profile")
    images = torch.cat([digits.test.images(slice(0, 40)), digits.triggered.images(slice(0, 40))])
    assert Guard.load(tmp_path / "profile", backdoored)(images) == sequential.guard()(images)


def test_mean_passes_are_those_of_lone_inputs(digits: Digits, sequential: Calibration) -> None:
    strip, threshold = sequential.strips[0], sequential.thresholds[0].value
    alone = [int(strip.inspect(digits.test.images(slice(row, row + 1)), threshold).passes) for row in range(100)]
    assert np.mean(alone) == pytest.approx(sequential.mean_passes, rel=0.4)


def test_a_model_of_labels_needs_all_passes(digits: Digits, backdoored: nn.Module) -> None:
    class Labels(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            labels: Tensor = backdoored(images).argmax(dim=1)
            return labels

    with pytest.raises(CalibrationError, match="expected a model with probabilities for sequential passes, got labels"):
        calibrate(Labels().eval(), digits.clean, SEQUENTIAL)


def test_both_blends_of_a_pair_stop_early(digits: Digits, backdoored: nn.Module) -> None:
    settings = Settings(passes="sequential", blend="logit+demeaned", frr=0.04)
    found = calibrate(backdoored, digits.clean, settings)
    assert all(strip.boundaries is not None and strip.boundaries.ends[-1] == 50 for strip in found.strips)


def test_evidence_closes_at_the_stage_not_at_the_end_of_the_batch(sequential: Calibration, digits: Digits) -> None:
    """A lone input's first call runs several stages at once; its verdict is that of one by one."""
    strip, threshold = sequential.strips[0], sequential.thresholds[0].value
    images = digits.test.images(slice(0, 30))
    table = strip.pass_entropies(images)
    at_once, one_by_one = (Evidence(30, 100, strip.boundaries, threshold) for _ in range(2))
    at_once.add(table)
    for column in table.unbind(dim=1):
        one_by_one.add(column[torch.from_numpy(one_by_one.rows)].unsqueeze(1))
    assert torch.equal(at_once.scores, one_by_one.scores)
    torch.testing.assert_close(replace(strip, stage_rows=1).inspect(images, threshold).scores, at_once.scores)
