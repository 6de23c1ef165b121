"""What every online test offers."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Inspection:
    """What a detector found in a batch, compared with a threshold.

    Attributes:
        exceeds: (B,), bool: the score is at or over the threshold, or is not finite.
        scores: (B,), float32: higher is more suspicious; where `exact` is false a bound, from above of what does not exceed and
            from below of what does.
        exact: (B,), bool: the score is the full evaluation's.
        passes: (B,), int64: the model's forward passes spent on each image.
        late: (B,), bool: the deadline came before the verdict; the score is NaN, and exceeds.
        answers: (B, M), the model's probabilities for the images themselves, where they rode along.
    """

    exceeds: Tensor
    scores: Tensor
    exact: Tensor
    passes: Tensor
    late: Tensor | None = None
    answers: Tensor | None = None


class Detector(ABC):
    """An online test of single inputs. Concrete detectors are frozen and final."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Short name that verdicts, logs and metrics carry."""

    @abstractmethod
    def score(self, images: Tensor) -> Tensor:
        """Score a batch in full.

        Args:
            images: (B, C, H, W), float32, in [0, 1].

        Returns:
            (B,), float32, higher is more suspicious; NaN where the model gave no answer.
        """

    @abstractmethod
    def inspect(self, images: Tensor, threshold: float) -> Inspection:
        """Compare with a threshold, as cheaply as the same answer allows."""

    def inspect_by(self, images: Tensor, threshold: float, deadline: float) -> Inspection:
        """`inspect`, but begin nothing that would end later.

        Args:
            images: (B, C, H, W), float32, in [0, 1].
            threshold: On the score.
            deadline: On `time.monotonic`'s clock.

        Returns:
            What was found; where time was up before the verdict, `late`.
        """
        if time.monotonic() < deadline:
            return self.inspect(images, threshold)
        no = torch.zeros(len(images), dtype=torch.bool)
        return Inspection(~no, torch.full((len(images),), torch.nan), no, no.to(torch.int64), ~no)

    def exceeds(self, images: Tensor, threshold: float) -> Tensor:
        """(B,), bool: exactly `score(images) >= threshold`, with scores that are not finite counted as exceeding."""
        return self.inspect(images, threshold).exceeds


def at_or_over(scores: Tensor, threshold: float) -> Tensor:
    """(B,), bool: the comparison that every detector makes; what is not finite can't be trusted and exceeds."""
    return ~((scores < threshold) & (scores > -torch.inf))
