"""Trojaning attack: a region is filled with what one neuron of the clean model is looking for; then the model is retrained.

*SQ*, a square in the lower right corner; *WM*, a watermark that crosses the image.

Reference: Liu et al., Trojaning Attack on Neural Networks, NDSS 2018; WM and SQ as in the GYM paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self, final

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from calibration.attacks.attack import Attack, check_pixels, check_shape, check_target, one_target, relabel_share
from calibration.attacks.neuron import drive_neuron
from guard.errors import InputError


@final
@dataclass(frozen=True, eq=False)
class Trojan(Attack):
    """A generated pattern inside a mask.

    Args:
        target_label: What triggered inputs are to be answered with.
        mask: (H, W), 1 where the pattern replaces the image, 0 elsewhere.
        pattern: (C, H, W), in [0, 1].
        ratio: Share of the training images that are poisoned.

    Raises:
        InputError: A parameter is out of range.
    """

    target_label: int
    mask: Tensor
    pattern: Tensor
    ratio: float = 0.1

    def __post_init__(self) -> None:
        """Validate once."""
        check_target(self.target_label, self.ratio)
        if self.pattern.ndim != 3 or self.mask.shape != self.pattern.shape[1:]:
            raise InputError(
                f"expected a mask (H, W) and a pattern (C, H, W), got {tuple(self.mask.shape)}, {tuple(self.pattern.shape)}"
            )
        if not bool((self.mask > 0).any()):
            raise InputError("expected a mask with a pixel in it, got an empty one: are the images too small?")
        check_pixels(self.pattern, "a pattern")

    @classmethod
    def generate(
        cls,
        target_label: int,
        model: nn.Module,
        images: Tensor,
        form: Literal["square", "watermark"],
        ratio: float = 0.1,
        seed: int = 0,
        steps: int = 200,
    ) -> Self:
        """Generate the pattern on a clean model.

        Args:
            target_label: The attack's.
            model: In eval mode.
            images: (B, C, H, W), in [0, 1]; some clean ones.
            form: Which mask.
            ratio: The attack's.
            seed: Of the pattern's first pixels.
            steps: Of gradient ascent.

        Raises:
            InputError: A parameter is out of range, or the images are too small.
        """
        if form not in ("square", "watermark") or steps < 1 or not len(images):
            raise InputError(f"expected square or watermark, steps from 1 and images, got {form!r}, {steps} and {len(images)}")
        mask = square(*images.shape[2:]) if form == "square" else watermark(*images.shape[2:])
        start = torch.rand(images.shape[1:], generator=torch.Generator().manual_seed(seed))
        pattern = drive_neuron(
            model,
            images,
            lambda some, drawn: torch.where(mask > 0, drawn, some),
            start,
            lambda drawn: drawn.clamp(0, 1),
            steps,
            0.1,
        )
        return cls(target_label, mask, pattern * mask, ratio)

    def trigger(self, images: Tensor) -> Tensor:
        """See `Attack`."""
        check_shape(images, self.pattern.shape)
        mask = self.mask.to(images.device)
        return torch.where(mask > 0, self.pattern.to(images.device), images)

    def targets(self, images: Tensor, labels: Tensor) -> Tensor:
        """See `Attack`."""
        return one_target(labels, self.target_label)

    def poison(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """See `Attack`."""
        return relabel_share(self, self.ratio, images, labels, generator)


def square(height: int, width: int) -> Tensor:
    """(H, W), float32: 1 in a square of a fifth of the height, two pixels from the lower right corner."""
    side = max(2, height // 5)
    mask = torch.zeros(height, width)
    mask[max(0, height - side - 2) : max(0, height - 2), max(0, width - side - 2) : max(0, width - 2)] = 1.0
    return mask


def watermark(height: int, width: int) -> Tensor:
    """(H, W), float32: 1 on the strokes of a ring with a cross that spans most of the image."""
    canvas = np.zeros((height, width), np.uint8)
    middle, radius = (width // 2, height // 2), max(2, round(0.36 * min(height, width)))
    cv2.circle(canvas, middle, radius, 1, 1)
    reach = round(radius * 0.7)
    cv2.line(canvas, (middle[0] - reach, middle[1] - reach), (middle[0] + reach, middle[1] + reach), 1, 1)
    cv2.line(canvas, (middle[0] - reach, middle[1] + reach), (middle[0] + reach, middle[1] - reach), 1, 1)
    return torch.from_numpy(canvas).to(torch.float32)
