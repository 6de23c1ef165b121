"""A threshold on a detector's score, from clean images alone.

`conformal` (default): with n clean scores that are exchangeable with later clean inputs, k = floor(frr * (n + 1)), an
input is rejected only when its score is strictly over the k-th largest clean score. Its expected FRR is at most frr,
whatever the scores' distribution; ties don't break that, because the comparison is strict. With a confidence c, k is the
largest with P(FRR <= frr) >= c, where FRR ~ Beta(k, n + 1 - k).

Several detectors, any of which may reject, share the rate: with D of them each threshold is set for frr / D (and each with
confidence 1 - (1 - c) / D), so that by the union bound the guard as a whole keeps to frr.

`normal` (the STRIP paper's): a normal distribution is fitted to the clean scores and cut at its percentile.

Reference: Vovk et al., Algorithmic Learning in a Random World (2005); Gao et al., STRIP, arXiv:1902.06531, section V.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special

from calibration.statistics import Estimate, proportion
from guard.errors import CalibrationError, TooFewImagesError
from guard.records import ThresholdRecord

_SMALLEST_RATE = 1e-9

Method = Literal["conformal", "normal"]


def set_threshold(
    scores: NDArray[np.float32],
    frr: float,
    method: Method = "conformal",
    confidence: float | None = None,
    detectors: int = 1,
) -> ThresholdRecord:
    """Set the threshold for a false rejection rate.

    Args:
        scores: (n,), float32, of clean images; higher is more suspicious.
        frr: The share of clean inputs that may be rejected, in (0, 1).
        method: `conformal` or `normal`.
        confidence: For `conformal`, the probability with which FRR <= frr must hold, in (0, 1); None bounds its mean.
        detectors: That share rate and confidence; the record holds one's share.

    Raises:
        TooFewImagesError: It says how many images the rate needs.
        CalibrationError: Rates out of range, scores that are not finite, or that are equal where a curve is to be fitted.
    """
    check_rates(len(scores), frr, method, confidence, detectors)
    if not np.isfinite(scores).all():
        count = int((~np.isfinite(scores)).sum())
        raise CalibrationError(
            f"expected finite scores, got {count} of {len(scores)} that are not: the model returns NaN or Inf"
        )
    frr, confidence = share(frr, confidence, detectors)
    return _conformal(scores, frr, confidence) if method == "conformal" else _normal(scores, frr)


def share(frr: float, confidence: float | None, detectors: int) -> tuple[float, float | None]:
    """The rate and the confidence that one of several detectors must keep to."""
    return frr / detectors, None if confidence is None else 1.0 - (1.0 - confidence) / detectors


def joint_rate(thresholds: Sequence[ThresholdRecord]) -> Estimate:
    """The false rejection rate that was asked of a guard, and bounds on what it is.

    An input is rejected by the guard if any detector rejects it: at least as often as by the one that rejects most, and at
    most as often as by all of them in turn. So `low` is the largest low end, `high` the sum of the high ends; for one detector
    they are its 95% interval.
    """
    asked = sum(item.frr for item in thresholds)
    return Estimate(asked, max(item.frr_low for item in thresholds), min(1.0, sum(item.frr_high for item in thresholds)))


def check_rates(
    n: int,
    frr: float,
    method: Method,
    confidence: float | None,
    detectors: int = 1,
    *,
    what: Literal["blends", "detectors"] = "blends",
    overlays: bool = True,
) -> None:
    """Raise unless a threshold for this rate can be set from n clean images; see `set_threshold`.

    Args:
        n: Clean images.
        frr: See there.
        method: See there.
        confidence: See there.
        detectors: See there.
        what: That they are, for the message.
        overlays: Whether other clean images are set aside, likewise.
    """
    check_rate(frr)
    if confidence is not None and not 0.0 < confidence < 1.0:
        raise CalibrationError(f"expected a confidence between 0 and 1, got {confidence}")
    if confidence is not None and method != "conformal":
        raise CalibrationError("expected --confidence with the conformal method only: the normal fit gives no guarantee")
    own = share(frr, confidence, detectors)
    if method == "conformal" and rank(n, *own) < 1:
        needed = needed_images(*own)
        sure = "" if confidence is None else f" with confidence {confidence:g}"
        sure += "" if detectors == 1 else f" for {detectors} {what} together"
        besides, fewer = (" besides the overlays", "use fewer overlays, ") if overlays else ("", "")
        drop = "" if detectors == 1 else ", or name a single --blend" if what == "blends" else ", or use fewer detectors"
        raise TooFewImagesError(
            f"a false rejection rate of {frr:g}{sure} needs at least {needed} clean images{besides}, got {n}: "
            f"add images, {fewer}allow a higher rate{drop}",
            needed=needed,
            available=n,
        )
    if method == "normal" and n < 2:
        raise TooFewImagesError(f"a normal fit needs at least 2 clean images, got {n}", 2, n)


def check_rate(frr: float) -> None:
    """Raise unless it is a share."""
    if not _SMALLEST_RATE <= frr < 1.0:
        raise CalibrationError(f"expected a false rejection rate between 0 and 1, got {frr}: 0.01 is one in a hundred")


def needed_images(frr: float, confidence: float | None = None) -> int:
    """The fewest clean images from which a conformal threshold for this rate can be set."""
    fewest = max(1, math.ceil(1.0 / frr - 1e-9) - 1)
    return fewest if confidence is None else max(fewest, math.ceil(math.log1p(-confidence) / math.log1p(-frr)))


def rank(n: int, frr: float, confidence: float | None = None) -> int:
    """k: the threshold lies just over the k-th largest of n clean scores; 0 when n is too small."""
    k = math.floor(frr * (n + 1) + 1e-9)  # 0.01 * 100 must count as 1
    if confidence is None:
        return min(k, n)
    while k > 0 and special.betainc(k, n + 1 - k, frr) < confidence:
        k -= 1
    return k


def _conformal(scores: NDArray[np.float32], frr: float, confidence: float | None) -> ThresholdRecord:
    n = len(scores)
    k = rank(n, frr, confidence)
    kth = np.sort(scores)[::-1][k - 1]
    low, high = special.betaincinv(k, n + 1 - k, [0.025, 0.975])
    return ThresholdRecord(
        value=_just_over(kth),
        method="conformal",
        frr=frr,
        images=n,
        rank=k,
        frr_low=float(low),
        frr_high=float(high),
        confidence=confidence,
    )


def _normal(scores: NDArray[np.float32], frr: float) -> ThresholdRecord:
    mean, deviation = scores.mean(dtype=np.float64), scores.std(dtype=np.float64)
    value = float(np.float32(mean + deviation * special.ndtri(1.0 - frr)))
    if value == np.float32(mean):
        raise CalibrationError(
            f"a normal fit needs scores that differ, got {len(scores)} that hardly do, most of which its threshold would "
            "reject: use --method conformal, or another --blend"
        )
    seen = proportion(int((scores >= np.float32(value)).sum()), len(scores))
    return ThresholdRecord(
        value=value, method="normal", frr=frr, images=len(scores), rank=None, frr_low=seen.low, frr_high=seen.high
    )


def _just_over(score: np.float32) -> float:
    """The next float32: `score >= threshold` then means strictly over the score itself."""
    return float(np.nextafter(np.float32(score), np.float32(np.inf)))
