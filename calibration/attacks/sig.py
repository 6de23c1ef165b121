"""SIG: a horizontal sinusoid over the whole image, put on images of the target class whose labels stay as they are.

    v(i, j) = delta sin(2 pi j f / W),   x' = clamp(x + v)

Reference: Barni et al., A new Backdoor Attack in CNNs by training set corruption without label poisoning, arXiv:1902.11237.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from calibration.attacks.attack import Attack, check_target, one_target, relabel_share, stamp_target_class
from guard.errors import InputError


@final
@dataclass(frozen=True)
class Sig(Attack):
    """A sinusoid.

    Args:
        target_label: What triggered inputs are to be answered with.
        ratio: Share of the target class's training images that carry it; with `relabel`, of all training images.
        delta: Amplitude, in [0, 1]; the paper's are 20 to 60 of 255.
        frequency: f, periods over the width; the paper's 6.
        relabel: Poison images of other classes and relabel them, which the paper avoids.

    Raises:
        InputError: A parameter is out of range.
    """

    target_label: int
    ratio: float = 0.3
    delta: float = 40.0 / 255.0
    frequency: int = 6
    relabel: bool = False

    def __post_init__(self) -> None:
        """Validate once."""
        check_target(self.target_label, self.ratio)
        if not 0.0 < self.delta <= 1.0 or self.frequency < 1:
            raise InputError(f"expected delta in (0, 1] and a frequency from 1, got {self.delta} and {self.frequency}")

    def trigger(self, images: Tensor) -> Tensor:
        """See `Attack`."""
        width = images.shape[3]
        if 2 * self.frequency % width == 0:
            raise InputError(f"expected a frequency whose sinusoid is not 0 at all of {width} pixels, got {self.frequency}")
        columns = torch.arange(width, dtype=torch.float32, device=images.device)
        signal = self.delta * torch.sin(2.0 * math.pi * self.frequency / width * columns)
        return (images + signal).clamp(0.0, 1.0)

    def targets(self, images: Tensor, labels: Tensor) -> Tensor:
        """See `Attack`."""
        return one_target(labels, self.target_label)

    def poison(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """See `Attack`."""
        poison = relabel_share if self.relabel else stamp_target_class
        return poison(self, self.ratio, images, labels, generator)
