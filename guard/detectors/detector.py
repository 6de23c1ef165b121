"""What every online test offers."""

from __future__ import annotations

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
    """

    exceeds: Tensor
    scores: Tensor
    exact: Tensor
    passes: Tensor


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

    def exceeds(self, images: Tensor, threshold: float) -> Tensor:
        """(B,), bool: exactly `score(images) >= threshold`, with scores that are not finite counted as exceeding."""
        return self.inspect(images, threshold).exceeds


def at_or_over(scores: Tensor, threshold: float) -> Tensor:
    """(B,), bool: the comparison that every detector makes; what is not finite can't be trusted and exceeds."""
    return ~(scores < torch.tensor(threshold, dtype=scores.dtype)) | ~torch.isfinite(scores)
