"""A patch: pixels of any shape and colours at a fixed place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self, final

import torch
from torch import Tensor

from guard.errors import InputError


@final
@dataclass(frozen=True)
class Patch:
    """A drawing that replaces pixels.

    Args:
        drawing: One string per row; `.` leaves a pixel alone, a digit is an index into `colours`.
        colours: Up to ten, each one value per channel in [0, 1]; a single value serves all channels.
        bottom: Distance of the drawing from the image's bottom edge, in pixels.
        right: Distance from the right edge.

    Raises:
        InputError: The drawing is empty, ragged or uses a colour that is not there.
    """

    drawing: tuple[str, ...]
    colours: tuple[tuple[float, ...], ...] = ((1.0,),)
    bottom: int = 0
    right: int = 0

    def __post_init__(self) -> None:
        """Validate once."""
        used = set("".join(self.drawing)) - {"."}
        known = {str(number) for number in range(min(10, len(self.colours)))}
        if not used or len({len(row) for row in self.drawing}) != 1:
            raise InputError(f"expected a drawing of equally long rows with at least one pixel, got {self.drawing}")
        if not used <= known:
            raise InputError(f"expected '.' and indices of {len(self.colours)} colours in a drawing, got {sorted(used)}")
        if any(not colour or any(not 0.0 <= value <= 1.0 for value in colour) for colour in self.colours):
            raise InputError(f"expected colour values in [0, 1], got {self.colours}")
        if self.bottom < 0 or self.right < 0:
            raise InputError("expected a patch inside the image: bottom and right must be at least 0")

    @classmethod
    def rectangle(
        cls, height: int, width: int | None = None, colour: tuple[float, ...] = (1.0,), bottom: int = 0, right: int = 0
    ) -> Self:
        """One colour; a square when no width is given."""
        return cls(("0" * (height if width is None else width),) * height, (colour,), bottom, right)

    @classmethod
    def noise(cls, side: int, seed: int, bottom: int = 0, right: int = 0, levels: tuple[float, float] = (0.0, 1.0)) -> Self:
        """A square of pixels of eight colours at random: every channel at one of two levels."""
        corners = tuple((levels[n & 1], levels[n >> 1 & 1], levels[n >> 2 & 1]) for n in range(8))
        drawn = torch.randint(0, 8, (side, side), generator=torch.Generator().manual_seed(seed))
        return cls(tuple("".join(str(int(n)) for n in row) for row in drawn), corners, bottom, right)

    @classmethod
    def checkerboard(cls, side: int, bottom: int = 0, right: int = 0) -> Self:
        """A square of black and white pixels in turn."""
        rows = tuple("".join(str((row + column) % 2) for column in range(side)) for row in range(side))
        return cls(rows, ((0.0,), (1.0,)), bottom, right)

    def stamp(self, images: Tensor) -> Tensor:
        """Copies with the patch; (B, C, H, W) in [0, 1].

        Raises:
            InputError: The patch or its colours do not fit.
        """
        channels, height, width = images.shape[1:]
        top, left = height - self.bottom - len(self.drawing), width - self.right - len(self.drawing[0])
        if top < 0 or left < 0 or any(len(colour) not in (1, channels) for colour in self.colours):
            raise InputError(f"expected a patch and colours that fit images of shape {tuple(images.shape[1:])}, got {self}")
        stamped = images.clone()
        region = stamped[:, :, top : top + len(self.drawing), left : left + len(self.drawing[0])]
        indices = torch.tensor([[-1 if pixel == "." else int(pixel) for pixel in row] for row in self.drawing])
        palette = torch.stack([images.new_tensor(colour).expand(channels) for colour in self.colours])
        colours = palette[indices.clamp_min(0)].permute(2, 0, 1)
        region.copy_(torch.where((indices >= 0).to(images.device), colours, region))
        return stamped


SQUARE = Patch.rectangle(4)
"""White, in the lower right corner: what attacks stamp unless told otherwise."""
