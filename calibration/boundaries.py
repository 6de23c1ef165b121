"""Where STRIP may stop before all passes, from clean images that set no threshold.

Early acceptance must not let an input through that all passes would reject. The clean images of the fewest votes show how the
votes of an input come together that ends at the threshold: S_n / K, overlay by overlay. Shares under which all of that growth
stays, for most of them and at all stages together, accept. What clean images can't show: an overlay may hide a trigger
from the model. So an input needs more than two votes, which no two overlays can give; and never is accepted what has fewer so
far than make K at last if they go on coming as fast, though clean images may have had fewer by then.

Early rejection must not cost clean inputs. Votes under which next to none of the images come that all passes accept, at any
stage, reject. Of other images somewhat more come under them, which lowers the threshold that keeps to the rate; more cautious
ones took up to twice the passes, and let hardly fewer triggers in.

The numbers below were chosen on development victims, none of which a table reports: acceptance on fewer
votes let in triggers that one or two overlays hide (`benchmarks/boundaries.py`), and on traffic signs more votes in all took
more passes. The stages, and how many images choose, are from an earlier test that added entropies up: there denser stages took
fewer passes, and fewer than 300 images let more triggers through than all passes.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from calibration.overlays import order_overlays
from guard.detectors import Boundaries
from guard.detectors.boundaries import by_all, soft_vote_scores, soft_votes

_ENDS = (*range(1, 17), 18, 20, 22, 24, 26, 28, 32, 36, 40, 45, 50, 57, 64, 72, 80)
_NEAR, _FEWEST = 0.2, 30  # of the images: share, and at least so many, that show how an input near the threshold goes
_MORE_THAN = 2.0  # votes: as many as two overlays may give that hide a trigger
_ACCEPTED = 0.5  # of inputs at the threshold, that are accepted before all passes
_REJECTED = 0.25  # of the false rejection rate: clean inputs that are rejected before all passes would have accepted them
_SHARE, _LEAST, _MOST = 0.25, 300, 600  # of the clean images that are not set aside


def images_for_boundaries(images: int) -> int:
    """How many of so many clean images choose boundaries, and set no threshold."""
    return min(max(_LEAST, round(_SHARE * images)), _MOST)


def images_needed(setting: int) -> int:
    """The fewest clean images of which so many are left to set the threshold."""
    return next(
        count for count in range(setting + _LEAST, setting + _MOST + 1) if count - images_for_boundaries(count) >= setting
    )


def order_for_boundaries(entropies: NDArray[np.float64], threshold: float, votes: int) -> NDArray[np.int64]:
    """(N,): the order of the overlays in which few of them give clean inputs their votes; see `order_overlays`.

    Args:
        entropies: (n, N), bits.
        threshold: Of all passes, in bits, over 0.
        votes: K.
    """
    return order_overlays(soft_votes(entropies, threshold), votes)


def choose_boundaries(
    entropies: NDArray[np.float64], threshold: float, votes: int, frr: float, more_than: float = _MORE_THAN
) -> Boundaries | None:
    """Boundaries of a test that decides as all passes would, mostly; None where entropies are too much alike to choose any.

    Args:
        entropies: (n, N), bits, of each clean image under each overlay, in the order in which they are tried.
        threshold: Of all passes, in bits, over 0.
        votes: K, fewer than N.
        frr: False rejection rate that it is for.
        more_than: Votes that an input needs at any stage, and more.
    """
    total = entropies.shape[1]
    ends = np.array([end for end in _ENDS if end < total], dtype=np.int64)
    limits = -soft_vote_scores(torch.from_numpy(np.ascontiguousarray(entropies)), by_all(votes, total)).double().numpy()
    near = np.argsort(limits, kind="stable")[: max(_FEWEST, round(_NEAR * len(limits)))]
    near = near[limits[near] > 0.0]
    passing = entropies[limits > threshold]
    if not (len(ends) and len(near) and len(passing)):
        return None
    growth = _gathered(entropies[near], limits[near, None], ends) / votes
    least = np.maximum(ends / total, more_than / votes)
    accept = np.clip(_band(growth, 1.0 - _ACCEPTED), np.minimum(least, 1.0), 1.0)
    fewest = -_band(-_gathered(passing, threshold, ends), 1.0 - _REJECTED * frr) / votes
    reject = np.minimum(np.maximum(np.nextafter(fewest, -np.inf), 0.0), accept)  # under the fewest, not with them
    return Boundaries(votes=votes, ends=(*ends.tolist(), total), accept=(*accept.tolist(), 1.0), reject=(*reject.tolist(), 1.0))


def _gathered(
    entropies: NDArray[np.float64], threshold: float | NDArray[np.float64], ends: NDArray[np.int64]
) -> NDArray[np.float64]:
    """(m, K): votes of (m, N) entropies at the ends of stages."""
    return soft_votes(entropies, threshold).cumsum(axis=1)[:, ends - 1]


def _band(values: NDArray[np.float64], share: float) -> NDArray[np.float64]:
    """(K,): of each column of (m, K) the same quantile, the lowest that holds such a share of the rows in all columns."""
    ranks = values.argsort(axis=0, kind="stable").argsort(axis=0, kind="stable")
    highest = np.sort(ranks.max(axis=1))[int(np.ceil(share * len(values))) - 1]
    bounds: NDArray[np.float64] = np.sort(values, axis=0)[highest]
    return bounds
