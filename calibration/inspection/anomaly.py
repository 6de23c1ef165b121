"""Which of a few numbers is too small to be one of them: Neural Cleanse's anomaly index, DeepInspect's deviation factor.

    index = |s - median(s)| / (1.4826 MAD(s)),    MAD(s) = median(|s - median(s)|)

The deviation factor has a MAD for each side of the median, of the numbers on that side (double MAD), for what is skewed.

Above 2 on the low side a number is an outlier with 95% confidence, if the numbers are normally distributed. With ten labels
they hardly tell, least of all by the low five alone: that is why a verdict rests on more than the index.

References: Wang et al., Neural Cleanse, IEEE S&P 2019, section IV; Chen et al., DeepInspect, IJCAI 2019.
"""

from __future__ import annotations

import torch
from torch import Tensor

from guard.errors import CalibrationError, InspectionError

_CONSISTENT = 1.4826  # makes the MAD of normally distributed numbers their standard deviation
_FEWEST = 3


def anomaly_indices(sizes: Tensor) -> Tensor:
    """How far each number lies below the median, in robust standard deviations; negative above it.

    Args:
        sizes: (K,), K >= 3, finite: L1 norms of the masks.

    Returns:
        (K,), float64. All 0 where at least half of the numbers are equal.

    Raises:
        CalibrationError: Too few numbers, or some that are none.
    """
    below = _below_median(sizes)
    spread = below.abs().quantile(0.5)
    return torch.zeros_like(below) if float(spread) == 0.0 else below / (_CONSISTENT * spread)


def deviation_factors(sizes: Tensor) -> Tensor:
    """How far each number lies below the median, in robust standard deviations of its side; negative above it.

    Args:
        sizes: (K,), K >= 3, finite: L1 sizes of the triggers.

    Returns:
        (K,), float64. 0 for a side at least half of which is the median.

    Raises:
        CalibrationError: Too few numbers, or some that are none.
    """
    below = _below_median(sizes)
    factors = torch.zeros_like(below)
    for side in (below >= 0.0, below <= 0.0):
        spread = below[side].abs().quantile(0.5)
        if float(spread) > 0.0:
            factors[side] = below[side] / (_CONSISTENT * spread)
    return factors


def check_reached(reached: Tensor, hint: str, what: str = "labels") -> str:
    """Refuse to compare sizes that most labels, or pairs, don't have: what is not decided must not pass for clean.

    Args:
        reached: (K,), bool: for which labels a trigger was found that works.
        hint: What to do where that are too few.
        what: They are.

    Returns:
        What must be said of the others; empty where there are none.

    Raises:
        InspectionError: Half of the labels or more have none.
    """
    labels, missing = len(reached), int((~reached).sum())
    if 2 * missing >= labels:
        whom = "the model" if what == "labels" else "these"
        raise InspectionError(
            f"expected triggers for more than half of the {labels} {what}, whose sizes are compared, got {labels - missing}: "
            f"nothing can be said of {whom}; {hint}; a model that gives its input no gradients can't be scanned"
        )
    if not missing:
        return ""
    return f"For {missing} of {labels} {what} no trigger was found that works: each counts as the whole image."


def _below_median(sizes: Tensor) -> Tensor:
    if sizes.ndim != 1 or len(sizes) < _FEWEST or not bool(torch.isfinite(sizes).all()):
        raise CalibrationError(f"expected at least {_FEWEST} finite sizes (K,), got {tuple(sizes.shape)}: scan more labels")
    values = sizes.double()
    return values.quantile(0.5) - values
