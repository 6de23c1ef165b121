"""What every preprocessor does."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Preprocessor(Protocol):
    """Images to images of the same shape; whatever is random comes from the generator."""

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Preprocess (B, C, H, W), float32, in [0, 1]."""
        ...
