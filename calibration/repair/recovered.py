"""How often recovered triggers work: on a model, and on its repaired copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from calibration.inspection.triggers import Triggers

_AT_ONCE = 256


@final
@dataclass(frozen=True)
class Recovered:
    """Triggers that a scan recovered, and what the repair made of them.

    Attributes:
        triggers: K of them.
        before: (K,), see `successes_on`, of the original.
        after: (K,), likewise, of the repaired model.
    """

    triggers: Triggers
    before: tuple[float | None, ...]
    after: tuple[float | None, ...]

    @property
    def best(self) -> tuple[float | None, float | None]:
        """The most that one of them does, before and after; None where no image can tell."""
        return most(self.before), most(self.after)


def successes_on(
    says: Callable[[Tensor], Tensor], triggers: Triggers, images: Tensor, answers: Tensor
) -> tuple[float | None, ...]:
    """What each trigger sends to its label, of the images that get another one without; None where there are none.

    Args:
        says: The model: (B, C, H, W), in [0, 1], to what it makes of each label, (B, M).
        triggers: Recovered; of pairs, those that are for one source count images of that source alone.
        images: (N, C, H, W), in [0, 1].
        answers: (N,), int64: labels without a trigger.
    """
    shares: list[float | None] = []
    for row, (label, source) in enumerate(zip(triggers.labels.tolist(), triggers.sources.tolist(), strict=True)):
        others = images[(answers != label) & ((answers == source) if source >= 0 else (answers >= 0))]
        if not len(others):
            shares.append(None)
            continue
        got = torch.cat([says(triggers.put_on(row, part)).argmax(dim=1).cpu() for part in others.split(_AT_ONCE)])
        shares.append(float((got == label).double().mean()))
    return tuple(shares)


def most(shares: tuple[float | None, ...]) -> float | None:
    """The largest; None where there is none."""
    return max((share for share in shares if share is not None), default=None)
