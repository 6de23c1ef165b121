"""Guards over the toy net, and detectors that find what they are told to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from guard import CalibratedDetector, Guard, Predictor
from guard.detectors import Detector, Inspection, Strip
from tests.guard.models import predictor
from tests.toy import ENTROPY_THRESHOLD, ToyNet, toy_images, toy_trigger

REJECTED = [1, 3, 5, 7]
"""Rows of `mixed` that carry the trigger."""


def mixed(count: int = 8) -> Tensor:
    images, _ = toy_images(count, seed=6)
    images[1::2] = toy_trigger(images[1::2])
    return images


def detector(answers: Predictor | None = None, count: int = 40) -> CalibratedDetector:
    return CalibratedDetector(Strip(answers or predictor(), toy_images(count, seed=1)[0]), -ENTROPY_THRESHOLD)


def guarded(answers: Predictor | None = None, **options: Any) -> Guard:
    return Guard(answers or predictor(), [detector()], **options)


@dataclass(frozen=True)
class Scripted(Detector):
    """A detector that finds what it was told to, or raises."""

    find: Callable[[Tensor], Tensor]
    title: str = "scripted"

    @property
    def name(self) -> str:
        return self.title

    def score(self, images: Tensor) -> Tensor:
        return self.find(images)

    def inspect(self, images: Tensor, threshold: float) -> Inspection:
        scores = self.find(images)
        exact = torch.ones(len(scores), dtype=torch.bool)
        return Inspection((scores >= threshold) | ~torch.isfinite(scores), scores, exact, torch.ones(len(scores)).long())


def with_detector(find: Callable[[Tensor], Tensor], **options: Any) -> Guard:
    return Guard(predictor(), [CalibratedDetector(Scripted(find), 0.0)], **options)


def raises(images: Tensor) -> Tensor:
    raise RuntimeError("out of\nmemory")


def nan_when_dark(images: Tensor) -> Tensor:
    return torch.where(images.amax(dim=(1, 2, 3))[:, None] == 0, torch.nan, ToyNet()(images))


def values(answers: Any) -> NDArray[Any]:
    """A copy of answers of any kind."""
    return np.array(answers.detach().numpy() if isinstance(answers, Tensor) else answers)
