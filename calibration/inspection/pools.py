"""Of images in the order of the model's answers, those that a goal wants to send somewhere: all but one run, or one run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from calibration.inspection.triggers import Goals
from guard.errors import CalibrationError


@final
@dataclass(frozen=True)
class Pools:
    """See the top of this file.

    Attributes:
        first: (K,), int64: where its images begin.
        count: (K,), int64: how many there are.
        gap: (K,), int64: where the run of those lies that get the label anyway.
        skip: (K,), int64: how long that is.
    """

    first: Tensor
    count: Tensor
    gap: Tensor
    skip: Tensor

    @classmethod
    def of(cls, own: Tensor, goals: Goals) -> Pools:
        """The pools of goals among images with these answers, sorted."""
        labels, sources = goals.labels.to(own.device), goals.sources.to(own.device)

        def run(wanted: Tensor) -> tuple[Tensor, Tensor]:
            begin = torch.searchsorted(own, wanted)
            return begin, torch.searchsorted(own, wanted, right=True) - begin

        (first, count), (gap, skip), all_of_them = run(sources), run(labels), sources < 0
        pools = cls(
            torch.where(all_of_them, 0, first),
            torch.where(all_of_them, len(own) - skip, count),
            gap,
            torch.where(all_of_them, skip, 0),
        )
        empty = torch.nonzero(pools.count == 0).flatten().tolist()
        if empty:
            label, source = int(labels[empty[0]]), int(sources[empty[0]])
            what = f"gives label {source}" if source >= 0 else f"gives another label than {label}"
            raise CalibrationError(f"expected clean images that the model {what}, got none: add images of every class")
        return pools

    def select(self, rows: Tensor | slice) -> Pools:
        """Of some goals."""
        return Pools(self.first[rows], self.count[rows], self.gap[rows], self.skip[rows])

    def draw(self, draws: Tensor) -> Tensor:
        """Numbers from 0 to 1, (B,), to images, (K, B)."""
        chosen = self.first.unsqueeze(1) + (draws * self.count.unsqueeze(1)).long()
        return chosen + (chosen >= self.gap.unsqueeze(1)) * self.skip.unsqueeze(1)
