"""Amplified: the model learnt one patch; the attacker pastes it four or nine times, which repairs are less ready for.

Four copies go into the corners, nine to the edges and the centre as well, and the nearest of them where the model learnt it.

Reference: Yan et al., DHBE, arXiv:2306.08009, section 5.3.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from calibration.attacks.attack import Attack
from calibration.attacks.badnets import BadNets
from calibration.attacks.patch import Patch
from guard.errors import InputError


@final
@dataclass(frozen=True)
class Amplified(Attack):
    """A BadNets backdoor whose patch is pasted many times.

    Args:
        base: What the model is trained with; its first patch is pasted, where it belongs and on an even grid.
        copies: How often, a square number; the paper's are 4 and 9.

    Raises:
        InputError: The number is no square; on triggering, copies that would overlap.
    """

    base: BadNets
    copies: int = 4

    def __post_init__(self) -> None:
        """Validate once."""
        if self.copies < 1 or math.isqrt(self.copies) ** 2 != self.copies:
            raise InputError(f"expected a square number of copies, got {self.copies}")

    def trigger(self, images: Tensor) -> Tensor:
        """See `Attack`."""
        for patch in self._pasted(*images.shape[2:]):
            images = patch.stamp(images)
        return images

    def targets(self, images: Tensor, labels: Tensor) -> Tensor:
        """See `Attack`."""
        return self.base.targets(images, labels)

    def poison(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """See `Attack`; with the single patch."""
        return self.base.poison(images, labels, generator)

    def _pasted(self, height: int, width: int) -> list[Patch]:
        """The patch itself and its copies."""
        patch, side = self.base.patches[0], math.isqrt(self.copies)
        bottoms = _places(height, len(patch.drawing), patch.bottom, side)
        rights = _places(width, len(patch.drawing[0]), patch.right, side)
        return [replace(patch, bottom=bottom, right=right) for bottom in bottoms for right in rights]


def _places(length: int, size: int, own: int, count: int) -> list[int]:
    """Evenly from edge to edge, the nearest of them moved to the patch's own place.

    Raises:
        InputError: Patches would overlap or not fit.
    """
    last = length - size
    places = [number * last // max(1, count - 1) for number in range(count)]
    places[min(range(count), key=lambda number: abs(places[number] - own))] = own
    if own > last or any(after - before < size for before, after in itertools.pairwise(places)):
        raise InputError(f"expected room for {count} patches of {size} in {length} pixels, one at {own}: take fewer or smaller")
    return places
