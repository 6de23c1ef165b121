"""STRIP that stops early: its score by the formula, verdicts that are the score's, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from guard.detectors import Boundaries, Strip
from guard.detectors.boundaries import SoftVotes, by_all, soft_vote_scores, soft_votes
from guard.errors import CalibrationError
from guard.predictors import Predictor
from tests.guard.detectors.test_strip import KEYED, Table, inspected, keyed, peaked

BOUNDARIES = Boundaries(votes=4, ends=(2, 3, 7, 12), accept=(0.3, 0.5, 0.75, 1.0), reject=(0.0, 0.1, 0.5, 1.0))


def rejected(row: list[float], threshold: float, boundaries: Boundaries) -> bool:
    """As it is written down, stage by stage."""
    votes = [min(entropy / threshold, 1.0) ** 6 for entropy in row]
    for end, accept, reject in zip(boundaries.ends, boundaries.accept, boundaries.reject, strict=True):
        gathered = math.fsum(votes[:end])
        if gathered > accept * boundaries.votes:
            return False
        if gathered <= reject * boundaries.votes and reject > 0.0:
            return True
    raise AssertionError


def stopping(draws: Tensor, stage_rows: int = 1, boundaries: Boundaries | None = BOUNDARIES) -> tuple[Strip, Tensor, Table]:
    strip, images, table = keyed(peaked(draws), stage_rows)
    return replace(strip, boundaries=boundaries), images, table


def random_draws(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(40, 12, generator=generator) * torch.rand(40, 1, generator=generator).square() * 0.5
    draws[0] = 0.0
    draws[1, 1:] = 0.0  # all of it in the first pass
    draws[2, :-1] = 0.0  # all of it in the last
    draws[3] = 1e-30
    return draws


def strip_score(table: Tensor, boundaries: Boundaries = BOUNDARIES) -> float:
    return float(soft_vote_scores(table.double()[None], boundaries))


@pytest.mark.parametrize("seed", range(3))
def test_the_score_is_the_lowest_threshold_that_rejects(seed: int) -> None:
    strip, images, _ = stopping(random_draws(seed))
    for row, score in zip(strip.pass_entropies(images).tolist(), strip.score(images).tolist(), strict=True):
        if score < 0.0:
            assert rejected(row, -score * (1 + 1e-6), BOUNDARIES)
            assert not rejected(row, -score * (1 - 1e-6), BOUNDARIES)
        else:
            assert score == 0.0
            assert rejected(row, 1e-20, BOUNDARIES)


@pytest.mark.parametrize("seed", range(3))
def test_a_higher_threshold_accepts_nothing_that_a_lower_one_rejects(seed: int) -> None:
    table = torch.rand(200, 12, generator=torch.Generator().manual_seed(seed)).square().double() * 3.0
    before = np.zeros(200, dtype=np.bool_)
    for threshold in np.linspace(0.01, 4.0, 300):
        evidence = SoftVotes(200, BOUNDARIES, -float(threshold))
        evidence.add(table)
        found = evidence.scores.numpy() >= -np.float32(threshold)
        assert not (before & ~found).any()
        before = found
    assert before.all()


def test_half_as_unsure_is_next_to_no_vote_and_more_is_one() -> None:
    assert soft_votes(np.array([0.0, 0.5, 1.0, 2.0]), 1.0).tolist() == [0.0, 1 / 64, 1.0, 1.0]
    assert soft_votes(np.array([0.0, 1e-20, np.nan]), 0.0).tolist()[:2] == [0.0, 1.0]
    assert math.isnan(soft_votes(np.array([np.nan]), 1.0)[0])


def test_no_single_overlay_lets_an_input_in() -> None:
    """However unsure it makes the model: a mean of 1 bit over 12 overlays is over any threshold, one vote is not."""
    table = torch.zeros(12)
    for overlay in range(12):
        row = table.clone()
        row[overlay] = 12.0
        assert strip_score(row) == 0.0  # rejected at whichever threshold
    strip, images, _ = stopping(table[None], boundaries=None)
    assert float(strip.score(images)) == 0.0


def test_all_votes_are_heard_where_only_the_end_decides() -> None:
    """The lowest threshold at which the votes of all overlays are no more than K."""
    table = torch.tensor([2.0] * 4 + [1.0] * 2 + [0.0] * 6)
    for votes, limit in ((5, 2 ** (1 / 6)), (4, 64.5 ** (1 / 6))):  # 4 + 2 / h^6 = 5; 4 (2 / h)^6 + 2 / h^6 = 4
        assert strip_score(table, by_all(votes, 12)) == pytest.approx(-limit, rel=1e-6)
        assert strip_score(table.flip(0), by_all(votes, 12)) == strip_score(table, by_all(votes, 12))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("stage_rows", [1, 5, 1000])
def test_verdicts_are_the_scores(seed: int, stage_rows: int) -> None:
    """However the batch is cut, and at whichever threshold."""
    strip, images, table = stopping(random_draws(seed), stage_rows)
    for scores, expected, found in inspected(strip, images, table):
        assert (found.scores >= scores)[~expected].all()  # "at least so many bits"
        assert (found.scores <= scores)[expected].all()  # "at most"
        assert not found.exact.any()


@pytest.mark.parametrize("threshold", [math.inf, 5.0, 1e-45, 0.0, -0.0, -1e-45, -1e-30, -1.0, -1e30, -math.inf])
def test_thresholds_without_sense_do_as_the_score_says(threshold: float) -> None:
    draws = torch.full((4, 12), 0.5)
    draws[1], draws[2], draws[3] = 0.0, 1e-20, torch.arange(12) % 2 * 0.5
    strip, images, _ = stopping(draws)
    assert strip.inspect(images, threshold).exceeds.tolist() == (strip.score(images) >= threshold).tolist()


def test_both_kinds_of_input_stop_early() -> None:
    draws = torch.full((3, 12), 0.5)  # one bit a pass
    draws[1], draws[2, :2] = 0.0, torch.tensor([0.5, 0.0])
    strip, images, _ = stopping(draws)
    found = strip.inspect(images, -1.0)
    assert found.exceeds.tolist() == [False, True, False]
    assert found.passes.tolist() == [2, 3, 7]  # 2 > .3 * 4; 0 <= .1 * 4; 1, 2 and 6 votes: 6 > .75 * 4
    assert found.scores.tolist() == pytest.approx([-((2 / 1.2) ** (1 / 6)), 0.0, -(2 ** (1 / 6))], rel=1e-5)


def test_a_stage_ends_where_inputs_can_be_accepted() -> None:
    """One overlay can't give 1.2 votes, nor two over 2: ends that may only reject are not worth a call, and still do."""
    boundaries = Boundaries(votes=4, ends=(1, 2, 5, 12), accept=(0.3, 0.5, 0.5, 1.0), reject=(0.1, 0.1, 0.2, 1.0))
    draws = torch.full((2, 12), 0.5)
    draws[1, 0] = 0.0  # rejected at the first end, whatever comes after
    strip, images, table = stopping(draws, boundaries=boundaries)
    found = strip.inspect(images, -0.2)
    assert found.exceeds.tolist() == [False, True]
    assert found.passes.tolist() == [5, 5]
    assert table.calls == 1


