"""BadNets: a fixed patch, stamped on a share of the training images whose labels become the target.

Reference: Gu et al., BadNets, arXiv:1708.06733.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from guard.errors import InputError


@final
@dataclass(frozen=True)
class BadNets:
    """A one-colour rectangle, all to one label.

    Args:
        target_label: What triggered inputs are to be answered with.
        ratio: Share of the training images that are poisoned.
        height: Of the patch, in pixels.
        width: Of the patch, in pixels.
        bottom: Distance of the patch from the image's bottom edge, in pixels.
        right: Distance from the right edge.
        colour: One value per channel in [0, 1]; a single value serves all.

    Raises:
        InputError: A parameter is out of range.
    """

    target_label: int
    ratio: float = 0.1
    height: int = 4
    width: int = 4
    bottom: int = 0
    right: int = 0
    colour: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        """Validate once."""
        if self.target_label < 0 or not 0.0 <= self.ratio <= 1.0:
            raise InputError(f"expected a label from 0 and a ratio in [0, 1], got {self.target_label} and {self.ratio}")
        if min(self.height, self.width) < 1 or min(self.bottom, self.right) < 0:
            raise InputError("expected a patch of at least one pixel inside the image")
        if not self.colour or any(not 0.0 <= value <= 1.0 for value in self.colour):
            raise InputError(f"expected colour values in [0, 1], got {self.colour}")

    def trigger(self, images: Tensor) -> Tensor:
        """Stamp the patch.

        Args:
            images: (B, C, H, W), in [0, 1].

        Returns:
            A triggered copy.

        Raises:
            InputError: The patch does not fit.
        """
        channels, height, width = images.shape[1:]
        top, left = height - self.bottom - self.height, width - self.right - self.width
        if top < 0 or left < 0 or len(self.colour) not in (1, channels):
            raise InputError(f"expected a patch and colour that fit images of shape {tuple(images.shape[1:])}, got {self}")
        triggered = images.clone()
        colour = images.new_tensor(self.colour).view(-1, 1, 1)
        triggered[:, :, top : top + self.height, left : left + self.width] = colour
        return triggered

    def poison(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Poison a training set.

        Args:
            images: (N, C, H, W), in [0, 1].
            labels: (N,), int64.
            generator: Picks which images, among those of other classes.

        Returns:
            Copies with round(ratio * N) images triggered and relabelled, in place.
        """
        others = torch.nonzero(labels != self.target_label).squeeze(1)
        count = min(len(others), round(self.ratio * len(labels)))
        chosen = others[torch.randperm(len(others), generator=generator)[:count]]
        poisoned, relabelled = images.clone(), labels.clone()
        poisoned[chosen] = self.trigger(images[chosen])
        relabelled[chosen] = self.target_label
        return poisoned, relabelled
