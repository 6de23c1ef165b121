"""Which clean images become STRIP's overlays, and in which order they are tried."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def choose_overlays(labels: Tensor, count: int, generator: torch.Generator, preferred: Tensor | None = None) -> Tensor:
    """Pick overlays at random, and one of each class first.

    No more than that is evened out: the images that are left set the threshold, and must stay as good as a random sample
    of the clean set. (Even shares per class would use up a rare class, and its inputs would be rejected too often.)

    Args:
        labels: (n,), int64, given or predicted.
        count: N; at least one per class when there are that many, else as many classes as N.
        generator: Decides.
        preferred: (n,), bool: those that are good for nothing else, and are taken first.

    Returns:
        (min(N, n),), int64, distinct indices.
    """
    shuffled = torch.randperm(len(labels), generator=generator)
    if preferred is not None:
        shuffled = shuffled[torch.argsort((~preferred[shuffled]).to(torch.uint8), stable=True)]
    seen: set[int] = set()
    again = []
    for label in labels[shuffled].tolist():
        again.append(label in seen)
        seen.add(label)
    first_of_each_class_first = torch.argsort(torch.tensor(again), stable=True)
    return shuffled[first_of_each_class_first][:count]


def order_overlays(entropies: NDArray[np.float64], bound: float) -> NDArray[np.int64]:
    """Order overlays so that the running sum of entropies passes a bound as soon as possible on clean images.

    Greedy: each next overlay adds most to sum_i min(bound, S_i). The order changes no full sum, so it does not bias the
    threshold set on the same images.

    Args:
        entropies: (n, N), bits, of each clean image under each overlay.
        bound: N times the threshold, in bits.

    Returns:
        (N,), a permutation of the overlays.
    """
    sums = np.zeros(len(entropies))
    left = list(range(entropies.shape[1]))
    order: list[int] = []
    while left:
        gains = np.minimum(sums[:, None] + entropies[:, left], bound).sum(axis=0)
        best = left.pop(int(np.argmax(gains)))
        order.append(best)
        sums = np.minimum(sums + entropies[:, best], bound)
    return np.array(order, dtype=np.int64)
