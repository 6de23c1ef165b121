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

import bisect
import functools
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

    Attributes:
        rows: (A,), int64: the images that are undecided, of which alone is learned.
    """

    def __init__(self, images: int, total: int, boundaries: Boundaries | None, threshold: float | None) -> None:
        self.rows: NDArray[np.int64] = np.arange(images)
        self._total, self._done, self._boundaries = total, 0, boundaries
        self._limit = None if threshold is None else last_rounded_to(np.float32(-threshold))  # V: at it or under it, rejected
        self._sums = np.zeros(images)
        self._accepting = np.zeros(images)  # max S_j / (N a_j)
        self._most = np.full(images, np.inf)  # V is at most that

    @property
    def exact(self) -> Tensor:
        """(B,), bool: the score is the full evaluation's."""
        return torch.from_numpy((self._most <= self._accepting) | np.isnan(self._accepting))

    @property
    def scores(self) -> Tensor:
        """(B,), float32: minus V where that is known; else a bound of it, on the same side of the threshold."""
        lowest = np.minimum(self._accepting, self._most)
        bounds = lowest if self._limit is None else np.where(self._most <= self._limit, self._most, lowest)
        with np.errstate(over="ignore"):  # a share may be so small that V is infinite in float32
            return torch.from_numpy(-bounds.astype(np.float32))

    def add(self, entropies: Tensor) -> None:
        """Learn of further passes.

        Args:
            entropies: (A, n), float64, bits, of `rows`.
        """
        rows, before = self.rows, self._done
        sums = entropies.numpy().astype(np.float64)
        sums[:, 0] += self._sums[rows]
        np.add.accumulate(sums, axis=1, out=sums)  # one by one, in order
        self._sums[rows], self._done = sums[:, -1], before + sums.shape[1]
        if self._boundaries is None:
            ends, accept, reject = np.array([self._done]), np.ones(1), np.array([float(self._done == self._total)])
        else:
            ends, accept, reject = _stages(self._boundaries, before, self._done)
        if not len(ends):
            return
        accepting, most = self._bounds(sums[:, ends - before - 1] / self._total, accept, reject)
        if self._limit is None:
            self._accepting[rows], self._most[rows] = accepting[:, -1], most[:, -1]
            return
        lowest = np.minimum(accepting, most)  # NaN is over nothing: undecided, and in the end rejected
        decided = ((lowest > self._limit) & (lowest <= _MOST)) | (most <= self._limit)
        stage = decided.argmax(axis=1)  # the first, and the first at all where none decides
        every = np.arange(len(rows))
        closed = decided[every, stage]
        stage[~closed] = len(ends) - 1
        self._accepting[rows], self._most[rows] = accepting[every, stage], most[every, stage]
        self.rows = rows[~closed]

    def _bounds(
        self, means: NDArray[np.float64], accept: NDArray[np.float64], reject: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """After each of K stages, max S_j / (N a_j), and what V is at most; from S_k / N, all of them (A, K)."""
        accepting, most = (np.empty((len(means), len(accept) + 1)) for _ in range(2))
        accepting[:, 0], most[:, 0] = self._accepting[self.rows], self._most[self.rows]
        with np.errstate(all="ignore"):
            np.divide(means, accept, out=accepting[:, 1:])
            np.divide(means, reject, out=most[:, 1:])
        np.maximum.accumulate(accepting, axis=1, out=accepting)
        np.maximum(most[:, 1:], accepting[:, :-1], out=most[:, 1:])
        most[:, 1:][:, reject == 0.0] = np.inf
        np.minimum.accumulate(most, axis=1, out=most)
        return accepting[:, 1:], most[:, 1:]


def _stages(
    boundaries: Boundaries, before: int, last: int
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Ends, and the shares there, of the stages that end after so many overlays, up to so many."""
    ends, accept, reject = _arrays(boundaries)
    some = slice(bisect.bisect_right(boundaries.ends, before), bisect.bisect_right(boundaries.ends, last))
    return ends[some], accept[some], reject[some]


@functools.lru_cache(maxsize=16)
def _arrays(boundaries: Boundaries) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    return np.array(boundaries.ends, dtype=np.int64), np.array(boundaries.accept), np.array(boundaries.reject)


def final_scores(entropies: Tensor, boundaries: Boundaries | None) -> Tensor:
    """Minus V, from every overlay's entropy; (B, N), float64, to (B,), float32."""
    evidence = Evidence(len(entropies), entropies.shape[1], boundaries, None)
    evidence.add(entropies)
    return evidence.scores


def last_rounded_to(limit: np.float32) -> np.float64:
    """The largest float64 that is no more than a limit when it is rounded to float32, as scores are."""
    with np.errstate(over="ignore"):
        above = np.float64(np.nextafter(limit, np.float32(np.inf)))
        middle = (np.float64(limit) + (above if limit == np.inf else min(above, _BEYOND))) / 2.0
        return middle if np.float32(middle) <= limit else np.nextafter(middle, -np.inf)


_BEYOND = np.float64(2.0**128)  # what would come after the largest float32
_MOST = last_rounded_to(np.finfo(np.float32).max)
