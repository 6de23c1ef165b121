"""Where STRIP may stop before all passes: the boundaries of a group-sequential test, by soft votes.

An overlay under which the entropy is h_n gives an input min(h_n / h, 1)^6 of a vote, at a threshold of h: a whole one where
the model is as unsure as that, next to nothing where it is half as unsure. S_n(h) is the sum of the first n of N overlays'
votes. At the end of each stage an input is accepted if S_n > a_n K, and rejected if S_n <= r_n K, but by an r_n of 0 never;
after all overlays both shares are one, so that K votes are needed. As votes only become fewer as h grows, an input that is
rejected at one threshold is rejected at any higher one. The lowest at which it is, V, makes a score of minus V like any other:
a threshold on it is calibrated like any other's, and the false rejection rate is that of all stages together. The shares a and
r, and the order of the overlays, are chosen on other images than the threshold.

What was accepted at h would have been accepted at any h' >= h at which neither S_k(h') <= a_k K nor, before, S_j(h') <= r_j K.
Votes fall no faster than (h / h')^6, so V is at least h times the sixth root of the least of S_k / (a_k K) and all S_j / (r_j
K); and what was rejected has a V of at most h times that of the greatest of S_k / (r_k K) and all S_j / (a_j K).

No overlay can give more than one vote, however unsure it makes the model: a few that hide a trigger don't let it in.

References: Jennison and Turnbull, Group Sequential Methods, 1999. STRIP with boundaries, soft votes: ours.
"""

from __future__ import annotations

import functools
import itertools
from typing import final

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from guard.detectors.evidence import running_sums
from guard.errors import CalibrationError

_POWER = 6  # what profiles hold stands for it, and for `soft_votes`
_ROUNDING = 1e-6  # of a bound, which is a little more cautious than it need be
_LEAST = 1e-300  # a threshold of nothing, which any entropy reaches and none at all doesn't


