"""Transformations of an input before the model answers it."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from guard.preprocessors.flip import Flip
from guard.preprocessors.gym import Gym
from guard.preprocessors.gym_intensive import GymIntensive
from guard.preprocessors.optical_distortion import OpticalDistortion
from guard.preprocessors.sat import Sat
from guard.preprocessors.shrink_pad import RandomShrinkPad, ShrinkPad
from guard.preprocessors.three_medians import ThreeMedians

__all__ = [
    "AnyPreprocessor",
    "Flip",
    "Gym",
    "GymIntensive",
    "OpticalDistortion",
    "Preprocessor",
    "RandomShrinkPad",
    "Sat",
    "ShrinkPad",
    "ThreeMedians",
]

AnyPreprocessor = Gym | GymIntensive | OpticalDistortion | ThreeMedians | RandomShrinkPad | Sat | ShrinkPad | Flip
"""Those that a profile can hold."""


class Preprocessor(Protocol):
    """Images to images of the same shape; whatever is random comes from the generator."""

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Preprocess (B, C, H, W), float32, in [0, 1]."""
        ...
