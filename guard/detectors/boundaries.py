"""Where STRIP may stop before all passes: the boundaries of a group-sequential test.

S_n is the sum of the entropies under the first n of N overlays, h the entropy threshold. At the end of each stage an input is
accepted if S_n > a_n N h, and rejected if S_n <= r_n N h; after all overlays it is rejected if S_N <= N h, as ever. So the
lowest threshold at which an input is rejected is

    V = min_k max(S_k / (N r_k), max_{j<k} S_j / (N a_j)),    a_N = r_N = 1,

over the stages k, and minus V is a score like any other: a threshold on it is calibrated like any other's, and the false
rejection rate is that of all stages together. The shares a and r, and the order of the overlays, are chosen on other images
than the threshold.

With a_n = 1 and r_n = 0, V is the mean entropy S_N / N: entropies are not negative, so that what is over N h stays over it.
That is exact early acceptance, which may stop anywhere.

References: Jennison and Turnbull, Group Sequential Methods, 1999. STRIP with boundaries: ours.
"""

from __future__ import annotations

import itertools
from typing import final

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from guard.errors import CalibrationError


@final
class Boundaries(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """See the top of this file.

    Attributes:
        ends: Overlays tried at the end of each stage, ascending; the last is N.
        accept: a_n of each, at most 1.
        reject: r_n of each, at most a_n.

    Raises:
        CalibrationError: They decide nothing, or both ways.
    """

    ends: tuple[int, ...]
    accept: tuple[float, ...]
    reject: tuple[float, ...]

    def __post_init__(self) -> None:
        """Validate once."""
        if not len(self.ends) == len(self.accept) == len(self.reject) > 0:
            got = f"{len(self.ends)}, {len(self.accept)} and {len(self.reject)}"
            raise CalibrationError(f"expected as many ends of stages as shares to accept and to reject, got {got}")
        if any(later <= end for end, later in itertools.pairwise((0, *self.ends))):
            raise CalibrationError(f"expected ends of stages that ascend from 1, got {', '.join(map(str, self.ends))}")
        pairs = list(zip(self.reject, self.accept, strict=True))
        if not all(0.0 <= reject <= accept <= 1.0 and accept > 0.0 for reject, accept in pairs) or pairs[-1] != (1.0, 1.0):
            raise CalibrationError(
                "expected shares 0 <= reject <= accept <= 1 of each stage, and 1 of the last: calibrate again"
            )


@final
class Evidence:
    """What the passes so far make certain of the V of each of B images.

    Args:
        images: B.
        total: N.
        boundaries: None for exact early acceptance.
        threshold: On the score: once an image's verdict is certain, what comes after tells nothing. None: everything tells.
    """

    def __init__(self, images: int, total: int, boundaries: Boundaries | None, threshold: float | None) -> None:
        self._total, self._done = total, 0
        self._stages = (
            None
            if boundaries is None
            else dict(zip(boundaries.ends, zip(boundaries.accept, boundaries.reject, strict=True), strict=True))
        )
        self._limit = None if threshold is None else np.float32(-threshold)  # of V: at it or under it, rejected
        self._sums = np.zeros(images)
        self._accepting = np.zeros(images)  # max S_j / (N a_j)
        self._most = np.full(images, np.inf)  # V is at most that
        self._undecided = np.ones(images, dtype=np.bool_)

    @property
    def exact(self) -> Tensor:
        """(B,), bool: the score is the full evaluation's."""
        return torch.from_numpy((self._most <= self._accepting) | np.isnan(self._accepting))

    @property
    def scores(self) -> Tensor:
        """(B,), float32: minus V where that is known; else a bound of it, on the same side of the threshold."""
        lowest, most = _rounded(np.minimum(self._accepting, self._most)), _rounded(self._most)
        rejected = False if self._limit is None else most <= self._limit
        return torch.from_numpy(-np.where(rejected, most, lowest))

    @property
    def undecided(self) -> Tensor:
        """(B,), bool: what is still to come may turn the verdict."""
        return torch.from_numpy(self._undecided.copy())

    def add(self, rows: Tensor, entropies: Tensor) -> None:
        """Learn of further passes.

        Args:
            rows: (A,), int64, the images that had them: all that are undecided, or some that nobody asks about again.
            entropies: (A, n), float64, bits.
        """
        before, own = self._done, rows.numpy()
        self._done = last = before + entropies.shape[1]
        sums = np.concatenate([self._sums[own, None], entropies.numpy()], axis=1)
        sums = np.add.accumulate(sums, axis=1)[:, 1:]  # one by one, in order
        self._sums[own] = sums[:, -1]
        for end in (last,) if self._stages is None else (end for end in self._stages if before < end <= last):
            open_ = self._undecided[own]
            self._close(own[open_], sums[open_, end - before - 1] / self._total, end)

    def _close(self, rows: NDArray[np.int64], means: NDArray[np.float64], end: int) -> None:
        """A stage; (A,), and (A,): S_n / N."""
        accept, reject = (1.0, float(end == self._total)) if self._stages is None else self._stages[end]
        accepting, most = self._accepting[rows], self._most[rows]
        if reject > 0.0:
            most = np.minimum(most, np.maximum(means / reject, accepting))
            self._most[rows] = most
        accepting = np.maximum(accepting, means / accept)
        self._accepting[rows] = accepting
        if self._limit is not None:  # NaN is over nothing: undecided, and in the end rejected
            lowest = _rounded(np.minimum(accepting, most))
            self._undecided[rows] = ~((lowest > self._limit) & np.isfinite(lowest)) & ~(_rounded(most) <= self._limit)


def final_scores(entropies: Tensor, boundaries: Boundaries | None) -> Tensor:
    """Minus V, from every overlay's entropy; (B, N), float64, to (B,), float32."""
    evidence = Evidence(len(entropies), entropies.shape[1], boundaries, None)
    evidence.add(torch.arange(len(entropies)), entropies)
    return evidence.scores


def _rounded(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """Rounding is monotone, so that a larger V never gets a larger score."""
    with np.errstate(over="ignore"):  # a share may be so small that V is infinite in float32
        return values.astype(np.float32)
