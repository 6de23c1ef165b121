"""STRIP's part of a calibration: score clean images, put the overlays in their best order, set the threshold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calibration.boundaries import choose_boundaries, order_for_boundaries
from calibration.data import ImageSet, Progress
from calibration.detectors import DetectorCalibration
from calibration.overlays import order_overlays
from calibration.settings import Settings, votes_of
from calibration.stages import stage_rows
from calibration.thresholds import set_threshold, share
from guard.detectors import Strip
from guard.detectors.boundaries import by_all, soft_vote_scores
from guard.detectors.evidence import Evidence
from guard.errors import CalibrationError
from guard.records import ThresholdRecord

_AT_ONCE = 64


def calibrate_strip(
    strip: Strip, clean: ImageSet, choosing: ImageSet, settings: Settings, detectors: int, progress: Progress
) -> DetectorCalibration:
    """Set one detector's threshold.

    Args:
        strip: The detector, overlays in any order.
        clean: The threshold-setting images.
        choosing: Others, that choose the order of the overlays and where it may stop; none for exact passes.
        settings: What is asked of the guard as a whole.
        detectors: That share the false rejection rate.
        progress: Told how far it is.

    Raises:
        CalibrationError: The model's answers can't be used.
    """

    def threshold(scores: NDArray[np.float32]) -> ThresholdRecord:
        return set_threshold(scores, settings.frr, settings.method, settings.confidence, detectors)

    if strip.predictor.labels_only:
        if len(choosing):
            raise CalibrationError(
                "expected a model with probabilities for --passes sequential, got one with labels: take --passes exact"
            )
        scores = torch.cat([strip.score(images) for images in _batches(strip, clean, progress)]).numpy()
        return DetectorCalibration(strip, threshold(scores), scores, float(len(strip.overlays)))
    if len(choosing):
        strip = _sequential(strip, _entropies(strip, choosing, progress), share(settings.frr, None, detectors)[0])
    table = _entropies(strip, clean, progress)
    if strip.boundaries is None:
        order = torch.from_numpy(_certain_soon(strip, table, -threshold(strip.score_passes(table).numpy()).value))
        strip, table = replace(strip, overlays=strip.overlays[order]), table[:, order]
    scores = strip.score_passes(table).numpy()
    record = threshold(scores)
    rows = settings.stage_rows or stage_rows(strip, clean.images(slice(0, 1)))
    strip = replace(strip, stage_rows=rows)
    passes = mean_passes(table, strip.evidence(len(table), record.value), strip.stage_ends())
    return DetectorCalibration(strip, record, scores, passes)


def _sequential(strip: Strip, table: Tensor, frr: float) -> Strip:
    """With overlays in order, and boundaries."""
    votes = votes_of(len(strip.overlays))
    threshold = float(np.quantile(-soft_vote_scores(table, by_all(votes, len(strip.overlays))).numpy(), frr))
    if threshold <= 0.0:
        raise CalibrationError(
            f"sequential passes can't decide by the blend {strip.blend}: too many clean images have an entropy over 0 under "
            f"fewer than {votes} of {len(strip.overlays)} overlays; take --passes exact"
        )
    order = order_for_boundaries(table.numpy(), threshold, votes)
    boundaries = choose_boundaries(table.numpy()[:, order], threshold, votes, frr)
    if boundaries is None:
        raise CalibrationError(
            f"sequential passes can't decide by the blend {strip.blend}: the entropies of clean images are too much alike; "
            "take --passes exact"
        )
    return replace(strip, overlays=strip.overlays[torch.from_numpy(order)], boundaries=boundaries)


def _entropies(strip: Strip, clean: ImageSet, progress: Progress) -> Tensor:
    """(n, N), float64, bits."""
    table = torch.cat([strip.pass_entropies(images) for images in _batches(strip, clean, progress)])
    if not bool(torch.isfinite(table).all()):
        raise CalibrationError("the model gives NaN or Inf on superimposed images: check --mean and --std")
    return table


def _batches(strip: Strip, clean: ImageSet, progress: Progress) -> Iterator[Tensor]:
    what = "superimposing clean images" + (f" by {strip.blend}" if strip.name != "strip" else "")
    for part in torch.arange(len(clean)).split(_AT_ONCE):
        yield clean.images(part)
        progress(what, int(part[-1]) + 1, len(clean))


def _certain_soon(strip: Strip, table: Tensor, limit: float) -> NDArray[np.int64]:
    """(N,): the order of the overlays in which few make the verdict certain, for a threshold in bits."""
    if strip.votes is None:
        return order_overlays(table.numpy(), limit * table.shape[1])
    return order_overlays((table > limit).to(torch.float64).numpy(), float(strip.votes))


def mean_passes(table: Tensor, evidence: Evidence, ends: Sequence[int]) -> float:
    """That an image takes.

    Args:
        table: (n, N), float64, bits, of each image under each overlay.
        evidence: Nothing yet, of so many images.
        ends: Overlays tried at the end of each stage; the last is N.
    """
    passes, done = torch.zeros(len(table)), 0
    for end in ends:
        active = torch.from_numpy(evidence.rows)
        if not len(active):
            break
        evidence.add(table[active, done:end])
        passes[active], done = end, end
    return float(passes.mean())
