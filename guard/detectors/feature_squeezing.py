"""Feature squeezing: an answer that hangs on fine detail changes when the detail is squeezed out of the image.

    score(x) = max over squeezers s of |f(x) - f(s(x))|_1

with probabilities f, so in [0, 2]: 0 when no answer moves, 2 when one turns into another with full certainty. Squeezers: fewer
bits of colour (5, or 1 on grey images), median 2x2, and non-local means with search window 11, patch 3 and strength 4.

Blind to: triggers that survive squeezing. The method was made for adversarial perturbations; a white patch stays, holds its
answer, and scores lower than clean images do. Of a model that returns only labels the score is 0 or 2.

Reference: Xu et al., Feature Squeezing, arXiv:1704.01155; its defaults for ImageNet, and for MNIST's bit depth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, final, get_args

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from guard.detectors.detector import Detector, Inspection, at_or_over
from guard.errors import CalibrationError
from guard.predictors.predictor import Predictor

Squeezer = Literal["bit-depth", "median", "non-local-means"]

_SEARCH, _PATCH, _STRENGTH = 11, 3, 4.0
_GREY_BITS, _COLOUR_BITS = 1, 5


def reduce_bit_depth(images: Tensor, bits: int) -> Tensor:
    """Round each value to one of 2^bits levels, evenly spaced from 0 to 1; halves go to the even level.

    Args:
        images: (B, C, H, W), in [0, 1].
        bits: 1 to 8.

    Returns:
        The same shape.
    """
    levels = 2**bits - 1
    return images.mul(levels).round_().div_(levels)


def median_2x2(images: Tensor) -> Tensor:
    """Median of each pixel, the one above, the one to the left and the one between those.

    Of the two middle values the larger, as SciPy's `median_filter` of size 2 takes it. Borders are replicated.

    Args:
        images: (B, C, H, W).

    Returns:
        The same shape.
    """
    padded = torch.nn.functional.pad(images, (1, 0, 1, 0), mode="replicate")
    above, row = padded[..., :-1, :], padded[..., 1:, :]
    low = torch.minimum(above, row)
    high = torch.maximum(above, row)
    return torch.maximum(  # the second largest of two pairs
        torch.minimum(high[..., :-1], high[..., 1:]), torch.maximum(low[..., :-1], low[..., 1:])
    )


def non_local_means(images: Tensor) -> Tensor:
    """OpenCV's non-local means on 8-bit images: in Lab space for three channels, channel by channel otherwise.

    Args:
        images: (B, C, H, W), in [0, 1].

    Returns:
        The same shape and device, in steps of 1/255.
    """
    pixels = images.detach().cpu().mul(255.0).round_().clamp_(0, 255).to(torch.uint8)
    smooth = _smooth_colour if images.shape[1] == 3 else _smooth_grey
    smoothed = np.stack([smooth(image) for image in pixels.numpy()])
    return torch.from_numpy(smoothed).to(images.device, torch.float32).div_(255.0)


def _smooth_colour(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    bgr = np.ascontiguousarray(image[::-1].transpose(1, 2, 0))
    smoothed = cv2.fastNlMeansDenoisingColored(bgr, None, _STRENGTH, _STRENGTH, _PATCH, _SEARCH)
    return np.asarray(smoothed, np.uint8).transpose(2, 0, 1)[::-1]


def _smooth_grey(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.stack([cv2.fastNlMeansDenoising(plane, None, _STRENGTH, _PATCH, _SEARCH) for plane in image]).astype(np.uint8)


def largest_change(answers: Tensor, squeezed: Tensor) -> Tensor:
    """How far squeezing moves an answer, at most.

    Args:
        answers: (B, M), probabilities.
        squeezed: (S, B, M), probabilities of the squeezed images.

    Returns:
        (B,), float32, L1 distance in [0, 2]; NaN where any row is NaN.
    """
    return (answers.double() - squeezed.double()).abs().sum(dim=2).amax(dim=0).float()


@final
@dataclass(frozen=True)
class FeatureSqueezing(Detector):
    """Feature squeezing over a predictor: one forward pass for the image and one for each squeezer.

    Args:
        predictor: The suspicious model.
        squeezers: Which, each once.
        bits: Of `bit-depth`, 1 to 8; None for 1 on grey images and 5 on others.
        name: Short name.

    Raises:
        CalibrationError: No squeezers, unknown or repeated ones, or bits out of range.
    """

    predictor: Predictor
    squeezers: tuple[Squeezer, ...] = get_args(Squeezer)
    bits: int | None = None
    name: str = "feature-squeezing"

    def __post_init__(self) -> None:
        """Validate once."""
        known = get_args(Squeezer)
        unique = len(set(self.squeezers)) == len(self.squeezers)
        if not self.squeezers or not unique or not set(self.squeezers) <= set(known):
            raise CalibrationError(
                f"expected squeezers of {', '.join(known)}, each once, got {', '.join(self.squeezers) or 'none'}"
            )
        if self.bits is not None and not 1 <= self.bits <= 8:
            raise CalibrationError(f"expected a bit depth of 1 to 8, got {self.bits}")

    def squeeze(self, images: Tensor) -> list[Tensor]:
        """The images as each squeezer leaves them; (B, C, H, W), in [0, 1], to a list of the same."""
        bits = self.bits or (_GREY_BITS if images.shape[1] == 1 else _COLOUR_BITS)
        squeeze: dict[Squeezer, Callable[[Tensor], Tensor]] = {
            "bit-depth": lambda batch: reduce_bit_depth(batch, bits),
            "median": median_2x2,
            "non-local-means": non_local_means,
        }
        return [squeeze[squeezer](images) for squeezer in self.squeezers]

    def score(self, images: Tensor) -> Tensor:
        """The largest L1 distance between the answer and a squeezed image's, in [0, 2]; (B,), float32."""
        answers = self.predictor(torch.cat([images, *self.squeeze(images)]), keep=False).unflatten(0, (-1, len(images)))
        return largest_change(answers[0], answers[1:]).cpu()

    def inspect(self, images: Tensor, threshold: float) -> Inspection:
        """Compare with a threshold, by all passes: a maximum is known only when its last term is.

        Args:
            images: (B, C, H, W), in [0, 1].
            threshold: On the score, in [0, 2].
        """
        scores = self.score(images)
        passes = torch.full((len(scores),), 1 + len(self.squeezers))
        return Inspection(at_or_over(scores, threshold), scores, torch.ones_like(scores, dtype=torch.bool), passes)
