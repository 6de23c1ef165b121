"""Shrinking, and placing the smaller image at random on black: ShrinkPad, and GYM's T3.

A trigger that only works where it was planted is moved away from there. ShrinkPad shrinks by a fixed number of pixels, T3 to
a random size between 0.8 and 1.

References: Li et al., Rethinking the Trigger of Backdoor Attack, arXiv:2004.04692 (ShrinkPad-4); Zeng et al., GYM (DeepSweep),
arXiv:2012.07006 (T3).
"""

from __future__ import annotations

from typing import ClassVar

import msgspec
import torch
from torch import Tensor

from guard.errors import InputError
from guard.preprocessors.affine import warp


class ShrinkPad(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="shrink-pad", tag_field="name"):
    """Shrink by a number of pixels, place at random.

    Args:
        pixels: By which both sides shrink; 4 is ShrinkPad-4.

    Raises:
        InputError: A negative number.
    """

    pixels: int = 4

    def __post_init__(self) -> None:
        """Validate once."""
        if self.pixels < 0:
            raise InputError(f"expected a number of pixels from 0, got {self.pixels}")

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Shrink and place; images (B, C, H, W) in [0, 1], the same shape out.

        Raises:
            InputError: Nothing would be left of the image.
        """
        height, width = int(images.shape[-2]), int(images.shape[-1])
        if self.pixels >= min(height, width):
            raise InputError(f"expected images larger than the {self.pixels} pixels to shrink by, got {height}x{width}")
        tall = torch.full((len(images),), (height - self.pixels) / height, dtype=torch.float64)
        wide = torch.full((len(images),), (width - self.pixels) / width, dtype=torch.float64)
        return place(images, tall, wide, torch.rand(len(images), 2, generator=generator, dtype=torch.float64))


class RandomShrinkPad(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="random-shrink-pad", tag_field="name"
):
    """Shrink to a random size, place at random: GYM's T3.

    Args:
        smallest: Share of the sides; sizes are drawn from it to 1.

    Raises:
        InputError: It is out of range.
    """

    draws: ClassVar[int] = 3

    smallest: float = 0.8

    def __post_init__(self) -> None:
        """Validate once."""
        if not 0.0 < self.smallest <= 1.0:
            raise InputError(f"expected a smallest size in (0, 1], got {self.smallest}")

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Shrink and place each image by its own draw; images (B, C, H, W) in [0, 1], the same shape out."""
        return self.move(images, torch.rand(len(images), self.draws, generator=generator, dtype=torch.float64))

    def move(self, images: Tensor, draws: Tensor) -> Tensor:
        """The same for given draws, (B, 3) in [0, 1)."""
        scale = self.smallest + (1.0 - self.smallest) * draws[:, 0]
        return place(images, scale, scale, draws[:, 1:])


def place(images: Tensor, tall: Tensor, wide: Tensor, free: Tensor) -> Tensor:
    """Shrink images (bilinear) and place each at random on black.

    Args:
        images: (B, C, H, W), in [0, 1].
        tall: (B,), height as a share of the image's, in (0, 1].
        wide: (B,), width.
        free: (B, 2), in [0, 1]: of the room that is left, how much is to the left, and how much above.
    """
    height, width = images.shape[-2:]
    matrices = torch.zeros(len(images), 2, 3, dtype=torch.float64)
    for axis, (share, side) in enumerate(((wide, width), (tall, height))):
        matrices[:, axis, axis] = share
        # pixel centres: the shrunken image starts at `free` of the room, and a pixel's centre lies half a pixel inside it
        matrices[:, axis, 2] = free[:, axis] * (1.0 - share) * side + 0.5 * share - 0.5
    return warp(images, matrices).clamp_(0.0, 1.0)
