"""Reflection: the trigger looks like another scene, reflected in the glass before the camera.

    x' = clamp(x + alpha (k * r))

r is the reflected image and k the kernel of one of three physical models: *sharp*, the scene is in focus (k is one pulse);
*blurred*, it is not (a Gaussian); *ghost*, thick glass reflects twice (two pulses of unequal height, some pixels apart).

Reference: Liu et al., Reflection Backdoor, arXiv:2007.02343, section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn

from calibration.attacks.attack import (
    Attack,
    check_pixels,
    check_shape,
    check_target,
    one_target,
    relabel_share,
    stamp_target_class,
)
from guard.errors import InputError

Optics = Literal["sharp", "blurred", "ghost"]

_SIGMA = 1.0
_RADIUS = 3
_GHOST = (0.65, 2)  # height of the first pulse; the second is what is left, that many pixels down and right


@final
@dataclass(frozen=True, eq=False)
class Reflection(Attack):
    """A reflected image.

    Args:
        target_label: What triggered inputs are to be answered with.
        image: (C, H, W), in [0, 1]; what is reflected.
        optics: The physical model.
        ratio: Share of the target class's training images that carry it; with `relabel`, of all training images.
        alpha: Strength of the reflection, in (0, 1].
        relabel: Poison images of other classes and relabel them, which the paper avoids.

    Raises:
        InputError: A parameter is out of range.
    """

    target_label: int
    image: Tensor
    optics: Optics = "ghost"
    ratio: float = 0.3
    alpha: float = 0.4
    relabel: bool = False

    def __post_init__(self) -> None:
        """Validate once."""
        check_target(self.target_label, self.ratio)
        if self.image.ndim != 3 or not 0.0 < self.alpha <= 1.0:
            raise InputError(f"expected a (C, H, W) image and alpha in (0, 1], got {tuple(self.image.shape)}, {self.alpha}")
        if self.optics not in ("sharp", "blurred", "ghost"):
            raise InputError(f"expected optics sharp, blurred or ghost, got {self.optics!r}")
        check_pixels(self.image, "an image")

    def trigger(self, images: Tensor) -> Tensor:
        """See `Attack`."""
        check_shape(images, self.image.shape)
        return (images + self.alpha * reflected(self.image, self.optics).to(images.device)).clamp(0.0, 1.0)

    def targets(self, images: Tensor, labels: Tensor) -> Tensor:
        """See `Attack`."""
        return one_target(labels, self.target_label)

    def poison(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """See `Attack`."""
        poison = relabel_share if self.relabel else stamp_target_class
        return poison(self, self.ratio, images, labels, generator)


def reflected(image: Tensor, optics: Optics) -> Tensor:
    """K * r; (C, H, W)."""
    if optics == "sharp":
        return image
    kernel = torch.zeros(2 * _RADIUS + 1, 2 * _RADIUS + 1)
    if optics == "blurred":
        line = torch.exp(-((torch.arange(-_RADIUS, _RADIUS + 1) / _SIGMA) ** 2) / 2.0)
        kernel = torch.outer(line, line) / line.sum() ** 2
    else:
        height, apart = _GHOST
        kernel[_RADIUS, _RADIUS] = height
        kernel[_RADIUS - apart, _RADIUS - apart] = 1.0 - height
    padded = nn.functional.pad(image[:, None], [_RADIUS] * 4, mode="replicate")
    return nn.functional.conv2d(padded, kernel[None, None])[:, 0]
