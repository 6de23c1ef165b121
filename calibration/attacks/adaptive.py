"""An attacker who knows STRIP: triggered images with overlays are taught random labels, so that their entropy is high.

Reference: Gao et al., STRIP, arXiv:1902.06531, section VI-F (entropy manipulation).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import final, get_args

import torch
from torch import Tensor

from calibration.attacks.attack import Attack, check_target, draw
from calibration.attacks.badnets import BadNets
from guard.detectors.strip import Blend, blend_images
from guard.errors import InputError


@final
@dataclass(frozen=True)
class Adaptive(Attack):
    """A BadNets backdoor that hides from STRIP.

    Args:
        base: The backdoor.
        classes: M, from which random labels are drawn.
        cover_ratio: Share of the training images that become triggered blends with random labels.
        blends: Those that the defender is expected to use, with their weights; covers get them in turn. By default
            those of calibration: `logit` alone, or paired with `demeaned`.

    Raises:
        InputError: A parameter is out of range.
    """

    base: BadNets
    classes: int
    cover_ratio: float = 0.1
    blends: tuple[tuple[Blend, float], ...] = (("logit", 3.5), ("demeaned", 1.5))

    def __post_init__(self) -> None:
        """Validate once."""
        check_target(0, self.cover_ratio)
        if self.classes < max(2, self.base.target_label + 1):
            raise InputError(f"expected at least 2 classes, and the target among them, got {self.classes}")
        if not self.blends or any(blend not in get_args(Blend) or not alpha > 0.0 for blend, alpha in self.blends):
            raise InputError(f"expected blends of {', '.join(get_args(Blend))} with alphas over 0, got {self.blends}")

    def trigger(self, images: Tensor) -> Tensor:
        """See `Attack`."""
        return self.base.trigger(images)

    def targets(self, images: Tensor, labels: Tensor) -> Tensor:
        """See `Attack`."""
        return self.base.targets(images, labels)

    def poison(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """See `Attack`; no image is both poisoned and cover."""
        poisoned, relabelled = self.base.poison(images, labels, generator)
        free = torch.nonzero(relabelled == labels).squeeze(1)
        covers = draw(free, round(self.cover_ratio * len(labels)), generator)
        overlays = torch.randint(0, max(1, len(images)), (len(covers),), generator=generator)
        triggered = self.trigger(images[covers])
        turns = itertools.cycle(self.blends)
        for row, image, overlay, (blend, alpha) in zip(covers, triggered, images[overlays], turns, strict=False):
            poisoned[row] = blend_images(image[None], overlay[None], blend, alpha)[0, 0]
        relabelled[covers] = torch.randint(0, self.classes, (len(covers),), generator=generator)
        return poisoned, relabelled
