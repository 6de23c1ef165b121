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
from guard.detectors.boundaries import SoftVotes, by_all, soft_vote_scores
from guard.errors import CalibrationError, TooFewImagesError

SEQUENTIAL = Settings(passes="sequential")
VOTES = 3


def entropies(count: int, seed: int, overlays: int = 60) -> NDArray[np.float64]:
    """Inputs differ in how far overlays confuse the model, overlays in how far they do."""
    drawn = np.random.default_rng(seed)
    sure, strong = drawn.beta(2.0, 3.0, (count, 1)), np.linspace(0.2, 1.0, overlays)[None]
    return 2.0 * np.clip(sure + strong + 0.3 * drawn.normal(size=(count, overlays)), 0.0, 2.0)


def chosen(table: NDArray[np.float64], threshold: float, frr: float) -> Boundaries:
    boundaries = choose_boundaries(table, threshold, VOTES, frr)
    assert boundaries is not None
    return boundaries


def limits(table: NDArray[np.float64], boundaries: Boundaries | None = None) -> NDArray[np.float64]:
    """The lowest entropy thresholds that reject; without boundaries those of all passes."""
    found = soft_vote_scores(torch.from_numpy(table.copy()), boundaries or by_all(VOTES, table.shape[1]))
    return -found.double().numpy()


@pytest.fixture(scope="module")
def sequential(digits: Digits, backdoored: nn.Module) -> Calibration:
    return calibrate(backdoored, digits.clean, SEQUENTIAL)


def test_inputs_at_the_threshold_mostly_get_the_verdict_of_all_passes() -> None:
    table, others = entropies(1000, 0), entropies(20_000, 1)
    limit = float(np.quantile(limits(table), 0.01))
    boundaries = chosen(table, limit, 0.01)
    rejected, by_all_passes = limits(others, boundaries) <= limit, limits(others) <= limit
    assert np.mean(~rejected & by_all_passes) < 0.5 * np.mean(by_all_passes)  # at the threshold; a trigger's lie far below
    at_the_rate = float(np.quantile(limits(others, boundaries), 0.01))  # as the threshold is set, for all stages together
    assert 0.8 * limit < at_the_rate <= limit
    assert boundaries.ends[-1] == 60
    assert boundaries.votes == VOTES
    assert np.all(np.diff(boundaries.accept) >= 0.0)


def test_the_order_is_led_by_the_overlays_that_tell_soonest() -> None:
    table = np.zeros((50, 5))
    table[:, 3], table[:25, 1], table[25:, 2] = 0.09, 9.0, 9.0
    assert order_for_boundaries(table, 0.1, 2)[0] == 3  # most of a vote for every image; the others, one for half of them
    assert order_for_boundaries(table, 0.2, 2)[0] in (1, 2)  # a hundredth of a vote


def test_what_all_overlays_leave_at_nothing_has_no_part() -> None:
    table = entropies(400, 2)
    table[:20] = 0.0
    boundaries = chosen(table, 1.0, 0.06)
    assert all(np.isfinite(boundaries.accept))
    assert min(boundaries.accept) > 0.0


def test_nothing_is_chosen_where_entropies_are_all_alike() -> None:
    assert choose_boundaries(np.full((300, 20), 0.5), 0.7, VOTES, 0.01) is None
    mostly_none = np.zeros((300, 20))
    mostly_none[60:] = 1.0
    assert choose_boundaries(mostly_none, 1.5, VOTES, 0.25) is None


def test_an_input_needs_more_than_two_votes_and_as_many_as_there_would_be_at_this_rate() -> None:
    """Even where clean images have next to none by then, as all their votes come late."""
    table = np.zeros((300, 60))
    table[:, -VOTES - 1 :] = np.linspace(1.0, 2.0, 300)[:, None]
    boundaries = chosen(table, 1.01, 0.01)
    for end, accept in list(zip(boundaries.ends, boundaries.accept, strict=True))[:-1]:
        assert accept == pytest.approx(max(2 / VOTES, end / 60))
    assert boundaries.accepting_ends[0] == 3


@pytest.mark.parametrize("hiding", [1, 2])
def test_overlays_that_hide_a_trigger_let_nothing_in_where_they_come_first(hiding: int) -> None:
    """Under them the model is as uncertain as can be, under all others certain."""
    table = entropies(1000, 0)[:, ::-1]
    limit = float(np.quantile(limits(table), 0.01))
    boundaries = chosen(table, limit, 0.01)
    triggered = np.zeros((1, 60))
    triggered[:, :hiding] = 100.0
    assert limits(triggered, boundaries).tolist() == [0.0]


def test_a_model_that_hardly_tells_images_apart_has_no_sequential_passes(digits: Digits) -> None:
    last = nn.Linear(64, 10)
    nn.init.zeros_(last.weight)
    with pytest.raises(CalibrationError, match=r"by the blend logit: the entropies .* too much alike; take --passes exact$"):
        calibrate(nn.Sequential(nn.Flatten(), last).eval(), digits.clean, SEQUENTIAL)


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
    assert figures.guarded_attack_success_rate.value <= 0.05  # 97 images of 8x8 pixels set the threshold
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

    with pytest.raises(CalibrationError, match="for --passes sequential, got one with labels: take --passes exact"):
        calibrate(Labels().eval(), digits.clean, SEQUENTIAL)


def test_both_blends_of_a_pair_stop_early(digits: Digits, backdoored: nn.Module) -> None:
    settings = Settings(passes="sequential", blend="logit+demeaned", frr=0.04)
    found = calibrate(backdoored, digits.clean, settings)
    assert all(strip.boundaries is not None and strip.boundaries.ends[-1] == 50 for strip in found.strips)


def test_evidence_closes_at_the_stage_not_at_the_end_of_the_batch(sequential: Calibration, digits: Digits) -> None:
    """A lone input's first call runs several stages at once; its verdict is that of one by one."""
    strip, threshold, boundaries = sequential.strips[0], sequential.thresholds[0].value, sequential.strips[0].boundaries
    assert boundaries is not None
    images = digits.test.images(slice(0, 30))
    table = strip.pass_entropies(images)
    at_once, one_by_one = (SoftVotes(30, boundaries, threshold) for _ in range(2))
    at_once.add(table)
    for column in table.unbind(dim=1):
        one_by_one.add(column[torch.from_numpy(one_by_one.rows)].unsqueeze(1))
    assert torch.equal(at_once.scores, one_by_one.scores)
    torch.testing.assert_close(replace(strip, stage_rows=1).inspect(images, threshold).scores, at_once.scores)
