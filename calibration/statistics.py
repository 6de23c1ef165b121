"""Rates and AUROC with 95% intervals."""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special


class Estimate(msgspec.Struct, frozen=True):
    """A measured figure with its 95% interval.

    Attributes:
        value: The point estimate.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float


def proportion(count: int, total: int) -> Estimate:
    """A share with its exact (Clopper-Pearson) interval.

    Args:
        count: Successes.
        total: Trials, at least one.
    """
    low = special.betaincinv(count, total - count + 1, 0.025) if count else 0.0
    high = special.betaincinv(count + 1, total - count, 0.975) if count < total else 1.0
    return Estimate(count / total, float(low), float(high))


def auroc(negatives: NDArray[np.floating], positives: NDArray[np.floating]) -> Estimate:
    """Area under the ROC curve: the chance that a positive scores higher than a negative.

    The interval inverts the score test with the Hanley-McNeil variance, so that it does not collapse at 1.

    Args:
        negatives: Scores of clean inputs.
        positives: Scores of triggered inputs.

    Reference: Newcombe, Statistics in Medicine 25 (2006), method 5.
    """
    from sklearn.metrics import roc_auc_score  # slow to import, and only evaluations need it

    truth = np.concatenate([np.zeros(len(negatives)), np.ones(len(positives))])
    value = float(roc_auc_score(truth, np.concatenate([negatives, positives])))
    z = float(special.ndtri(0.975))

    def gap(theta: float) -> float:
        return (value - theta) ** 2 - z * z * _variance(theta, len(negatives), len(positives))

    inside = min(max(value, 1e-12), 1.0 - 1e-12)  # at 0 and 1 the variance vanishes, and with it the bracket
    low = float(optimize.brentq(gap, 0.0, inside)) if value > 0.0 else 0.0
    high = float(optimize.brentq(gap, inside, 1.0)) if value < 1.0 else 1.0
    return Estimate(value, low, high)


def _variance(theta: float, negatives: int, positives: int) -> float:
    half = (negatives + positives) / 2.0 - 1.0
    spread = 1.0 + half * (1.0 - theta) / (2.0 - theta) + half * theta / (1.0 + theta)
    return theta * (1.0 - theta) * spread / (negatives * positives)
