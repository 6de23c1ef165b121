"""The answer to the images themselves rides in STRIP's first batch where the same model gives both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from guard import CalibratedDetector, Guard
from guard.detectors import Strip
from guard.predictors import Predictor, wrap
from guard.predictors.predictor import ACTIVATIONS_PER_INPUT
from guard.preprocessors import Flip
from tests.guard.models import predict_function
from tests.toy import ENTROPY_THRESHOLD, SPEC, ToyNet, toy_images, toy_trigger

OVERLAYS = toy_images(40, seed=1)[0]


class Counted:
    def __init__(self, model: Callable[[Tensor], Tensor]) -> None:
        self.model, self.rows = model, list[int]()

    def __call__(self, batch: Tensor) -> Tensor:
        self.rows.append(len(batch))
        return self.model(batch)


def mixed(count: int = 3) -> Tensor:
    images, _ = toy_images(count, seed=2)
    return torch.cat([images, toy_trigger(images)])


def guarded(model: Counted, watched: Counted | None = None, **options: Any) -> Guard:
    predictor = Predictor(wrap(model), SPEC, 4, "logits")
    detecting = predictor if watched is None else Predictor(wrap(watched), SPEC, 4, "logits")
    return Guard(predictor, [CalibratedDetector(Strip(detecting, OVERLAYS), -ENTROPY_THRESHOLD)], **options)


@pytest.mark.parametrize("count", [1, 3])
def test_one_call_does_for_the_first_stage_and_the_answer(count: int) -> None:
    alone, riding = Counted(ToyNet()), Counted(ToyNet())
    images = mixed(count)
    strip = Strip(Predictor(wrap(alone), SPEC, 4, "logits"), OVERLAYS)
    expected, answers = strip.inspect(images, -ENTROPY_THRESHOLD), strip.predictor(images)
    verdicts = guarded(riding)(images)
    assert riding.rows[0] == alone.rows[0] + len(images)
    assert riding.rows[1:] == alone.rows[1:-1]
    assert [verdict.passes for verdict in verdicts] == expected.passes.tolist()
    assert [verdict.suspicious for verdict in verdicts] == expected.exceeds.tolist()
    torch.testing.assert_close(torch.tensor([verdict.probabilities for verdict in verdicts]), answers, atol=1e-6, rtol=1e-5)


def test_another_model_or_a_preprocessor_answers_by_itself() -> None:
    answering, watched = Counted(ToyNet()), Counted(ToyNet())
    guarded(answering, watched)(mixed())
    assert answering.rows == [6]
    flipped = Counted(ToyNet())
    verdicts = guarded(flipped, preprocessor=Flip())(mixed())
    assert flipped.rows[-1] == 6
    expected = ToyNet()(mixed().flip(3)).argmax(dim=1).tolist()
    assert [verdict.label_index for verdict in verdicts] == expected


def test_labels_alone_are_asked_for_apart() -> None:
    spec = msgspec.structs.replace(SPEC, container="numpy")
    predictor = Predictor(wrap(predict_function(spec, "labels")), spec, 4, "labels")
    verdicts = Guard(predictor, [CalibratedDetector(Strip(predictor, OVERLAYS), -0.1)])(mixed())
    assert [verdict.label_index for verdict in verdicts] == ToyNet()(mixed()).argmax(dim=1).tolist()


def test_a_small_memory_holds_them_in_turn() -> None:
    model = Counted(ToyNet())
    predictor = Predictor(wrap(model), SPEC, 4, "logits", memory_limit=8 * 8 * 4 * ACTIVATIONS_PER_INPUT * 3)
    assert predictor.max_rows == 3
    verdicts = Guard(predictor, [CalibratedDetector(Strip(predictor, OVERLAYS), -ENTROPY_THRESHOLD)])(mixed())
    assert max(model.rows) <= 3
    assert [verdict.accepted for verdict in verdicts] == [True] * 3 + [False] * 3


def test_a_model_that_fails_on_the_images_fails_as_ever() -> None:
    def broken(batch: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    verdicts = guarded(Counted(broken))(mixed())
    assert {verdict.reason for verdict in verdicts} == {"model-failed"}
