"""Source-specific (partial) backdoor: the trigger works on images of some classes only.

Cover images, of the other classes with the trigger and their own labels, teach the model to ignore it there.

Blind spot of STRIP: a blend with an overlay of another class no longer looks like the source.

Reference: Gao et al., STRIP, arXiv:1902.06531, section VII; Wang et al., Neural Cleanse, section VI-D.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from calibration.attacks.attack import Attack, check_labels, check_target, draw
from calibration.attacks.patch import SQUARE, Patch
from guard.errors import InputError


@final
@dataclass(frozen=True)
class SourceSpecific(Attack):
    """A patch that moves images of the source classes alone.

    Args:
        target_label: What they are to be answered with.
        sources: Labels on which the trigger works.
        ratio: Share of the sources' training images that are poisoned.
        cover_ratio: Share of the other images that carry the trigger and keep their labels.
        patch: The trigger.

    Raises:
        InputError: A parameter is out of range.
    """

    target_label: int
    sources: tuple[int, ...]
    ratio: float = 0.5
    cover_ratio: float = 0.1
    patch: Patch = SQUARE

    def __post_init__(self) -> None:
        """Validate once."""
        check_target(self.target_label, self.ratio)
        check_target(self.target_label, self.cover_ratio)
        if not self.sources or self.target_label in self.sources:
            raise InputError(f"expected source labels other than the target, got {self.sources} for {self.target_label}")

    def trigger(self, images: Tensor) -> Tensor:
        """See `Attack`."""
        return self.patch.stamp(images)

    def targets(self, images: Tensor, labels: Tensor) -> Tensor:
        """See `Attack`."""
        return torch.where(self._from_source(labels), self.target_label, -1)

    def poison(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """See `Attack`."""
        check_labels(images, labels)
        source = self._from_source(labels)
        mine, others = torch.nonzero(source).squeeze(1), torch.nonzero(~source).squeeze(1)
        moved = draw(mine, round(self.ratio * len(mine)), generator)
        covers = draw(others, round(self.cover_ratio * len(others)), generator)
        poisoned, relabelled = images.clone(), labels.clone()
        stamped = torch.cat([moved, covers])
        poisoned[stamped] = self.trigger(images[stamped])
        relabelled[moved] = self.target_label
        return poisoned, relabelled

    def _from_source(self, labels: Tensor) -> Tensor:
        return torch.isin(labels, torch.tensor(self.sources, device=labels.device))