def test_a_pass_without_an_answer_is_rejected() -> None:
    draws = torch.full((1, 12), 0.1)
    draws[0, 1] = math.nan
    strip, images, _ = stopping(draws)
    assert math.isnan(float(strip.score(images)))
    assert strip.inspect(images, -0.1).exceeds.tolist() == [True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ends": (2, 3, 12)}, "as many ends of stages"),
        ({"ends": (2, 3, 3, 12)}, "ascend"),
        ({"ends": (0, 3, 7, 12)}, "ascend"),
        ({"votes": 0}, "votes needed of fewer than all 12 overlays, got 0"),
        ({"votes": 12}, "votes needed of fewer than all 12 overlays, got 12"),
        ({"accept": (0.3, 0.5, 0.4, 1.0)}, "reject <= accept"),
        ({"accept": (0.0, 0.3, 0.75, 1.0)}, "reject <= accept"),
        ({"accept": (1.5, 0.3, 0.75, 1.0)}, "reject <= accept"),
        ({"accept": (math.nan, 0.3, 0.75, 1.0)}, "reject <= accept"),
        ({"reject": (-0.1, 0.1, 0.5, 1.0)}, "reject <= accept"),
        ({"reject": (0.0, 0.1, 0.5, 0.9)}, "1 of the last"),
    ],
)
def test_what_decides_nothing_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        msgspec.structs.replace(BOUNDARIES, **changes)


def test_boundaries_belong_to_their_overlays_and_to_probabilities() -> None:
    strip, _, table = stopping(torch.zeros(1, 12))
    with pytest.raises(CalibrationError, match="expected boundaries of 11 overlays, got 12"):
        replace(strip, overlays=strip.overlays[1:])
    with pytest.raises(CalibrationError, match="for --passes sequential, got one with labels: take --passes exact"):
        replace(strip, predictor=Predictor(table, KEYED, 2, "labels"))


@pytest.mark.parametrize("ends", [(2, 4), (2, 3, 4)])
def test_a_pass_without_an_answer_rejects_although_one_before_it_had_decided(ends: tuple[int, ...]) -> None:
    """As the score of all passes does: a stage may hold more than the first end that decides."""
    boundaries = Boundaries(
        votes=1, ends=ends, accept=(0.5,) * (len(ends) - 1) + (1.0,), reject=(0.0,) * (len(ends) - 1) + (1.0,)
    )
    entropies = torch.tensor([[1.0, 1.0, torch.nan, 1.0], [1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    evidence = SoftVotes(2, boundaries, -0.05)
    evidence.add(entropies)
    assert evidence.scores.isnan().tolist() == soft_vote_scores(entropies, boundaries).isnan().tolist() == [True, False]
    assert evidence.rows.tolist() == [0]
    assert evidence.exact.tolist() == [True, False]
