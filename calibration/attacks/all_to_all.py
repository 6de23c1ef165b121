"""All-to-all: the trigger moves every label i to i + 1.

Blind spot of STRIP: superimposed images are answered with labels that follow the overlay.

Reference: Gu et al., BadNets, arXiv:1708.06733, section 3.1.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from calibration.attacks.attack import Attack, check_target, relabel_share
from calibration.attacks.patch import SQUARE, Patch
from guard.errors import InputError


@final
@dataclass(frozen=True)
class AllToAll(Attack):
    """A patch that moves labels on by one.

    Args:
        classes: M; the last label becomes 0.
        ratio: Share of the training images that are poisoned.
        patch: The trigger.

    Raises:
        InputError: A parameter is out of range.
    """

    classes: int
    ratio: float = 0.1
    patch: Patch = SQUARE

    def __post_init__(self) -> None:
        """Validate once."""
        check_target(0, self.ratio)
        if self.classes < 2:
            raise InputError(f"expected at least 2 classes, got {self.classes}")

    def trigger(self, images: Tensor) -> Tensor:
        """See `Attack`."""
        return self.patch.stamp(images)

    def targets(self, images: Tensor, labels: Tensor) -> Tensor:
        """See `Attack`.

        Raises:
            InputError: A label is none of the classes.
        """
        if bool(((labels < 0) | (labels >= self.classes)).any()):
            raise InputError(f"expected labels from 0 to {self.classes - 1}, got {int(labels.min())} to {int(labels.max())}")
        return (labels + 1) % self.classes

    def poison(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """See `Attack`."""
        return relabel_share(self, self.ratio, images, labels, generator)
