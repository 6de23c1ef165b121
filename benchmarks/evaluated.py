"""Accuracy and attack success of a model, bare or through a preprocessor, on images that it never saw."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import msgspec
import numpy as np
import torch
from torch import Tensor

from benchmarks.datasets import Parts
from benchmarks.strip import shuffled
from benchmarks.victims import triggered_images
from calibration.attacks import Attack
from calibration.data import ImageSet
from calibration.statistics import Estimate, proportion
from guard import Predictor
from guard.preprocessors import Preprocessor, answer_through

_AT_ONCE = 500


@final
@dataclass(frozen=True)
class Exam:
    """What a model is examined on.

    Attributes:
        clean: Clean images with labels.
        triggered: The same with the trigger.
        targets: (N,), int64, what the attack wants of each; -1 for nothing.
    """

    clean: ImageSet
    triggered: ImageSet
    targets: Tensor

    @classmethod
    def of(cls, attack: Attack, images: ImageSet) -> Exam:
        """Trigger all of them."""
        wanted = [
            attack.targets(images.images(rows), images.known_labels[rows]) for rows in torch.arange(len(images)).split(_AT_ONCE)
        ]
        return cls(images, triggered_images(attack, images), torch.cat(wanted))


class Marks(msgspec.Struct, frozen=True, kw_only=True):
    """How a model did.

    Attributes:
        accuracy: On clean images.
        attack_success: Of the triggered images that the attack wants something of, those that get it.
        target_share: Of the clean images that the attack wants something of, those that get that answer without a trigger: no
            repair can be expected to come under it.
    """

    accuracy: Estimate
    attack_success: Estimate
    target_share: Estimate


def examine(predictor: Predictor, exam: Exam, preprocessor: Preprocessor | None = None, draws: int = 1, seed: int = 0) -> Marks:
    """Examine a model.

    Args:
        predictor: The model.
        exam: The images.
        preprocessor: What they go through.
        draws: How often, where it draws. Intervals are then of the mean over the draws, by their spread, where that is wider
            than what the number of images makes of it.
        seed: Of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    counted = exam.targets >= 0
    right, hits, anyway = [], [], []
    for _ in range(draws):
        on_clean = _answers(predictor, exam.clean, preprocessor, generator)
        on_triggered = _answers(predictor, exam.triggered, preprocessor, generator)
        right.append(on_clean == exam.clean.known_labels)
        hits.append((on_triggered == exam.targets)[counted])
        anyway.append((on_clean == exam.targets)[counted])
    return Marks(accuracy=_mean(right), attack_success=_mean(hits), target_share=_mean(anyway))


def _mean(draws: list[Tensor]) -> Estimate:
    shares = [float(draw.double().mean()) for draw in draws]
    total = len(draws[0])
    once = proportion(round(float(np.mean(shares)) * total), total)
    if len(shares) == 1:
        return once
    value = float(np.mean(shares))
    spread = 1.96 * float(np.std(shares, ddof=1)) / len(shares) ** 0.5
    return Estimate(value, min(once.low, max(0.0, value - spread)), max(once.high, min(1.0, value + spread)))


def _answers(predictor: Predictor, images: ImageSet, preprocessor: Preprocessor | None, generator: torch.Generator) -> Tensor:
    found = []
    for rows in torch.arange(len(images)).split(_AT_ONCE):
        batch = images.images(rows)
        found.append(answer_through(predictor, preprocessor, batch, generator).argmax(dim=1))
    return torch.cat(found)


def for_development(parts: Parts) -> Parts:
    """The same images with a part of the defender's in the place of the evaluation's, for choosing recipes."""
    images = shuffled(parts.defender, 7)
    rows = torch.arange(len(images))
    return replace(parts, defender=images.select(rows[1_000:]), evaluation=images.select(rows[:1_000]))
