"""A latency budget: what is decided by then stands, what is not is treated as the policy says."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from guard import CalibratedDetector, Guard, Policy
from guard.detectors import FeatureSqueezing, Strip
from guard.errors import InputError
from guard.predictors import Predictor, wrap
from tests.guard.detectors.test_boundaries import BOUNDARIES
from tests.toy import ENTROPY_THRESHOLD, SPEC, ToyNet, toy_images, toy_trigger


@dataclass
class Clock:
    """A second a row, and not one more."""

    now: float = 100.0
    rows: list[int] = field(default_factory=list)

    def taking(self, model: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The model, timed."""

        def run(batch: Tensor) -> Tensor:
            self.rows.append(len(batch))
            self.now += len(batch)
            return model(batch)

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(time, "monotonic", lambda: found.now)
    return found


def mixed() -> Tensor:
    """Two clean images, then two triggered ones."""
    images, _ = toy_images(4, seed=2)
    return torch.cat([images[:2], toy_trigger(images[2:])])


def strip(clock: Clock) -> Strip:
    overlays, _ = toy_images(40, seed=1)
    return Strip(Predictor(wrap(clock.taking(ToyNet())), SPEC, 4, "logits"), overlays)


def guarded(clock: Clock, seconds: float | None, **policy: Any) -> Guard:
    return Guard(
        Predictor(wrap(ToyNet()), SPEC, 4, "logits"),
        [CalibratedDetector(strip(clock), -ENTROPY_THRESHOLD)],
        policy=Policy(latency_budget=seconds, **policy),
    )


def test_what_is_decided_by_then_stands_and_the_rest_had_no_time(clock: Clock) -> None:
    verdicts = guarded(clock, 70.0)(mixed())
    assert [verdict.reason for verdict in verdicts] == [None, None, "out-of-time", "out-of-time"]
    assert [verdict.accepted for verdict in verdicts] == [True, True, False, False]
    assert [verdict.failed for verdict in verdicts] == [False, False, True, True]
    assert not any(verdict.suspicious for verdict in verdicts)
    finding = verdicts[3].finding("strip")
    assert finding is not None
    assert (finding.late, finding.exact, math.isnan(finding.score)) == (True, False, True)
    assert 10 < finding.passes < 40
    assert sum(clock.rows) <= 70
    assert clock.now <= 170.0  # nobody was looked at once more


@pytest.mark.parametrize("policy", [{"on_error": "accept"}, {"mode": "monitor"}])
def test_the_policy_decides_about_the_rest(clock: Clock, policy: dict[str, Any]) -> None:
    verdicts = guarded(clock, 70.0, **policy)(mixed())
    assert [(verdict.accepted, verdict.reason) for verdict in verdicts[2:]] == [(True, "out-of-time")] * 2


@pytest.mark.parametrize("seconds", [1000.0, None])
def test_with_time_enough_nothing_changes(clock: Clock, seconds: float | None) -> None:
    verdicts = guarded(clock, seconds)(mixed())
    assert [verdict.reason for verdict in verdicts] == [None, None, "backdoor-suspected", "backdoor-suspected"]
    assert not any(finding.late for verdict in verdicts for finding in verdict.findings)


def test_a_stage_that_would_end_too_late_is_not_begun(clock: Clock) -> None:
    found = strip(clock).inspect_by(mixed()[2:], -ENTROPY_THRESHOLD, clock.now + 30.0)
    assert found.late is not None
    assert found.late.tolist() == [True, True]
    assert 20 <= sum(clock.rows) <= 30
    assert found.exceeds.tolist() == [True, True]


def test_another_detector_that_found_it_is_believed(clock: Clock) -> None:
    first = CalibratedDetector(strip(clock), -ENTROPY_THRESHOLD)
    second = CalibratedDetector(replace(strip(clock), name="strip-late"), -ENTROPY_THRESHOLD)
    predictor = Predictor(wrap(ToyNet()), SPEC, 4, "logits")
    verdicts = Guard(predictor, [first, second], policy=Policy(latency_budget=130.0))(mixed())
    assert [verdict.reason for verdict in verdicts[2:]] == ["backdoor-suspected"] * 2
    assert [item.late for item in verdicts[2].findings] == [False, True]


def test_a_detector_of_one_stage_is_not_begun_after_the_end(clock: Clock) -> None:
    detector = FeatureSqueezing(Predictor(wrap(clock.taking(ToyNet())), SPEC, 4, "logits"))
    in_time = detector.inspect_by(mixed(), 0.5, clock.now + 1.0)
    assert torch.equal(in_time.scores, detector.inspect(mixed(), 0.5).scores)
    rows = sum(clock.rows)
    late = detector.inspect_by(mixed(), 0.5, clock.now)
    assert sum(clock.rows) == rows
    assert late.late is not None
    assert late.late.tolist() == late.exceeds.tolist() == [True] * 4
    assert late.scores.isnan().all()


def test_sequential_passes_need_less_time(clock: Clock) -> None:
    exact = replace(strip(clock), overlays=toy_images(12, seed=1)[0], stage_rows=1)
    early = replace(exact, boundaries=BOUNDARIES)
    found = [item.inspect_by(mixed()[2:], -ENTROPY_THRESHOLD, clock.now + 15.0) for item in (exact, early)]
    assert [item.late.tolist() for item in found if item.late is not None] == [[True, True], [False, False]]
    assert found[1].exceeds.tolist() == [True, True]


def test_what_was_found_is_not_lost_when_there_is_no_time_for_a_second_look(clock: Clock) -> None:
    """The model that answers fails on one image, and with it on the batch; STRIP has found the triggers by then."""

    def fails(batch: Tensor) -> Tensor:
        if len(batch) > 1:
            raise RuntimeError("one of them is bad")
        answers: Tensor = ToyNet()(batch)
        return answers

    answering = Predictor(wrap(fails), SPEC, 4, "logits")
    detectors = [CalibratedDetector(strip(clock), -ENTROPY_THRESHOLD)]
    for seconds in (500.0, 200.0, 130.0):  # for both looks; for the first and a part of the second; for the first
        clock.rows.clear()
        policy = Policy(latency_budget=seconds, on_error="accept")
        verdicts = Guard(answering, detectors, policy=policy)(mixed())
        assert [verdict.suspicious for verdict in verdicts] == [False, False, True, True]
        assert not any(verdict.accepted for verdict in verdicts[2:])
        assert not any(verdict.reason == "out-of-time" for verdict in verdicts)
        assert sum(clock.rows) <= seconds


def test_an_image_without_an_answer_has_failed_however_little_time_there_was(clock: Clock) -> None:
    def nothing(batch: Tensor) -> Tensor:
        answers: Tensor = ToyNet()(batch).masked_fill((batch.mean(dim=(1, 2, 3)) > 0.9).unsqueeze(1), math.nan)
        return answers

    overlays, _ = toy_images(40, seed=1)
    detector = Strip(Predictor(wrap(clock.taking(nothing)), SPEC, 4, "logits"), overlays)
    images = torch.cat([torch.ones(1, *SPEC.shape), mixed()[2:]])
    found = detector.inspect_by(images, -ENTROPY_THRESHOLD, clock.now + 60.0)
    assert found.late is not None
    assert found.late.tolist() == [False, True, True]
    assert found.exceeds.tolist() == [True] * 3


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf, 10**400, "1"])
def test_a_budget_that_is_no_time_is_refused(seconds: float) -> None:
    with pytest.raises(InputError, match="expected a latency budget of more than 0 seconds"):
        Policy(latency_budget=seconds)
