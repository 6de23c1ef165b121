"""Blended injection: a whole key image, faintly mixed into the input.

    x' = (1 - alpha) x + alpha k

The key k is a pattern of random pixels.

Reference: Chen et al., Targeted Backdoor Attacks Using Data Poisoning, arXiv:1712.05526, section 4.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from calibration.attacks.attack import Attack, check_target, one_target, relabel_share
from guard.errors import InputError


@final
@dataclass(frozen=True)
class Blended(Attack):
    """A random key image, mixed in.

    Args:
        target_label: What triggered inputs are to be answered with.
        ratio: Share of the training images that are poisoned.
        alpha: Weight of the key, in (0, 1]; the paper's 0.2.
        seed: Of the key.

    Raises:
        InputError: A parameter is out of range.
    """

    target_label: int
    ratio: float = 0.1
    alpha: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        """Validate once."""
        check_target(self.target_label, self.ratio)
        if not 0.0 < self.alpha <= 1.0:
            raise InputError(f"expected alpha in (0, 1], got {self.alpha}")

    def trigger(self, images: Tensor) -> Tensor:
        """See `Attack`."""
        key = torch.rand(images.shape[1:], generator=torch.Generator().manual_seed(self.seed)).to(images.device)
        return (1.0 - self.alpha) * images + self.alpha * key

    def targets(self, images: Tensor, labels: Tensor) -> Tensor:
        """See `Attack`."""
        return one_target(labels, self.target_label)

    def poison(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """See `Attack`."""
        return relabel_share(self, self.ratio, images, labels, generator)
