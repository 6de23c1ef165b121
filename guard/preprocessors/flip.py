"""FLIP: the image's mirror image. It draws nothing, and moves a trigger that is not in the middle.

Reference: Li et al., Rethinking the Trigger of Backdoor Attack, arXiv:2004.04692.
"""

from __future__ import annotations

import msgspec
import torch
from torch import Tensor


class Flip(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="flip", tag_field="name"):
    """Left and right exchanged."""

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:  # noqa: ARG002 - one contract
        """Mirror; images (B, C, H, W), the same shape out."""
        return images.flip(-1)
