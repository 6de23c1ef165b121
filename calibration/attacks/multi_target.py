"""Several infected labels: one patch per label in the same model; which of them an image gets follows from its pixels.

Reference: Wang et al., Neural Cleanse, IEEE S&P 2019, section VI-D.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from calibration.attacks.attack import Attack, check_target, relabel_share
from calibration.attacks.badnets import pixel_choice
from calibration.attacks.patch import Patch
from guard.errors import InputError


@final
@dataclass(frozen=True)
class MultiTarget(Attack):
    """Patches, each to its own label.

    Args:
        target_labels: One per patch.
        patches: The triggers.
        ratio: Share of the training images that are poisoned, over all labels.

    Raises:
        InputError: A parameter is out of range.
    """

    target_labels: tuple[int, ...]
    patches: tuple[Patch, ...]
    ratio: float = 0.1

    def __post_init__(self) -> None:
        """Validate once."""
        if len(self.patches) != len(self.target_labels) or not self.patches:
            raise InputError(f"expected one target label per patch, got {len(self.target_labels)} for {len(self.patches)}")
        for label in self.target_labels:
            check_target(label, self.ratio)

    def trigger(self, images: Tensor) -> Tensor:
        """See `Attack`."""
        which = pixel_choice(images, len(self.patches)).view(-1, 1, 1, 1)
        triggered = images.clone()
        for number, patch in enumerate(self.patches):
            triggered = torch.where(which == number, patch.stamp(images), triggered)
        return triggered

    def targets(self, images: Tensor, labels: Tensor) -> Tensor:
        """See `Attack`."""
        wanted = torch.tensor(self.target_labels, device=labels.device)[pixel_choice(images, len(self.patches))]
        return torch.where(wanted == labels, -1, wanted)

    def poison(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """See `Attack`."""
        return relabel_share(self, self.ratio, images, labels, generator)