@final
class Boundaries(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """See the top of this file.

    Attributes:
        votes: K.
        ends: Overlays tried at the end of each stage, ascending; the last is N.
        accept: a_n of each, at most 1.
        reject: r_n of each, at most a_n; 0 where nothing is rejected.

    Raises:
        CalibrationError: They decide nothing, or both ways.
    """

    votes: int
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
            raise CalibrationError("expected shares 0 <= reject <= accept <= 1 of each stage, and 1 of the last")
        if not 0 < self.votes < self.ends[-1]:
            raise CalibrationError(f"expected votes needed of fewer than all {self.ends[-1]} overlays, got {self.votes}")

    @property
    def accepting_ends(self) -> tuple[int, ...]:
        """Ends of the stages at which an input can be accepted."""
        return tuple(end for end, accept in zip(self.ends, self.accept, strict=True) if accept * self.votes < end)


def soft_votes(entropies: NDArray[np.float64], threshold: float | NDArray[np.float64]) -> NDArray[np.float64]:
    """min(h_n / h, 1)^6 of each entropy; the same bits whatever comes with it.

    Args:
        entropies: (A, n), bits, not negative.
        threshold: h, in bits, not negative, of all or of each row, (A, 1).
    """
    with np.errstate(over="ignore"):
        votes = entropies / np.maximum(threshold, _LEAST)
    np.minimum(votes, 1.0, out=votes)
    votes *= votes * votes
    return np.square(votes, out=votes)


@final
class SoftVotes:
    """`Evidence` of V.

    Args:
        images: B.
        boundaries: See there.
        threshold: On the score.
    """

    def __init__(self, images: int, boundaries: Boundaries, threshold: float) -> None:
        self.rows: NDArray[np.int64] = np.arange(images)
        self._limit, self._done = np.float32(-threshold), 0
        self._ends, self._accept, self._reject = _arrays(boundaries)
        self._sums = np.zeros(images)
        self._at_ends = np.zeros((images, len(self._ends)))
        self._stage = np.full(images, -1)  # at which it was decided
        self._accepted = np.zeros(images, dtype=np.bool_)

    @property
    def exact(self) -> Tensor:
        """See `Evidence`: never, but of an answer that is none."""
        return torch.from_numpy((self._stage < 0) & np.isnan(self._sums))

    @property
    def scores(self) -> Tensor:
        """See `Evidence`."""
        limit, bounds = self._limit, np.where(np.isnan(self._sums), np.float32(np.nan), self._limit)
        decided = self._stage >= 0
        least, greatest = self._bounds(self._at_ends[decided], self._stage[decided])
        lowest = np.maximum(np.nextafter(limit, np.float32(np.inf)), np.float32(0.0))
        bounds[decided] = np.where(self._accepted[decided], np.fmax(least, lowest), np.fmin(greatest, limit))
        return torch.from_numpy(-bounds)

    def add(self, entropies: Tensor) -> None:
        """See `Evidence`."""
        rows, before = self.rows, self._done
        self._done += entropies.shape[1]
        sums = running_sums(self._sums[rows], soft_votes(entropies.numpy(), float(self._limit)))
        self._sums[rows] = sums[:, -1]
        some = slice(*self._ends.searchsorted([before, self._done], side="right"))  # the stages that end here
        if some.start == some.stop:
            return
        at_ends = sums[:, self._ends[some] - before - 1]
        self._at_ends[rows, some] = at_ends
        if self._limit < 0.0:  # under every V
            accepted, decided = at_ends >= 0.0, at_ends >= 0.0
        else:
            accepted = at_ends > self._accept[some]
            decided = accepted | (at_ends <= self._reject[some])
        decided &= ~np.isnan(sums[:, -1:])  # undecided, and in the end rejected, although an end before may have decided
        first = decided.argmax(axis=1)  # and the first at all where none decides
        every = np.arange(len(rows))
        closed = decided[every, first]
        self._stage[rows[closed]] = some.start + first[closed]
        self._accepted[rows] = accepted[every, first]
        self.rows = rows[~closed]

    def _bounds(
        self, at_ends: NDArray[np.float64], stage: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """What V is at least, and at most, by what was summed up to the stage that decided."""
        before, every = np.arange(len(self._ends)) < stage[:, None], np.arange(len(stage))
        with np.errstate(all="ignore"):
            accepting, rejecting = at_ends / self._accept, at_ends / self._reject
            least = np.fmin(np.fmin.reduce(np.where(before, rejecting, np.inf), axis=1), accepting[every, stage])
            greatest = np.fmax(np.where(before, accepting, 0.0).max(axis=1), rejecting[every, stage])
            roots = (np.array([least, greatest]) ** (1.0 / _POWER)).T * (1.0 - _ROUNDING, 1.0 + _ROUNDING)
            low, high = (float(self._limit) * roots).astype(np.float32).T
        return low, high


def soft_vote_scores(entropies: Tensor, boundaries: Boundaries) -> Tensor:
    """Minus V, from every overlay's entropy; (B, N), float64, to (B,), float32, NaN where any is.

    V is the lowest float32 at which the input is rejected, by bisection of their bits, which ascend as numbers do.
    """
    values = entropies.numpy()
    ends, accept, reject = _arrays(boundaries)
    accepted = np.full(len(values), -1)
    rejected = np.full(len(values), int(np.finfo(np.float32).max.view(np.int32)))
    while (rejected - accepted > 1).any():
        middle = (accepted + rejected + 1) // 2  # of neighbours the higher, again
        limits = middle.astype(np.int32).view(np.float32).astype(np.float64)[:, None]
        at_ends = running_sums(np.zeros(len(values)), soft_votes(values, limits))[:, ends - 1]
        over = at_ends > accept
        first = (over | (at_ends <= reject)).argmax(axis=1)
        goes_in = over[np.arange(len(values)), first]
        accepted, rejected = np.where(goes_in, middle, accepted), np.where(goes_in, rejected, middle)
    scores = -rejected.astype(np.int32).view(np.float32)
    return torch.from_numpy(np.where(np.isnan(values).any(axis=1), np.float32(np.nan), scores))


def by_all(votes: int, overlays: int) -> Boundaries:
    """Of so many overlays, ones that decide after all of them."""
    return Boundaries(votes=votes, ends=(overlays,), accept=(1.0,), reject=(1.0,))


@functools.lru_cache(maxsize=16)
def _arrays(boundaries: Boundaries) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Ends, a_n K and r_n K, NaN where nothing is rejected: no sum is at most that."""
    accept, reject = np.array(boundaries.accept) * boundaries.votes, np.array(boundaries.reject) * boundaries.votes
    return np.array(boundaries.ends, dtype=np.int64), accept, np.where(reject > 0.0, reject, np.nan)
