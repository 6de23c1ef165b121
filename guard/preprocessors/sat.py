"""SAT alone, GYM's T4: a small random shift, rotation and scaling of each image.

Reference: Zeng et al., GYM (DeepSweep), arXiv:2012.07006; Zeng et al., arXiv:2007.15290.
"""

from __future__ import annotations

from typing import ClassVar

import msgspec
import torch
from torch import Tensor

from guard.errors import InputError
from guard.preprocessors.affine import affine_matrices, warp


class Sat(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="sat", tag_field="name"):
    """Stochastic affine transformation, with a black border.

    Args:
        shift: Largest shift as a share of the side, in both directions of both axes.
        rotation: Largest angle in degrees, in both directions.
        zoom: Largest relative change of size, in both directions.

    Raises:
        InputError: A parameter is out of range.
    """

    draws: ClassVar[int] = 4

    shift: float = 0.16
    rotation: float = 4.0
    zoom: float = 0.16

    def __post_init__(self) -> None:
        """Validate once."""
        if not (0.0 <= self.shift < 1.0 and 0.0 <= self.zoom < 1.0 and 0.0 <= self.rotation <= 180.0):
            raise InputError(
                f"expected shift and zoom in [0, 1), rotation in degrees, got {self.shift}, {self.zoom}, {self.rotation}"
            )

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Move each image by its own draw; images (B, C, H, W) in [0, 1], the same shape out."""
        return self.move(images, torch.rand(len(images), self.draws, generator=generator, dtype=torch.float64))

    def move(self, images: Tensor, draws: Tensor) -> Tensor:
        """The same for given draws, (B, 4) in [0, 1)."""
        height, width = int(images.shape[-2]), int(images.shape[-1])
        matrices = affine_matrices(draws, height, width, self.shift, self.rotation, self.zoom)
        return warp(images, matrices).clamp_(0.0, 1.0)
