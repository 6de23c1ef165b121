"""What STRIP's passes so far make certain, by the mean entropy.

The score is minus the mean entropy S_N / N. Entropies are not negative and floating-point addition of such numbers never
decreases a sum, so once S_n / N is over the threshold, S_N / N is too: that is exact early acceptance, which may stop anywhere.
By votes (`guard.detectors.votes`) and with boundaries (`guard.detectors.boundaries`) the score is another one.
"""

from __future__ import annotations

from typing import Protocol, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Evidence(Protocol):
    """What the passes so far make certain of the score of each of B images.

    Attributes:
        rows: (A,), int64: the images that are undecided, of which alone is learned.
    """

    rows: NDArray[np.int64]

    @property
    def exact(self) -> Tensor:
        """(B,), bool: the score is the full evaluation's."""

    @property
    def scores(self) -> Tensor:
        """(B,), float32: the score where that is known; else a bound of it, on the same side of the threshold."""

    def add(self, entropies: Tensor) -> None:
        """Learn of further passes.

        Args:
            entropies: (A, n), float64, bits, of `rows`.
        """


@final
class Mean:
    """`Evidence` of the mean entropy.

    Args:
        images: B.
        total: N.
        threshold: On the score: once an image's verdict is certain, what comes after tells nothing. None: everything tells.
    """

    def __init__(self, images: int, total: int, threshold: float | None) -> None:
        self.rows: NDArray[np.int64] = np.arange(images)
        self._total = total
        self._limit = None if threshold is None else last_rounded_to(np.float32(-threshold))
        self._heard = np.zeros(images, dtype=np.int64)
        self._sums = np.zeros(images)

    @property
    def exact(self) -> Tensor:
        """See `Evidence`."""
        return torch.from_numpy((self._heard == self._total) | np.isnan(self._sums))

    @property
    def scores(self) -> Tensor:
        """See `Evidence`; of some passes, as if the others added nothing."""
        return torch.from_numpy(-(self._sums / self._total).astype(np.float32))

    def add(self, entropies: Tensor) -> None:
        """See `Evidence`."""
        rows = self.rows
        sums = running_sums(self._sums[rows], entropies.numpy())[:, -1]
        self._sums[rows] = sums
        self._heard[rows] += entropies.shape[1]
        if self._limit is not None:
            self.rows = rows[~(sums / self._total > self._limit)]  # NaN is over nothing: undecided, and in the end rejected


def mean_scores(entropies: Tensor) -> Tensor:
    """Minus the mean of every overlay's entropy; (B, N), float64, to (B,), float32."""
    mean = Mean(len(entropies), entropies.shape[1], None)
    mean.add(entropies)
    return mean.scores


def running_sums(before: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """(A, n): what was summed before, (A,), and the values, (A, n), in order: the same bits however they are cut."""
    sums = values.astype(np.float64)
    sums[:, 0] += before
    return np.add.accumulate(sums, axis=1, out=sums)


def last_rounded_to(limit: np.float32) -> np.float64:
    """The largest float64 that is no more than a limit when it is rounded to float32, as scores are."""
    with np.errstate(over="ignore"):
        above = np.float64(np.nextafter(limit, np.float32(np.inf)))
        middle = (np.float64(limit) + (above if limit == np.inf else min(above, _BEYOND))) / 2.0
        return middle if np.float32(middle) <= limit else np.nextafter(middle, -np.inf)


_BEYOND = np.float64(2.0**128)  # what would come after the largest float32
