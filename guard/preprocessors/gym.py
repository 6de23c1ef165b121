"""GYM's lightweight preprocessing, at inference time.

    median k x k -> scale to 0.8 -> median k x k -> back to size -> SAT

It breaks triggers, and belongs to a model that was tuned for it: on one that was not, clean accuracy falls far, which is
why calibration measures it and refuses a large drop.

Reference: Qiu et al., GYM (DeepSweep), arXiv:2012.07006; the public code's parameters.
"""

from __future__ import annotations

import msgspec
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from guard.errors import InputError
from guard.preprocessors.affine import draw_affine, warp
from guard.preprocessors.median import median_filter


class Gym(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="gym", tag_field="name"):
    """GYM's lightweight function.

    Args:
        kernel: Side of the median filters, 3 or 5.
        scale: Size of the image between the medians, as a share.
        shift: SAT's largest shift, as a share of the side.
        rotation: SAT's largest rotation, in degrees.
        zoom: SAT's largest relative change of size.

    Raises:
        InputError: A parameter is out of range.
    """

    kernel: int = 5
    scale: float = 0.8
    shift: float = 0.16
    rotation: float = 4.0
    zoom: float = 0.16

    def __post_init__(self) -> None:
        """Validate once."""
        if self.kernel not in (3, 5) or not 0.0 < self.scale <= 1.0:
            raise InputError(f"expected a kernel of 3 or 5 and a scale in (0, 1], got {self.kernel} and {self.scale}")
        if not (0.0 <= self.shift < 1.0 and 0.0 <= self.zoom < 1.0 and 0.0 <= self.rotation <= 180.0):
            raise InputError(
                f"expected shift and zoom in [0, 1), rotation in degrees, got {self.shift}, {self.zoom}, {self.rotation}"
            )

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Preprocess a batch.

        Args:
            images: (B, C, H, W), float32, in [0, 1].
            generator: A CPU generator; SAT draws from it.

        Returns:
            The same shape, in [0, 1].
        """
        return self.sat(self.filter(images), generator)

    def filter(self, images: Tensor) -> Tensor:
        """The part before SAT, which draws nothing."""
        height, width = images.shape[-2:]
        small = (max(1, round(height * self.scale)), max(1, round(width * self.scale)))
        first = median_filter(images, self.kernel)
        second = median_filter(interpolate(first, size=small, mode="bilinear", align_corners=False), self.kernel)
        return interpolate(second, size=(height, width), mode="bilinear", align_corners=False).clamp_(0.0, 1.0)

    def sat(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """The stochastic affine transformation alone."""
        height, width = int(images.shape[-2]), int(images.shape[-1])
        drawn = draw_affine(len(images), height, width, self.shift, self.rotation, self.zoom, generator)
        return warp(images, drawn).clamp_(0.0, 1.0)
