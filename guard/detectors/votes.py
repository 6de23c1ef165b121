"""STRIP by votes: enough overlays must make the model unsure, not all of them on average.

The entropy h_n under an overlay is a vote for the input where it is over the threshold h. An input is accepted once K of the N
overlays have voted for it, and rejected if fewer do. So the lowest threshold at which an input is rejected is the K-th highest
of its N entropies, and minus that is the score.

That is exact early acceptance, too: K votes stay K votes whatever comes after, in whatever order. A clean input's entropy is
high under some overlays and low under others, so that it has K votes long before its sum is over N times a mean. A trigger gets
in where K overlays hide it from the model.

References: Gao et al., STRIP, arXiv:1902.06531; David and Nagaraja, Order Statistics, 2003. Votes: ours.
"""

from __future__ import annotations

from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from guard.detectors.evidence import last_rounded_to


@final
class Votes:
    """`Evidence` of the K-th highest entropy.

    Args:
        images: B.
        total: N.
        needed: K.
        threshold: On the score: once an image's verdict is certain, what comes after tells nothing. None: everything tells.
    """

    def __init__(self, images: int, total: int, needed: int, threshold: float | None) -> None:
        self.rows: NDArray[np.int64] = np.arange(images)
        self._total = total
        self._limit = None if threshold is None else last_rounded_to(np.float32(-threshold))
        self._heard = np.zeros(images, dtype=np.int64)
        self._highest = np.zeros((images, needed))  # so far: entropies are not negative

    @property
    def exact(self) -> Tensor:
        """See `Evidence`."""
        return torch.from_numpy((self._heard == self._total) | np.isnan(self._highest).any(axis=1))

    @property
    def scores(self) -> Tensor:
        """See `Evidence`; of some passes, minus the K-th highest entropy so far, which is at most that of all."""
        return torch.from_numpy(-self._highest.min(axis=1).astype(np.float32))

    def add(self, entropies: Tensor) -> None:
        """See `Evidence`."""
        rows, needed = self.rows, self._highest.shape[1]
        known = np.concatenate([self._highest[rows], entropies.numpy()], axis=1)
        highest = np.partition(known, -needed, axis=1)[:, -needed:]  # NaN counts as the highest, so that it is kept
        self._highest[rows] = highest
        self._heard[rows] += entropies.shape[1]
        if self._limit is not None:
            self.rows = rows[~(highest.min(axis=1) > self._limit)]  # NaN is over nothing: undecided, and in the end rejected


def vote_scores(entropies: Tensor, needed: int) -> Tensor:
    """Minus the K-th highest, of every overlay's entropy; (B, N), float64, to (B,), float32."""
    votes = Votes(len(entropies), entropies.shape[1], needed, None)
    votes.add(entropies)
    return votes.scores
