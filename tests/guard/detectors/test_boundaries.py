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
from guard.detectors.boundaries import last_rounded_to
from guard.errors import CalibrationError
from guard.predictors import Predictor
from tests.guard.detectors.test_strip import KEYED, Table, inspected, keyed, peaked

LARGEST = float(np.finfo(np.float32).max)
BOUNDARIES = Boundaries(ends=(2, 3, 7, 12), accept=(0.25, 0.3, 0.75, 1.0), reject=(0.0, 0.1, 0.5, 1.0))


def by_formula(entropies: Tensor, boundaries: Boundaries) -> Tensor:
    """Minus V, image by image and stage by stage, as it is written down."""
    total, scores = entropies.shape[1], []
    for row in entropies.tolist():
        best, accepting = math.inf, 0.0
        for end, accept, reject in zip(boundaries.ends, boundaries.accept, boundaries.reject, strict=True):
            mean = math.fsum(row[:end]) / total
            if reject > 0.0:
                best = min(best, max(mean / reject, accepting))
            accepting = max(accepting, mean / accept)
        scores.append(-best)
    return torch.tensor(scores)


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


@pytest.mark.parametrize("seed", range(3))
def test_the_score_is_that_of_the_formula(seed: int) -> None:
    strip, images, _ = stopping(random_draws(seed))
    torch.testing.assert_close(strip.score(images), by_formula(strip.pass_entropies(images), BOUNDARIES))


def test_shares_of_one_are_the_exact_test() -> None:
    exact = Boundaries(ends=(1, 5, 12), accept=(1.0, 1.0, 1.0), reject=(0.0, 0.0, 1.0))
    (strip, images, _), (plain, _, _) = (stopping(random_draws(0), boundaries=item) for item in (exact, None))
    assert torch.equal(strip.score(images), plain.score(images))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("stage_rows", [1, 5, 1000])
def test_verdicts_are_the_scores(seed: int, stage_rows: int) -> None:
    """However the batch is cut, and at whichever threshold."""
    strip, images, table = stopping(random_draws(seed), stage_rows)
    for scores, expected, found in inspected(strip, images, table):
        assert (found.scores >= scores)[~expected].all()  # "at least so many bits"
        assert (found.scores <= scores)[expected].all()  # "at most"


@pytest.mark.parametrize("limit", [0.0, -0.0, 1e-45, 1.0, 1.0 + 2**-23, -0.7, 3e38, LARGEST, math.inf])
def test_what_is_decided_in_float64_is_decided_as_rounded_scores_are(limit: float) -> None:
    """The last number that counts as at the limit, and the next, which does not."""
    single = np.float32(limit)
    last = last_rounded_to(single)
    assert np.float32(last) <= single
    with np.errstate(over="ignore"):
        assert limit == math.inf or np.float32(np.nextafter(last, np.inf)) > single


def test_a_sum_that_is_infinite_in_float32_is_not_accepted_early() -> None:
    """Of a share next to nothing: its score would be minus infinity, which exceeds every threshold."""
    tiny = Boundaries(ends=(1, 2, 12), accept=(1e-40, 0.9, 1.0), reject=(0.0, 0.0, 1.0))
    strip, images, _ = stopping(torch.full((1, 12), 0.1), boundaries=tiny)
    assert int(strip.inspect(images, -0.01).passes) == 12


def test_both_kinds_of_input_stop_early() -> None:
    draws = torch.full((3, 12), 0.5)  # one bit a pass
    draws[1], draws[2, :2] = 0.0, 0.0
    strip, images, _ = stopping(draws)
    found = strip.inspect(images, -0.5)
    assert found.exceeds.tolist() == [False, True, False]
    assert found.passes.tolist() == [2, 3, 7]  # 2 > .25 * 6; 0 <= .1 * 6; 1 is between .1 and .3 of 6, and 5 > .75 * 6
    assert found.exact.tolist() == [False, True, False]


def test_a_stage_ends_where_inputs_can_be_accepted() -> None:
    """Ends before that may only reject: not worth a call of their own, and they still do."""
    boundaries = Boundaries(ends=(1, 2, 5, 12), accept=(1.0, 1.0, 0.5, 1.0), reject=(0.1, 0.1, 0.2, 1.0))
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
        ({"accept": (0.25, 0.3, 0.4, 1.0)}, "reject <= accept"),
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
    with pytest.raises(CalibrationError, match="expected a model with probabilities for sequential passes, got labels"):
        replace(strip, predictor=Predictor(table, KEYED, 2, "labels"))
