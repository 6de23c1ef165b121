"""GYM's intensive preprocessing, for fine-tuning (and, without it, the paper's "Inference (I)").

    T1 optical distortion -> T2 three median filters -> T3 random shrinking with padding -> T4 SAT

Reference: Zeng et al., GYM (DeepSweep), arXiv:2012.07006; the public code's parameters.
"""

from __future__ import annotations

import msgspec
import torch
from torch import Tensor

from guard.preprocessors.optical_distortion import OpticalDistortion
from guard.preprocessors.sat import Sat
from guard.preprocessors.shrink_pad import RandomShrinkPad
from guard.preprocessors.three_medians import ThreeMedians


class GymIntensive(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="gym-intensive", tag_field="name"
):
    """GYM's intensive function: T1 to T4, in order.

    Args:
        distortion: T1.
        medians: T2.
        shrink: T3.
        sat: T4.
    """

    distortion: OpticalDistortion = OpticalDistortion()
    medians: ThreeMedians = ThreeMedians()
    shrink: RandomShrinkPad = RandomShrinkPad()
    sat: Sat = Sat()

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Preprocess; images (B, C, H, W) in [0, 1], the same shape out; T1, T3 and T4 draw from the CPU generator."""
        counts = [self.distortion.draws, self.shrink.draws, self.sat.draws]
        draws = torch.rand(len(images), sum(counts), generator=generator, dtype=torch.float64).split(counts, dim=1)
        filtered = self.medians(self.distortion.move(images, draws[0]), generator)
        return self.sat.move(self.shrink.move(filtered, draws[1]), draws[2])
