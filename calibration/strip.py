"""STRIP's part of a calibration: score clean images, put the overlays in their best order, set the threshold."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from calibration.data import ImageSet, Progress
from calibration.detectors import DetectorCalibration
from calibration.overlays import order_overlays
from calibration.settings import Settings
from calibration.thresholds import set_threshold
from guard.detectors import Strip
from guard.detectors.strip import stage_ends
from guard.errors import CalibrationError
from guard.records import ThresholdRecord


def calibrate_strip(
    strip: Strip, clean: ImageSet, settings: Settings, detectors: int, progress: Progress
) -> DetectorCalibration:
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
    what = "superimposing clean images" + (f" by {strip.blend}" if strip.name != "strip" else "")
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
        return DetectorCalibration(strip, threshold(scores), scores, float(len(strip.overlays)))
    table = torch.cat(entropies)
    if not bool(torch.isfinite(table).all()):
        raise CalibrationError("the model gives NaN or Inf on superimposed images: check --mean and --std")
    provisional = threshold(strip.score_passes(table).numpy())
    order = torch.from_numpy(order_overlays(table.numpy(), -provisional.value * table.shape[1]))
    ordered, table = replace(strip, overlays=strip.overlays[order]), table[:, order]
    scores = ordered.score_passes(table).numpy()
    return DetectorCalibration(ordered, threshold(scores), scores, _mean_passes(table.numpy(), provisional.value))


def _mean_passes(table: NDArray[np.float64], threshold: float) -> float:
    """Passes that a clean image takes on its own, given its entropy under each overlay."""
    total = table.shape[1]
    ends = np.array(stage_ends(total))
    over = np.cumsum(table, axis=1)[:, ends - 1] / total > -threshold
    return float(ends[np.where(over.any(axis=1), over.argmax(axis=1), len(ends) - 1)].mean())
