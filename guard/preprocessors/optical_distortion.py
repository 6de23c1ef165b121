"""Pincushion distortion, GYM's T1: pixels move towards or away from an optical axis that is drawn near the centre.

A pixel of the result at p takes its value at

    c + (p - c) (1 + k r^2 + k r^4),   r = |p - c| in image sides,   c = centre + offset

with k and the offset drawn for each image. Borders are reflected, interpolation is bilinear.

Reference: Zeng et al., GYM (DeepSweep), arXiv:2012.07006, T1; the limits are those of its public code.
"""

from __future__ import annotations

from typing import ClassVar

import msgspec
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from guard.errors import InputError


class OpticalDistortion(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="optical-distortion", tag_field="name"
):
    """Random pincushion (k > 0) and barrel (k < 0) distortion.

    Args:
        limit: Largest k, in both directions.
        offset: Largest offset of the optical axis, as a share of the side.

    Raises:
        InputError: A parameter is out of range.
    """

    draws: ClassVar[int] = 3

    limit: float = 0.05
    offset: float = 0.05

    def __post_init__(self) -> None:
        """Validate once."""
        if not (0.0 <= self.limit < 1.0 and 0.0 <= self.offset < 1.0):
            raise InputError(f"expected a limit and an offset in [0, 1), got {self.limit} and {self.offset}")

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Distort each image by its own draw; images (B, C, H, W) in [0, 1], the same shape out."""
        return self.move(images, torch.rand(len(images), self.draws, generator=generator, dtype=torch.float64))

    def move(self, images: Tensor, draws: Tensor) -> Tensor:
        """The same for given draws, (B, 3) in [0, 1)."""
        spread = draws * 2.0 - 1.0
        return distort(images, spread[:, 0] * self.limit, spread[:, 1:] * self.offset)


def distort(images: Tensor, k: Tensor, axis: Tensor) -> Tensor:
    """Distort images by given parameters.

    Args:
        images: (B, C, H, W), in [0, 1].
        k: (B,), strength; 0 changes nothing.
        axis: (B, 2), offset of the optical axis, x then y, as a share of the side.

    Returns:
        The same shape and device.
    """
    height, width = images.shape[-2:]
    # pixel centres, in image sides from the middle
    y = (torch.arange(height, dtype=torch.float64) + 0.5) / height - 0.5
    x = (torch.arange(width, dtype=torch.float64) + 0.5) / width - 0.5
    offset = axis.to("cpu", torch.float64).view(-1, 1, 1, 2)
    from_axis = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).unsqueeze(0) - offset
    square = from_axis.square().sum(dim=-1, keepdim=True)
    factor = 1.0 + k.to("cpu", torch.float64).view(-1, 1, 1, 1) * (square + square.square())
    grid = 2.0 * (from_axis * factor + offset)  # grid_sample's own units: -1 and 1 are the image's borders
    moved = grid_sample(
        images, grid.to(images.device, images.dtype), mode="bilinear", padding_mode="reflection", align_corners=False
    )
    return moved.clamp_(0.0, 1.0)
