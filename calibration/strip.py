"""STRIP's part of a calibration: score clean images, put the overlays in their best order, set the threshold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray

from calibration.data import ImageSet, Progress
from calibration.overlays import order_overlays
from calibration.settings import Settings
from calibration.thresholds import set_threshold
from guard.detectors import Strip
from guard.detectors.strip import stage_ends
from guard.errors import CalibrationError
from guard.profile import ThresholdRecord


@final
@dataclass(frozen=True)
class CalibratedStrip:
    """A detector and what clean images say of it.

    Attributes:
        strip: With its overlays in their best order.
        threshold: On its score.
        scores: (n,), float32, of the clean images, all passes.
        mean_passes: Of a clean image on its own.
    """

    strip: Strip
    threshold: ThresholdRecord
    scores: NDArray[np.float32]
    mean_passes: float


def calibrate_strip(strip: Strip, clean: ImageSet, settings: Settings, detectors: int, progress: Progress) -> CalibratedStrip:
    """Set one detector's threshold.

    Args:
        strip: The detector, overlays in any order.
        clean: The threshold-setting images.
        settings: What is asked of the guard as a whole.
        detectors: That share the false rejection rate.
        progress: Told how far it is.

    Raises:
        CalibrationError: The model's answers can't be used.
    """
    what = "superimposing clean images" + (f" by {strip.blend}" if detectors > 1 else "")
    entropies, scored = [], []
    for part in torch.arange(len(clean)).split(64):
        images = clean.images(part)
        if strip.predictor.labels_only:
            scored.append(strip.score(images))
        else:
            entropies.append(strip.pass_entropies(images))
        progress(what, int(part[-1]) + 1, len(clean))

    def threshold(scores: NDArray[np.float32]) -> ThresholdRecord:
        return set_threshold(scores, settings.frr, settings.method, settings.confidence, detectors)

    if strip.predictor.labels_only:
        scores = torch.cat(scored).numpy()
        return CalibratedStrip(strip, threshold(scores), scores, float(len(strip.overlays)))
    table = torch.cat(entropies)
    if not bool(torch.isfinite(table).all()):
        raise CalibrationError("the model gives NaN or Inf on superimposed images: check --mean and --std")
    provisional = threshold(strip.score_passes(table).numpy())
    order = torch.from_numpy(order_overlays(table.numpy(), -provisional.value * table.shape[1]))
    ordered, table = replace(strip, overlays=strip.overlays[order]), table[:, order]
    scores = ordered.score_passes(table).numpy()
    return CalibratedStrip(ordered, threshold(scores), scores, _mean_passes(table.numpy(), provisional.value))


def refuse_blind(found: Sequence[CalibratedStrip]) -> None:
    """Refuse detectors that can never reject.

    Raises:
        CalibrationError: It says which.
    """
    blind = [item.strip.blend for item in found if item.threshold.value > 0.0]
    if not blind:
        return
    if len(blind) == len(found):
        raise CalibrationError(
            "no input could ever be rejected: too many clean images have entropy 0 under these overlays; "
            "try another --blend or a larger --alpha, or allow a higher --frr"
        )
    seeing = next(item.strip.blend for item in found if item.strip.blend not in blind)
    raise CalibrationError(
        f"no input could ever be rejected by the blend {blind[0]}: too many clean images have entropy 0 under its overlays; "
        f"name a single one, --blend {seeing}, or allow a higher --frr"
    )


def _mean_passes(table: NDArray[np.float64], threshold: float) -> float:
    """Passes that a clean image takes on its own, given its entropy under each overlay."""
    total = table.shape[1]
    ends = np.array(stage_ends(total))
    over = np.cumsum(table, axis=1)[:, ends - 1] / total > -threshold
    return float(ends[np.where(over.any(axis=1), over.argmax(axis=1), len(ends) - 1)].mean())
