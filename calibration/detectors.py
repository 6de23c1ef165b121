"""Which detectors the settings ask for, and one detector's part of a calibration: scores of clean images, threshold, record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calibration.data import ImageSet, Progress
from calibration.filters import FoundTrigger, activation_filter
from calibration.settings import Settings, asked_strips, votes_of
from calibration.thresholds import set_threshold
from guard import Predictor
from guard.detectors import ActivationFilter, Detector, FeatureSqueezing, Strip
from guard.detectors.strip import STAGE_ROWS
from guard.errors import CalibrationError
from guard.profile import overlays_to_array
from guard.records import (
    OVERLAYS,
    ActivationFilterRecord,
    DetectorRecord,
    FeatureSqueezingRecord,
    StripRecord,
    ThresholdRecord,
)

_MOST_CHANGE = 2.0  # L1 distance of two distributions
_ROUNDING = 1e-5  # of an entropy


@final
@dataclass(frozen=True)
class DetectorCalibration:
    """A detector and what clean images say of it.

    Attributes:
        detector: The detector; STRIP with its overlays in their best order.
        threshold: On its score.
        scores: (n,), float32, of the threshold-setting images, all passes.
        mean_passes: Of a clean image on its own.
    """

    detector: Detector
    threshold: ThresholdRecord
    scores: NDArray[np.float32]
    mean_passes: float

    @property
    def most_passes(self) -> int:
        """That an input takes at most."""
        return len(self.detector.overlays) if isinstance(self.detector, Strip) else round(self.mean_passes)

    def record(self, array: str) -> DetectorRecord:
        """For the profile; STRIP's overlays under that name."""
        match self.detector:
            case Strip(blend=blend, alpha=alpha, name=name, boundaries=boundaries, votes=votes, stage_rows=rows):
                return StripRecord(
                    threshold=self.threshold,
                    blend=blend,
                    alpha=alpha,
                    mean_passes=self.mean_passes,
                    array=array,
                    boundaries=boundaries,
                    votes=msgspec.UNSET if votes is None else votes,
                    stage_rows=msgspec.UNSET if rows == STAGE_ROWS else rows,
                    title=name,
                )
            case FeatureSqueezing(squeezers=squeezers, bits=bits):
                return FeatureSqueezingRecord(threshold=self.threshold, squeezers=squeezers, bits=bits)
            case ActivationFilter(neurons=neurons, name=name):
                return ActivationFilterRecord(threshold=self.threshold, neurons=tuple(neurons.tolist()), title=name)
        raise TypeError(f"expected a detector that profiles know, got {type(self.detector).__name__}")


def compose(
    predictor: Predictor, set_aside: Tensor, settings: Settings, triggers: Sequence[FoundTrigger] = ()
) -> list[Detector]:
    """The detectors that the settings ask for, and a filter for each trigger, in the order in which they run.

    Args:
        predictor: That they look at.
        set_aside: (N, C, H, W), clean images that set no threshold: overlays, dealt to several STRIPs in turn. They also
            choose the filters' neurons.
        settings: Which.
        triggers: That a scan found.

    Raises:
        CalibrationError: A trigger does not work.
        ModelError: The model can't be looked into.
    """
    asked = asked_strips(settings)
    found: list[Detector] = []
    for number, (blend, alpha) in enumerate(asked):
        own, name = set_aside[number :: len(asked)], "strip" if len(asked) == 1 else f"strip-{blend}"
        votes = votes_of(len(own)) if settings.passes == "votes" else None
        found.append(Strip(predictor, own, blend, alpha, name=name, votes=votes))
    if "feature-squeezing" in settings.detectors:
        found.append(FeatureSqueezing(predictor))
    return found + [activation_filter(predictor, set_aside, trigger) for trigger in triggers]


def calibrate_detector(
    detector: Detector, clean: ImageSet, settings: Settings, detectors: int, progress: Progress
) -> DetectorCalibration:
    """Set the threshold of a detector that always takes as many passes; for STRIP see `calibrate_strip`.

    Args:
        detector: The detector.
        clean: The threshold-setting images.
        settings: What is asked of the guard as a whole.
        detectors: That share the false rejection rate.
        progress: Told how far it is.

    Raises:
        CalibrationError: The model's answers can't be used.
    """
    scored = []
    for part in torch.arange(len(clean)).split(64):
        scored.append(detector.score(clean.images(part)))
        progress(f"scoring clean images, {detector.name}", int(part[-1]) + 1, len(clean))
    scores = torch.cat(scored).numpy()
    threshold = set_threshold(scores, settings.frr, settings.method, settings.confidence, detectors)
    passes = detector.inspect(clean.images(slice(0, 1)), threshold.value).passes
    return DetectorCalibration(detector, threshold, scores, float(passes[0]))


def recorded(parts: Sequence[DetectorCalibration]) -> tuple[tuple[DetectorRecord, ...], dict[str, Tensor]]:
    """What the profile holds of each detector, and the overlays of each STRIP by the names of their arrays."""
    records: list[DetectorRecord] = []
    arrays: dict[str, Tensor] = {}
    for part in parts:
        name = f"{OVERLAYS}.{len(arrays) + 1}" if arrays else OVERLAYS
        records.append(part.record(name))
        if isinstance(part.detector, Strip):
            arrays[name] = overlays_to_array(part.detector.overlays)
    return tuple(records), arrays


def refuse_blind(found: Sequence[DetectorCalibration]) -> None:
    """Refuse detectors that can never reject, and STRIP of a model whose answers are always the same.

    Raises:
        CalibrationError: It says which.
    """
    _refuse_blind_strips(found)
    if any(isinstance(item.detector, FeatureSqueezing) and item.threshold.value > _MOST_CHANGE for item in found):
        raise CalibrationError(
            "no input could ever be rejected by feature squeezing: it turns the answers to too many clean images round; "
            "drop --detector feature-squeezing"
        )


def _refuse_blind_strips(found: Sequence[DetectorCalibration]) -> None:
    asked = [(item.detector, item) for item in found if isinstance(item.detector, Strip)]
    for strip, item in asked:
        constant = np.ptp(item.scores) < _ROUNDING * np.abs(item.scores).max()
        if constant and not strip.predictor.labels_only:
            raise CalibrationError(
                f"expected a model whose answers hang on the image, got one that is as unsure of all {len(item.scores)} clean "
                f"images under the blend {strip.blend}: does it answer anything but a constant?"
            )
    blind = [strip for strip, item in asked if item.threshold.value > 0.0]
    if not blind:
        return
    exact = "" if blind[0].votes is None and blind[0].boundaries is None else "take --passes exact, "
    if len(blind) == len(asked):
        by = "" if len(asked) == len(found) else " by STRIP"
        raise CalibrationError(
            f"no input could ever be rejected{by}: too many clean images have entropy 0 under these overlays; "
            f"{exact}try another --blend or a larger --alpha, or allow a higher --frr"
        )
    seeing = next(strip.blend for strip, item in asked if item.threshold.value <= 0.0)
    raise CalibrationError(
        f"no input could ever be rejected by the blend {blind[0].blend}: too many clean images have entropy 0 under its "
        f"overlays; {exact}name a single one, --blend {seeing}, or allow a higher --frr"
    )
