"""Steganographic: a text, written into the lowest bits of every pixel.

Reference: Li et al., Invisible Backdoor Attacks on Deep Neural Networks via Steganography and Regularization,
arXiv:1909.02742, section III-B.
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
class Steganographic(Attack):
    """A text in the lowest bits, repeated until the image is full, row by row and channel by channel.

    Args:
        target_label: What triggered inputs are to be answered with.
        ratio: Share of the training images that are poisoned.
        text: What is hidden.
        bits: How many of the 8 bits of each value are replaced; 1 is the classic.

    Raises:
        InputError: A parameter is out of range.
    """

    target_label: int
    ratio: float = 0.1
    text: str = "the quick brown fox jumps over the lazy dog"
    bits: int = 1

    def __post_init__(self) -> None:
        """Validate once."""
        check_target(self.target_label, self.ratio)
        if not self.text or not 1 <= self.bits <= 8:
            raise InputError(f"expected a text and 1 to 8 bits, got {self.text!r} and {self.bits}")

    def trigger(self, images: Tensor) -> Tensor:
        """See `Attack`."""
        stream = torch.tensor([byte >> shift & 1 for byte in self.text.encode() for shift in range(7, -1, -1)])
        size = images.shape[1:].numel()
        bits = stream.repeat(-(-size * self.bits // len(stream)))[: size * self.bits].view(size, self.bits)
        hidden = (bits * 2 ** torch.arange(self.bits)).sum(dim=1).view(images.shape[1:]).to(images.device)
        values = (images * 255.0).round().to(torch.int64)
        return ((values >> self.bits << self.bits) + hidden).to(torch.float32) / 255.0

    def targets(self, images: Tensor, labels: Tensor) -> Tensor:
        """See `Attack`."""
        return one_target(labels, self.target_label)

    def poison(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """See `Attack`."""
        return relabel_share(self, self.ratio, images, labels, generator)
