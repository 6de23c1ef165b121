"""How PyTorch runs a model fastest on this machine's CPU: measured, and kept where it changes nothing that matters.

Channels last is taken where the model runs on it, answers the same but for rounding, and is clearly faster. bfloat16 is taken
for detectors' passes where it is asked for and turns hardly any verdict: the threshold is set on scores in bfloat16, so that
the false rejection rate is kept, and each verdict is compared with float32's, at a threshold that the same images set.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

import msgspec
import numpy as np
import torch
from torch import Tensor

from calibration.data import ImageSet, Progress
from calibration.detectors import DetectorCalibration
from calibration.settings import PrecisionChoice, Settings
from calibration.thresholds import set_threshold
from guard import Predictor
from guard.detectors import Detector, FeatureSqueezing, Strip
from guard.errors import CalibrationError, ModelError
from guard.predictors import Execution

TOLERANCE = 0.005
"""Of the verdicts on clean images, that bfloat16 may turn."""

_KINDS = ("module", "torchscript", "torch-export")
_CLEARLY = {"channels-last": 1.1, "bfloat16": 1.25}  # times as fast
_SAME = 1e-3  # in probability
TIMED = 32
"""Images at once."""

_FEW, _SLOW = 4, 0.25  # images of a model that takes longer than so many seconds
_ROUNDS = 7
_AT_ONCE = 64


def fastest(predictor: Predictor, images: Tensor, precision: PrecisionChoice = "float32") -> Predictor:
    """The same predictor, as it runs fastest.

    Args:
        predictor: As it was discovered.
        images: (B, C, H, W), in [0, 1]; the first ones are timed.
        precision: Of detectors' passes; `auto` takes bfloat16 where that is clearly faster.

    Raises:
        ModelError: bfloat16 is asked for, and the model can't be run in it.
    """
    if not _by_pytorch(predictor):
        if precision == "bfloat16":
            raise ModelError(
                f"expected a model that PyTorch runs for bfloat16, got one of kind {predictor.backend.kind}: "
                "pass the nn.Module itself, or leave precision at float32"
            )
        return predictor
    images = images.repeat(-(-TIMED // len(images)), 1, 1, 1)[:TIMED]
    chosen = _faster(predictor, Execution(memory_format="channels-last"), images, _CLEARLY["channels-last"])
    if precision != "float32":
        reduced = msgspec.structs.replace(chosen.execution, precision="bfloat16")
        if precision == "auto":
            return _faster(chosen, reduced, images, _CLEARLY["bfloat16"], same=False)
        chosen = replace(chosen, execution=reduced)
        chosen(images)  # raises where it does not run
    return chosen


def why_not_reduced(predictor: Predictor) -> str:
    """Why `auto` left a predictor in float32, for people; empty where it did not.

    Args:
        predictor: As `fastest` returned it.
    """
    if predictor.execution.precision != "float32":
        return ""
    return "bfloat16 is not clearly faster here" if _by_pytorch(predictor) else "bfloat16 is for models that PyTorch runs"


def _by_pytorch(predictor: Predictor) -> bool:
    spec = predictor.spec
    return predictor.backend.kind in _KINDS and spec.layout == "NCHW" and spec.container == "torch"


def _faster(predictor: Predictor, execution: Execution, images: Tensor, times: float, *, same: bool = True) -> Predictor:
    """With another execution, where that runs, answers the same (if it must), and is so many times as fast."""
    other = replace(predictor, execution=execution)
    started = time.perf_counter()
    expected = predictor(images)
    if time.perf_counter() - started > _SLOW:
        images, expected = images[:_FEW], expected[:_FEW]
    try:
        answers = other(images)
    except ModelError:  # such as a view of what is no longer contiguous
        return predictor
    if not bool(torch.isfinite(answers).all()) or (same and float((answers - expected).abs().max()) > _SAME):
        return predictor
    seconds: list[tuple[float, float]] = [(_timed(predictor, images), _timed(other, images)) for _ in range(_ROUNDS)]
    before, after = (statistics.median(column) for column in zip(*seconds, strict=True))
    return other if before >= times * after else predictor


def _timed(predictor: Predictor, images: Tensor) -> float:
    started = time.perf_counter()
    predictor(images)
    return time.perf_counter() - started


def turned_verdicts(parts: Sequence[DetectorCalibration], clean: ImageSet, settings: Settings, progress: Progress) -> float:
    """Share of the clean images on which a detector's verdict is not what it would be in float32, of the worst detector.

    Args:
        parts: Calibrated in another precision.
        clean: What set their thresholds.
        settings: With which.
        progress: Told how far it is.
    """
    return max(_turned(part, clean, settings, len(parts), progress) for part in parts)


def refuse_turned(share: float, precision: PrecisionChoice) -> None:
    """Where bfloat16 was asked for by name.

    Raises:
        CalibrationError: It says how many verdicts were turned.
    """
    if precision == "bfloat16":
        raise CalibrationError(
            f"expected bfloat16 to turn at most {TOLERANCE:.1%} of the verdicts on clean images, got {share:.1%}: "
            "leave --precision at float32"
        )


def _turned(part: DetectorCalibration, clean: ImageSet, settings: Settings, detectors: int, progress: Progress) -> float:
    detector: Detector
    match part.detector:
        case Strip() | FeatureSqueezing():
            detector = replace(part.detector, predictor=part.detector.predictor.in_full_precision())
        case _:  # looks at activations, which are float32's
            return 0.0
    found = []
    for rows in torch.arange(len(clean)).split(_AT_ONCE):
        found.append(detector.score(clean.images(rows)))
        progress("comparing with float32", int(rows[-1]) + 1, len(clean))
    scores = torch.cat(found).numpy()
    limit = set_threshold(scores, settings.frr, settings.method, settings.confidence, detectors)
    turned = (scores >= np.float32(limit.value)) != (part.scores >= np.float32(part.threshold.value))
    return float(turned.mean())
