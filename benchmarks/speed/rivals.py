"""STRIP as others run it, re-expressed: the same passes in the same order of loops, on any function of a numpy batch.

`notebook`: the original's, one input at a time, one blend at a time by OpenCV's weighted addition, N answers together.
`art`: Adversarial Robustness Toolbox 1.20.1, one input at a time, half and half, N answers together.
`backdoorbench`: a batch of inputs, overlay by overlay, each input's blend by OpenCV.
`trojanzoo`: a batch of inputs, overlay by overlay, half and half, whole batches at once.

Each spends all N passes on every input. Entropy is over the classes, in all of them (ART's own is over the samples).

References, on GitHub: garrisongys/STRIP; Trusted-AI/adversarial-robustness-toolbox; SCLBD/BackdoorBench; ain-soph/trojanzoo.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import cv2
import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.float32]
Predict = Callable[[Pixels], Pixels]
"""(B, C, H, W) in [0, 1] to (B, M) probabilities."""

Rival = Callable[[Predict, Pixels, Pixels], NDArray[np.float64]]
"""What `predict` does, (B, C, H, W) inputs and (N, C, H, W) overlays to mean entropies, (B,)."""


def entropy(probabilities: Pixels) -> NDArray[np.float64]:
    """(..., M) to (...), in bits."""
    wide = probabilities.astype(np.float64)
    found: NDArray[np.float64] = -(wide * np.log2(wide + 1e-12)).sum(axis=-1)
    return found


def notebook(predict: Predict, inputs: Pixels, overlays: Pixels) -> NDArray[np.float64]:
    """(B,), mean entropy in bits; one input and one overlay at a time."""
    means = []
    for background in inputs:
        blends = np.empty_like(overlays)
        for number, overlay in enumerate(overlays):
            blends[number] = cv2.addWeighted(background, 1.0, overlay, 1.0, 0.0)
        means.append(entropy(predict(blends)).mean())
    return np.array(means)


def art(predict: Predict, inputs: Pixels, overlays: Pixels) -> NDArray[np.float64]:
    """(B,), mean entropy in bits; one input at a time."""
    means = []
    for one in inputs:
        blends = np.stack([0.5 * one + 0.5 * overlay for overlay in overlays]).astype(np.float32)
        means.append(entropy(predict(blends)).mean())
    return np.array(means)


def backdoorbench(predict: Predict, inputs: Pixels, overlays: Pixels) -> NDArray[np.float64]:
    """(B,), mean entropy in bits; a batch of inputs, overlay by overlay."""
    sums = np.zeros(len(inputs))
    for overlay in overlays:
        sums += entropy(predict(np.stack([cv2.addWeighted(one, 1.0, overlay, 1.0, 0.0) for one in inputs])))
    return sums / len(overlays)


def trojanzoo(predict: Predict, inputs: Pixels, overlays: Pixels) -> NDArray[np.float64]:
    """(B,), mean entropy in bits; a batch of inputs, overlay by overlay."""
    sums = np.zeros(len(inputs))
    for overlay in overlays:
        sums += entropy(predict(0.5 * inputs + 0.5 * overlay))
    return sums / len(overlays)


RIVALS: Mapping[str, Rival] = {
    "original notebook": notebook,
    "ART 1.20.1": art,
    "BackdoorBench": backdoorbench,
    "trojanzoo": trojanzoo,
}
