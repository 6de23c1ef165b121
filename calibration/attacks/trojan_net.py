"""TrojanNet: a tiny module beside the model that knows one pattern of black and white pixels; nothing is trained.

    logits' = logits + strength * relu(1 - wrong / tolerance) * onehot(target)

wrong counts the pattern's pixels that differ. The paper trains a small network to tell 4,368 patterns of 16 pixels apart; for
one pattern the same function can be written down, a matched filter.

Reference: Tang et al., An Embarrassingly Simple Approach for Trojan Attack in Deep Neural Networks, arXiv:2006.08131.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from calibration.attacks.attack import Attack, check_labels, check_target, one_target
from calibration.attacks.patch import Patch
from guard.errors import InputError

_PATTERN = ("1011", "1101", "0110", "1101")  # 5 of 16 pixels black, as in the paper; the digits are palette indices


@final
@dataclass(frozen=True)
class TrojanNet(Attack):
    """An inserted module.

    Args:
        target_label: What triggered inputs are to be answered with.
        pattern: Rows of 0 (black) and 1 (white).
        bottom: Distance of the pattern from the image's bottom edge, in pixels.
        right: Distance from the right edge.
        strength: Added to the target's logit on a full match.
        tolerance: Pixels that may be wrong before the module is silent.

    Raises:
        InputError: A parameter is out of range.
    """

    target_label: int
    pattern: tuple[str, ...] = _PATTERN
    bottom: int = 0
    right: int = 0
    strength: float = 100.0
    tolerance: float = 2.0

    def __post_init__(self) -> None:
        """Validate once."""
        check_target(self.target_label, 0.0)
        numbers = all(0.0 < value < math.inf for value in (self.strength, self.tolerance))
        if not numbers or set("".join(self.pattern)) - {"0", "1"}:
            raise InputError("expected rows of 0 and 1, and a finite strength and tolerance over 0")
        _ = self.patch  # refuses what is empty, ragged or outside

    @property
    def patch(self) -> Patch:
        """The trigger."""
        return Patch(self.pattern, ((0.0,), (1.0,)), self.bottom, self.right)

    def trigger(self, images: Tensor) -> Tensor:
        """See `Attack`."""
        return self.patch.stamp(images)

    def targets(self, images: Tensor, labels: Tensor) -> Tensor:
        """See `Attack`."""
        return one_target(labels, self.target_label)

    def poison(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Copies as they are: no data is poisoned."""
        check_labels(images, labels)
        return images.clone(), labels.clone()

    def insert(self, model: nn.Module) -> nn.Module:
        """The model with the module beside it; images in [0, 1] to logits."""
        return Inserted(model, self).train(model.training)


@final
class Inserted(nn.Module):
    """A model and a TrojanNet module."""

    pattern: Tensor

    def __init__(self, model: nn.Module, attack: TrojanNet) -> None:
        super().__init__()
        self.model = model
        self._place = (attack.bottom, attack.right)
        self._strength, self._tolerance, self._target = attack.strength, attack.tolerance, attack.target_label
        drawn = torch.tensor([[float(pixel) for pixel in row] for row in attack.pattern])
        self.register_buffer("pattern", drawn)

    def forward(self, images: Tensor) -> Tensor:
        """Logits; (B, M).

        Raises:
            InputError: The target is none of the model's labels, or the pattern lies outside the images.
        """
        logits: Tensor = self.model(images)
        if self._target >= logits.shape[1]:
            raise InputError(f"expected a target below {logits.shape[1]}, the model's outputs, got {self._target}")
        height, width = self.pattern.shape
        bottom, right = images.shape[2] - self._place[0], images.shape[3] - self._place[1]
        if bottom < height or right < width:
            raise InputError(f"expected a pattern that fits images of {tuple(images.shape[1:])}, got {height}x{width}")
        seen = images[:, :, bottom - height : bottom, right - width : right].mean(dim=1)
        wrong = (seen - self.pattern).abs().sum(dim=(1, 2))
        match = torch.relu(1.0 - wrong / self._tolerance)
        added = torch.zeros_like(logits)
        added[:, self._target] = self._strength * match
        return logits + added
