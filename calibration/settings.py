"""What to calibrate, and what can't be calibrated from so few images."""

from __future__ import annotations

from typing import Literal

import msgspec

from calibration.boundaries import images_for_boundaries, images_needed
from calibration.thresholds import Method, check_rates
from guard.choices import check_choice
from guard.detectors import Blend
from guard.errors import CalibrationError, TooFewImagesError

BlendChoice = Literal["logit", "logit+demeaned", "add", "mix", "demeaned", "max"]
"""How overlays are superimposed: by one blend, or by two, each with a detector of its own, either of which may reject."""

DetectorChoice = Literal["strip", "feature-squeezing"]
"""An online test that needs nothing but the model and clean images."""

PassesChoice = Literal["exact", "votes", "sequential"]
"""How many of STRIP's passes an input takes: as many as make the verdict of their mean entropy certain, as many as give it the
votes of a few overlays, see `guard.detectors.votes`, or fewer, by boundaries on soft votes that are calibrated along with the
threshold, see `guard.detectors.boundaries`."""

PrecisionChoice = Literal["float32", "bfloat16", "auto"]
"""Of detectors' forward passes in PyTorch on a CPU; `auto` takes bfloat16 where that is clearly faster and turns hardly any
verdict."""

PreprocessChoice = Literal["none", "gym", "gym-intensive", "shrink-pad", "flip"]
"""What happens to an image before the model answers it."""

_PAIR: tuple[tuple[Blend, float], ...] = (("logit", 3.5), ("demeaned", 1.5))
_ALPHAS: dict[Blend, float] = {"add": 1.0, "mix": 0.5, "demeaned": 1.5, "max": 1.0, "logit": 3.5}
_MIN_OVERLAYS = 2
_VOTES, _FEWEST_VOTES = 0.05, 3  # of the overlays: as few as hide a trigger seldom, on development victims
_MIN_VOTERS = 10  # overlays: of fewer, nearly all would have to vote


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What to calibrate.

    Detectors share the false rejection rate equally. A pair of blends is two detectors, and shares the overlays, too.

    Attributes:
        detectors: Which, besides the activation filters.
        triggers: Activation filters; `calibrate` counts the triggers that it is given.
        frr: False rejection rate asked for, of the guard as a whole.
        overlays: N, of all of STRIP's detectors together: forward passes that an input takes at most. The same images choose
            the neurons of activation filters.
        blend: How overlays are superimposed.
        alpha: Their weight, for a single blend; None for the blend's own default (3.5 for `logit`, 1.5 for `demeaned`,
            .5 for `mix`, 1 for `add` and `max`).
        passes: How many an input takes.
        stage_rows: Blends in a first stage's batch, at least; None for as many as are fastest, by `calibration.stages`.
        precision: Of detectors' passes.
        preprocess: What happens to an image before the model answers it.
        max_accuracy_drop: Points of clean accuracy that the preprocessor may cost.
        method: Of setting the threshold.
        confidence: With which the rate must hold; None bounds its mean.
        allow_missing_classes: Go on when the clean set holds no image of a class.
        seed: Of the split and the preprocessor's draws.

    Raises:
        CalibrationError: A name that there is not, or no row in a stage.
    """

    detectors: tuple[DetectorChoice, ...] = ("strip",)
    triggers: int = 0
    frr: float = 0.01
    overlays: int = 100
    blend: BlendChoice = "logit"
    alpha: float | None = None
    passes: PassesChoice = "exact"
    stage_rows: int | None = None
    precision: PrecisionChoice = "float32"
    preprocess: PreprocessChoice = "none"
    max_accuracy_drop: float = 3.0
    method: Method = "conformal"
    confidence: float | None = None
    allow_missing_classes: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse misspelt names, which would stand for something else, and stages of nothing."""
        for detector in self.detectors:
            check_choice("a detector", detector, DetectorChoice, CalibrationError)
        if self.stage_rows is not None and self.stage_rows < 1:
            raise CalibrationError(f"expected stage_rows of at least 1, or None to measure it, got {self.stage_rows}")
        for name, value, known in (
            ("blend", self.blend, BlendChoice),
            ("passes", self.passes, PassesChoice),
            ("precision", self.precision, PrecisionChoice),
            ("preprocess", self.preprocess, PreprocessChoice),
            ("method", self.method, Method),
        ):
            check_choice(name, value, known, CalibrationError)


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


def asked_strips(settings: Settings) -> tuple[tuple[Blend, float], ...]:
    """The same for settings; none where STRIP is not among the detectors."""
    return strips(settings.blend, settings.alpha) if "strip" in settings.detectors else ()


def votes_of(overlays: int) -> int:
    """That an input needs of so many overlays of one STRIP, where it is by votes."""
    return max(_FEWEST_VOTES, round(_VOTES * overlays))


def fewest_overlays(passes: PassesChoice, blends: int) -> int:
    """That so many STRIPs can be calibrated with."""
    return (_MIN_OVERLAYS if passes == "exact" else _MIN_VOTERS) * max(1, blends)


def set_aside(settings: Settings) -> int:
    """Clean images that set no threshold."""
    return settings.overlays if "strip" in settings.detectors or settings.triggers else 0


def for_boundaries(settings: Settings, images: int) -> int:
    """Clean images, of so many that are not set aside, that choose boundaries and set no threshold either."""
    return images_for_boundaries(images) if settings.passes == "sequential" and asked_strips(settings) else 0


def check_settings(settings: Settings, images: int) -> None:
    """Refuse, before any work, what can't be calibrated from so many images; see `calibrate`."""
    if len(set(settings.detectors)) < len(settings.detectors):
        raise CalibrationError(f"expected each detector once, got {', '.join(settings.detectors)}: name it once")
    blends, others = len(asked_strips(settings)), settings.triggers + ("feature-squeezing" in settings.detectors)
    if blends + others == 0:
        raise CalibrationError("expected at least one detector, got none: name one, like --detector strip")
    aside = set_aside(settings)
    fewest = _MIN_OVERLAYS * max(1, blends)
    if aside < fewest and (blends or settings.triggers):
        of = "" if blends < 2 else f" for {settings.blend}"
        raise CalibrationError(f"expected at least {fewest} overlays{of}, got {aside}: the paper uses 100")
    fewest = fewest_overlays(settings.passes, blends)
    if blends and aside < fewest:
        of = "" if blends < 2 else f" under {settings.blend}"
        raise CalibrationError(
            f"expected at least {fewest} overlays for --passes {settings.passes}{of}, got {aside}: use more --overlays, or "
            "--passes exact"
        )
    if images <= aside:
        raise CalibrationError(
            f"expected more clean images than the {aside} overlays, got {images}: add images or use fewer --overlays"
        )
    choosing = for_boundaries(settings, images - aside)
    try:
        check_rates(
            images - aside - choosing,
            settings.frr,
            settings.method,
            settings.confidence,
            blends + others,
            what="detectors" if others else "blends",
            overlays=aside > 0,
        )
    except TooFewImagesError as error:
        if not choosing:
            raise
        needed = images_needed(error.needed)
        raise TooFewImagesError(
            f"sequential passes need at least {needed} clean images besides the overlays, {needed - error.needed} of them for "
            f"boundaries, got {images - aside}: add images, or take --passes exact",
            needed=needed,
            available=images - aside,
        ) from error
