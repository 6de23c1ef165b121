"""Three median filters in different spaces, GYM's T2.

1. in gamma space: x^0.6, median
2. brightened and extended: min(1, 1.53 x)^2.6, scale to 0.75, median, back to size
3. scale to 0.8, median, back to size

It draws nothing. Reference: Zeng et al., GYM (DeepSweep), arXiv:2012.07006, T2; 2.6 is from its public code.
"""

from __future__ import annotations

import msgspec
import torch
from torch import Tensor

from guard.errors import InputError
from guard.preprocessors.median import check_kernel, median_filter
from guard.preprocessors.resizing import blur_by_scaling, resize


class ThreeMedians(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="three-medians", tag_field="name"
):
    """Median filters in gamma space, in extended gamma space at 0.75 of the size, and at 0.8 of it.

    Args:
        kernel: Side of the filters, 3 or 5.
        compression: First gamma.
        gain: Before the second gamma; what is over 1 then is cut off.
        extension: Second gamma.

    Raises:
        InputError: A parameter is out of range.
    """

    kernel: int = 5
    compression: float = 0.6
    gain: float = 1.53
    extension: float = 2.6

    def __post_init__(self) -> None:
        """Validate once."""
        check_kernel(self.kernel)
        if min(self.compression, self.gain, self.extension) <= 0.0:
            raise InputError(f"expected positive gammas and gain, got {self.compression}, {self.gain}, {self.extension}")

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:  # noqa: ARG002 - one contract
        """Filter; images (B, C, H, W) in [0, 1], the same shape out."""
        lightened = median_filter(images.clamp(0.0, 1.0).pow(self.compression), self.kernel)
        dimmed = lightened.mul(self.gain).clamp_(max=1.0).pow(self.extension)
        return median_at(median_at(dimmed, self.kernel, 0.75), self.kernel, 0.8)


def median_at(images: Tensor, kernel: int, scale: float) -> Tensor:
    """Median filter at another size: scale (bilinear), filter, scale back.

    Args:
        images: (B, C, H, W), in [0, 1].
        kernel: Side of the filter, 3 or 5.
        scale: Of the sides.
    """
    height, width = int(images.shape[-2]), int(images.shape[-1])
    small = max(1, round(height * scale)), max(1, round(width * scale))
    if kernel == 1:
        return blur_by_scaling(images, *small).clamp_(0.0, 1.0)
    return resize(median_filter(resize(images, *small), kernel), height, width).clamp_(0.0, 1.0)
