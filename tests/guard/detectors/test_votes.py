"""STRIP by votes: its score, verdicts that are the score's in whatever order, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from guard.detectors import Boundaries, Strip
from guard.errors import CalibrationError
from guard.predictors import Predictor
from tests.guard.detectors.test_boundaries import random_draws, stopping
from tests.guard.detectors.test_strip import KEYED, Table, inspected

VOTES = 4


def voting(draws: Tensor, stage_rows: int = 1) -> tuple[Strip, Tensor, Table]:
    strip, images, table = stopping(draws, stage_rows, boundaries=None)
    return replace(strip, votes=VOTES), images, table


@pytest.mark.parametrize("seed", range(3))
def test_the_score_is_minus_the_kth_highest_entropy(seed: int) -> None:
    strip, images, _ = voting(random_draws(seed))
    highest = np.sort(strip.pass_entropies(images).numpy(), axis=1)[:, -VOTES]
    assert torch.equal(strip.score(images), torch.from_numpy(-highest.astype(np.float32)))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("stage_rows", [1, 5, 1000])
def test_verdicts_are_the_scores(seed: int, stage_rows: int) -> None:
    """However the batch is cut, and at whichever threshold."""
    strip, images, table = voting(random_draws(seed), stage_rows)
    for scores, expected, found in inspected(strip, images, table):
        assert (found.scores >= scores)[~expected].all()  # "at least so many bits"
        assert torch.equal(found.scores[expected], scores[expected])
        assert (found.passes[expected] == 12).all()


def test_the_order_of_the_overlays_turns_no_score() -> None:
    strip, images, _ = voting(random_draws(0))
    backwards = replace(strip, overlays=strip.overlays.flip(0))
    assert torch.equal(backwards.score(images), strip.score(images))


def test_an_input_is_accepted_at_its_last_vote() -> None:
    draws = torch.zeros(2, 12)
    draws[0, [0, 2, 3, 6, 9]] = 0.5  # one bit each
    draws[1, [1, 4, 5]] = 0.5
    strip, images, _ = voting(draws)
    found = strip.inspect(images, -0.9)
    assert found.exceeds.tolist() == [False, True]
    assert found.exact.tolist() == [False, True]
    assert 7 <= int(found.passes[0]) < 12
    assert int(found.passes[1]) == 12
    assert float(found.scores[1]) == 0.0  # its fourth highest
    assert not bool(strip.inspect(images, -1.1).exceeds.logical_not().any())  # nothing is over 1.1 bits


def test_the_first_stage_holds_as_many_overlays_as_can_accept() -> None:
    strip, images, table = voting(torch.full((10, 12), 0.5))
    assert strip.inspect(images, -0.5).passes.tolist() == [VOTES] * 10
    assert table.calls == 1


def test_a_single_confusing_overlay_is_no_reason_to_accept() -> None:
    """Where the sum of a mean's would be enough: 9 classes, all as likely, under three of twelve overlays."""
    answers = torch.zeros(1, 12, 9)
    answers[:, :, 0] = 1.0
    answers[:, :3] = 1.0 / 9.0
    strip, images, _ = stopping(torch.zeros(1, 12), boundaries=None)
    strip = replace(strip, predictor=Predictor(Table(answers), KEYED, 9, "probabilities"))
    assert not bool(strip.inspect(images, -0.5).exceeds)
    assert bool(replace(strip, votes=VOTES).inspect(images, -0.5).exceeds)


def test_an_answer_of_nan_before_the_votes_are_in_rejects() -> None:
    draws = torch.full((2, 12), 0.5)
    draws[0, 1], draws[1, 11] = math.nan, math.nan
    strip, images, _ = voting(draws)
    found = strip.inspect(images, -0.5)
    assert found.exceeds.tolist() == [True, False]
    assert math.isnan(float(found.scores[0]))


@pytest.mark.parametrize("count", [0, -1, 13])
def test_votes_are_of_its_overlays(count: int) -> None:
    strip, _, _ = voting(torch.zeros(1, 12))
    with pytest.raises(CalibrationError, match=f"expected 1 to 12 votes of as many overlays, got {count}"):
        replace(strip, votes=count)


def test_votes_are_of_probabilities_and_without_boundaries() -> None:
    strip, _, table = voting(torch.zeros(1, 12))
    with pytest.raises(CalibrationError, match="for --passes votes, got one with labels: take --passes exact"):
        replace(strip, predictor=Predictor(table, KEYED, 2, "labels"))
    with pytest.raises(CalibrationError, match="expected boundaries or votes, got both"):
        replace(strip, boundaries=Boundaries(votes=4, ends=(12,), accept=(1.0,), reject=(1.0,)))
