"""Thresholds in float64 of scores in float32, which the evidence of a mean and of votes is compared with."""

from __future__ import annotations

import math

import numpy as np
import pytest

from guard.detectors.evidence import last_rounded_to

LARGEST = float(np.finfo(np.float32).max)


@pytest.mark.parametrize("limit", [0.0, -0.0, 1e-45, 1.0, 1.0 + 2**-23, -0.7, 3e38, LARGEST, math.inf])
def test_what_is_decided_in_float64_is_decided_as_rounded_scores_are(limit: float) -> None:
    """The last number that counts as at the limit, and the next, which does not."""
    single = np.float32(limit)
    last = last_rounded_to(single)
    assert np.float32(last) <= single
    with np.errstate(over="ignore"):
        assert limit == math.inf or np.float32(np.nextafter(last, np.inf)) > single
