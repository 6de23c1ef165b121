"""GYM's lightweight preprocessing, at inference time.

    median k x k -> scale to 0.8 -> median k x k -> back to size -> SAT

It breaks triggers, and belongs to a model that was tuned for it: on one that was not, clean accuracy falls far, which is
why calibration measures it and refuses a large drop. `guard repair --method gym` tunes a model.

Reference: Zeng et al., GYM (DeepSweep), arXiv:2012.07006; the public code's parameters.
"""

from __future__ import annotations

import msgspec
import torch
from torch import Tensor

from guard.errors import InputError
from guard.preprocessors.median import check_kernel, median_filter
from guard.preprocessors.sat import Sat
from guard.preprocessors.three_medians import median_at


class Gym(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="gym", tag_field="name"):
    """GYM's lightweight function.

    Args:
        kernel: Side of the median filters, 3 or 5.
        scale: Size of the image between the medians, as a share.
        shift: SAT's largest shift, as a share of the side.
        rotation: SAT's largest rotation, in degrees.
        zoom: SAT's largest relative change of size.
        views: Draws of SAT whose answers are averaged (ours). Each costs a forward pass.

    Raises:
        InputError: A parameter is out of range.
    """

    kernel: int = 5
    scale: float = 0.8
    shift: float = 0.16
    rotation: float = 4.0
    zoom: float = 0.16
    views: int = 1

    def __post_init__(self) -> None:
        """Validate once."""
        check_kernel(self.kernel)
        if not 0.0 < self.scale <= 1.0:
            raise InputError(f"expected a scale in (0, 1], got {self.scale}")
        if self.views < 1:
            raise InputError(f"expected at least one view, got {self.views}")
        Sat(shift=self.shift, rotation=self.rotation, zoom=self.zoom)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Preprocess a batch.

        Args:
            images: (B, C, H, W), float32, in [0, 1].
            generator: A CPU generator; SAT draws from it.

        Returns:
            The same shape, in [0, 1].
        """
        return self.sat(self.filter(images), generator)

    def filter(self, images: Tensor) -> Tensor:
        """The part before SAT, which draws nothing."""
        return median_at(median_filter(images, self.kernel), self.kernel, self.scale)

    @property
    def sat(self) -> Sat:
        """The stochastic affine transformation alone."""
        return Sat(shift=self.shift, rotation=self.rotation, zoom=self.zoom)
