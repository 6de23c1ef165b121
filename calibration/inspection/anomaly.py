"""Which of a few numbers is too small to be one of them: Neural Cleanse's anomaly index.

    index = |s - median(s)| / (1.4826 MAD(s)),    MAD(s) = median(|s - median(s)|)

An index above 2 on the low side is an outlier with 95% confidence, if the numbers are normally distributed. With ten labels
they hardly tell: that is why a verdict rests on more than the index.

Reference: Wang et al., Neural Cleanse, IEEE S&P 2019, section IV.
"""

from __future__ import annotations

import torch
from torch import Tensor

from guard.errors import CalibrationError

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
    if sizes.ndim != 1 or len(sizes) < _FEWEST or not bool(torch.isfinite(sizes).all()):
        raise CalibrationError(f"expected at least {_FEWEST} finite sizes (K,), got {tuple(sizes.shape)}: scan more labels")
    values = sizes.double()
    median = values.quantile(0.5)
    spread = (values - median).abs().quantile(0.5)
    below = median - values
    return torch.zeros_like(below) if float(spread) == 0.0 else below / (_CONSISTENT * spread)
