"""What to calibrate, and what can't be calibrated from so few images."""

from __future__ import annotations

from typing import Literal

import msgspec

from calibration.thresholds import Method, check_rates
from guard.detectors import Blend
from guard.errors import CalibrationError

BlendChoice = Literal["logit", "logit+demeaned", "add", "mix", "demeaned", "max"]
"""How overlays are superimposed: by one blend, or by two, each with a detector of its own, either of which may reject."""

PreprocessChoice = Literal["none", "gym", "gym-intensive", "shrink-pad", "flip"]
"""What happens to an image before the model answers it."""

_PAIR: tuple[tuple[Blend, float], ...] = (("logit", 3.5), ("demeaned", 1.5))
_ALPHAS: dict[Blend, float] = {"add": 1.0, "mix": 0.5, "demeaned": 1.5, "max": 1.0, "logit": 3.5}
_MIN_OVERLAYS = 2


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What to calibrate.

    A pair of blends shares what is asked for: half of the overlays and half of the false rejection rate each.

    Attributes:
        frr: False rejection rate asked for, of the guard as a whole.
        overlays: N, of all detectors together: forward passes that an input takes at most.
        blend: How overlays are superimposed.
        alpha: Their weight, for a single blend; None for the blend's own default (3.5 for `logit`, 1.5 for `demeaned`,
            .5 for `mix`, 1 for `add` and `max`).
        preprocess: What happens to an image before the model answers it.
        max_accuracy_drop: Points of clean accuracy that the preprocessor may cost.
        method: Of setting the threshold.
        confidence: With which the rate must hold; None bounds its mean.
        allow_missing_classes: Go on when the clean set holds no image of a class.
        seed: Of the split and the preprocessor's draws.
    """

    frr: float = 0.01
    overlays: int = 100
    blend: BlendChoice = "logit"
    alpha: float | None = None
    preprocess: PreprocessChoice = "none"
    max_accuracy_drop: float = 3.0
    method: Method = "conformal"
    confidence: float | None = None
    allow_missing_classes: bool = False
    seed: int = 0


def strips(choice: BlendChoice, alpha: float | None = None) -> tuple[tuple[Blend, float], ...]:
    """Blend and alpha of each detector that a choice stands for, in the order in which they run.

    Raises:
        CalibrationError: An alpha for several blends.
    """
    if choice == "logit+demeaned":
        if alpha is not None:
            raise CalibrationError(
                f"expected alpha with a single blend, got {alpha:g} for {choice}: name one, like --blend logit, or drop --alpha"
            )
        return _PAIR
    return ((choice, _ALPHAS[choice] if alpha is None else alpha),)


def named(choice: BlendChoice, alpha: float | None) -> str:
    """`logit 3.5`, or `logit+demeaned`, for people."""
    return choice if alpha is None else f"{choice} {alpha:g}"


def check_settings(settings: Settings, images: int) -> None:
    """Refuse, before any work, what can't be calibrated from so many images; see `calibrate`."""
    detectors = len(strips(settings.blend, settings.alpha))
    fewest = _MIN_OVERLAYS * detectors
    if settings.overlays < fewest:
        of = "" if detectors == 1 else f" for {settings.blend}"
        raise CalibrationError(f"expected at least {fewest} overlays{of}, got {settings.overlays}: the paper uses 100")
    if images <= settings.overlays:
        raise CalibrationError(
            f"expected more clean images than the {settings.overlays} overlays, got {images}: "
            "add images or use fewer --overlays"
        )
    check_rates(images - settings.overlays, settings.frr, settings.method, settings.confidence, detectors)
