"""Transformations of an input before the model answers it."""

from __future__ import annotations

from guard.preprocessors.answering import answer_through, answer_views, views_of
from guard.preprocessors.flip import Flip
from guard.preprocessors.gym import Gym
from guard.preprocessors.gym_intensive import GymIntensive
from guard.preprocessors.optical_distortion import OpticalDistortion
from guard.preprocessors.preprocessor import Preprocessor
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
    "answer_through",
    "answer_views",
    "views_of",
]

AnyPreprocessor = Gym | GymIntensive | OpticalDistortion | ThreeMedians | RandomShrinkPad | Sat | ShrinkPad | Flip
"""Those that a profile can hold."""
