"""How to repair: the methods, what each needs, and what it may cost."""

from __future__ import annotations

import math

import msgspec

from calibration.inspection.search import Search
from calibration.repair.cyclegan import Training
from calibration.repair.dhbe_settings import Dhbe
from calibration.repair.drawn import Drawn
from calibration.repair.gdm import Gdm
from calibration.repair.gym import Recipe
from calibration.repair.record import Method
from guard.errors import RepairError

MAX_ACCURACY_DROP: dict[Method, float] = {
    "gym": 12.0,
    "codefend": 3.0,
    "unlearn": 3.6,
    "prune": 3.0,
    "fine-prune": 5.0,
    "fine-tune": 5.0,
    "nad": 5.0,
    "mcr": 5.0,
    "gdm": 5.0,
    "dhbe": 3.0,
}
"""Points of clean accuracy that a repair may cost unless told otherwise; Neural Cleanse lost up to 3.6 (its table IV)."""

NEEDS_TRIGGERS: frozenset[Method] = frozenset({"unlearn", "prune", "gdm"})
"""Methods that work with the triggers that a scan recovered."""

DATA_FREE: frozenset[Method] = frozenset({"dhbe"})
"""Methods that learn from no images; those that are given measure the repair."""


class RepairSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How to repair.

    Attributes:
        method: One of `Method`.
        max_accuracy_drop: Points of clean accuracy that it may cost; None for the method's own, see `MAX_ACCURACY_DROP`.
        recipe: Of gym and dhbe: `distilled` is ours, `paper` the paper's.
        views: Of gym: draws whose answers are averaged when serving.
        epochs: Of fine-tuning, at most; of unlearn, in each turn; of dhbe, in all; None for the method's own.
        gan: Of codefend's CycleGAN.
        search: For triggers, where the method needs them and none are given.
        rounds: Of unlearn: searches for what is left, and unlearns it, too.
        gdm: How; None for the method's own.
        dhbe: How, as published; None for what the model needs, see `Dhbe.suited`, or for ours.
        drawn: How dhbe goes on in ours; None for the usual.
        allow_missing_classes: Learn from clean images though they hold none of a class, which the copy may forget.
        seed: Of the cut and of every draw.
    """

    method: Method
    max_accuracy_drop: float | None = None
    recipe: Recipe = "distilled"
    views: int = 1
    epochs: int | None = None
    gan: Training = Training()
    search: Search = Search()
    rounds: int = 3
    gdm: Gdm | None = None
    dhbe: Dhbe | None = None
    drawn: Drawn | None = None
    allow_missing_classes: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        if self.max_accuracy_drop is not None and not math.isfinite(self.max_accuracy_drop):
            raise RepairError(f"expected --max-accuracy-drop as points, got {self.max_accuracy_drop}: 100 allows any")
        if self.epochs is not None and self.epochs < 1:
            raise RepairError(f"expected at least one epoch, got {self.epochs}")
        if self.views < 1:
            raise RepairError(f"expected at least one view, got {self.views}")
        if self.gan.epochs < 2:
            raise RepairError(f"expected at least two epochs of the CycleGAN, got {self.gan.epochs}")
        if self.rounds < 1:
            raise RepairError(f"expected at least one round, got {self.rounds}")

    @property
    def allowed_drop(self) -> float:
        """Points."""
        return MAX_ACCURACY_DROP[self.method] if self.max_accuracy_drop is None else self.max_accuracy_drop
