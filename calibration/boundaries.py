"""Where STRIP may stop before all passes, from clean images that set no threshold.

Early acceptance must not let an input through that all passes would reject. The clean images of least entropy show how the sum
of an input's entropies grows that ends at the threshold: S_n / S_N, overlay by overlay. Shares under which all of that growth
stays, for most of them and at all stages together, accept. What clean images can't show: a single overlay may hide a trigger
from the model. Before several have been tried, only what all passes would accept is accepted; and never what is not over the
threshold on average so far, though clean images may have gained less by then.

Early rejection must not cost clean inputs. Shares of the threshold under which the sums of next to none of the images come that
all passes accept, at any stage, reject.

The numbers below were chosen on the victims that development is done on, none of which a table reports: denser stages and a
smaller goal took fewer passes, and fewer than 300 images led to boundaries that let more triggers through than all passes, as
did acceptance on one or two overlays (`benchmarks/boundaries.py`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from calibration.overlays import order_overlays
from guard.detectors import Boundaries

_ENDS = (*range(1, 17), 18, 20, 22, 24, 26, 28, 32, 36, 40, 45, 50, 57, 64, 72, 80)
_NEAR, _FEWEST = 0.2, 30  # of the images: share, and at least so many, that show how an input near the threshold goes
_ACCEPTING_FROM = 3  # overlays: fewer don't show whether one hid a trigger
_ACCEPTED = 0.4  # of inputs at the threshold, that are accepted before all passes
_REJECTED = 0.25  # of the false rejection rate: clean inputs that are rejected before all passes would have accepted them
_GOAL = 8  # overlays' worth of the threshold, that the order of the overlays is to gather soon
_SHARE, _LEAST, _MOST = 0.25, 300, 600  # of the clean images that are not set aside


def images_for_boundaries(images: int) -> int:
    """How many of so many clean images choose boundaries, and set no threshold."""
    return min(max(_LEAST, round(_SHARE * images)), _MOST)


def images_needed(setting: int) -> int:
    """The fewest clean images of which so many are left to set the threshold."""
    return next(
        count for count in range(setting + _LEAST, setting + _MOST + 1) if count - images_for_boundaries(count) >= setting
    )


def order_for_boundaries(entropies: NDArray[np.float64], threshold: float) -> NDArray[np.int64]:
    """(N,): the order of the overlays in which few of them tell clean inputs; see `order_overlays`.

    Args:
        entropies: (n, N), bits.
        threshold: Of the mean entropy, in bits.
    """
    return order_overlays(entropies, _GOAL * threshold)


def choose_boundaries(
    entropies: NDArray[np.float64], threshold: float, frr: float, accepting_from: int = _ACCEPTING_FROM
) -> Boundaries | None:
    """Boundaries of a test that decides as all passes would, mostly; None where entropies are too much alike to choose any.

    Args:
        entropies: (n, N), bits, of each clean image under each overlay, in the order in which they are tried.
        threshold: Of the mean entropy, in bits, over 0.
        frr: False rejection rate that it is for.
        accepting_from: Overlays, before which only what all passes would accept is accepted.
    """
    total = entropies.shape[1]
    ends = [end for end in _ENDS if end < total]
    sums = entropies.cumsum(axis=1)
    full, at_ends = sums[:, -1], sums[:, np.array(ends, dtype=np.int64) - 1]
    near = np.argsort(full, kind="stable")[: max(_FEWEST, round(_NEAR * len(full)))]
    near = near[full[near] > 0.0]
    passing = at_ends[full > total * threshold]
    if not (ends and len(near) and len(passing)):
        return None
    accept, some = np.ones(len(ends)), np.array(ends) >= accepting_from
    if some.any():
        growth = _band(at_ends[near][:, some] / full[near, None], 1.0 - _ACCEPTED)
        accept[some] = np.clip(growth, np.array(ends)[some] / total, 1.0)
    reject = np.minimum(-_band(-passing, 1.0 - _REJECTED * frr) / (total * threshold), accept)
    return Boundaries(ends=(*ends, total), accept=(*accept.tolist(), 1.0), reject=(*reject.tolist(), 1.0))


def _band(values: NDArray[np.float64], share: float) -> NDArray[np.float64]:
    """(K,): of each column of (m, K) the same quantile, the lowest that holds such a share of the rows in all columns."""
    ranks = values.argsort(axis=0, kind="stable").argsort(axis=0, kind="stable")
    highest = np.sort(ranks.max(axis=1))[int(np.ceil(share * len(values))) - 1]
    bounds: NDArray[np.float64] = np.sort(values, axis=0)[highest]
    return bounds
