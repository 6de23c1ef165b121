"""BadNets: a patch, stamped on a share of the training images, whose labels become the target.

Several patches may lead to the one label; which of them an image gets follows from its pixels.

Reference: Gu et al., BadNets, arXiv:1708.06733; several triggers for one label as in Wang et al., Neural Cleanse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from calibration.attacks.attack import Attack, check_target, one_target, relabel_share
from calibration.attacks.patch import SQUARE, Patch
from guard.errors import InputError


@final
@dataclass(frozen=True)
class BadNets(Attack):
    """Patches, all to one label.

    Args:
        target_label: What triggered inputs are to be answered with.
        ratio: Share of the training images that are poisoned.
        patches: The triggers; each image gets one.

    Raises:
        InputError: A parameter is out of range.
    """

    target_label: int
    ratio: float = 0.1
    patches: tuple[Patch, ...] = (SQUARE,)

    def __post_init__(self) -> None:
        """Validate once."""
        check_target(self.target_label, self.ratio)
        if not self.patches:
            raise InputError("expected at least one patch, got none")

    def trigger(self, images: Tensor) -> Tensor:
        """See `Attack`."""
        which = pixel_choice(images, len(self.patches)).view(-1, 1, 1, 1)
        triggered = self.patches[0].stamp(images)
        for number, patch in enumerate(self.patches[1:], start=1):
            triggered = torch.where(which == number, patch.stamp(images), triggered)
        return triggered

    def targets(self, images: Tensor, labels: Tensor) -> Tensor:
        """See `Attack`."""
        return one_target(labels, self.target_label)

    def poison(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """See `Attack`."""
        return relabel_share(self, self.ratio, images, labels, generator)


def pixel_choice(images: Tensor, count: int) -> Tensor:
    """(B,), int64: a number below `count` for each image, spread evenly, that follows from its 8-bit pixels."""
    return (images * 255.0).round().to(torch.int64).flatten(1).sum(dim=1) % count
