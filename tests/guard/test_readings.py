from __future__ import annotations

import math

import pytest

from guard.readings import reading_of
from guard.verdict import method_of


@pytest.mark.parametrize(
    ("detector", "method", "quantity", "text", "side"),
    [
        ("strip", "strip", "entropy", "0.1250 bits", "<="),
        ("strip-logit", "strip", "entropy", "0.1250 bits", "<="),
        ("feature-squeezing", "feature-squeezing", "change of the answer", "-0.1250", ">="),
        ("activation-filter-7", "activation-filter", "mean activation", "-0.1250", ">="),
        ("stripes", "stripes", "score", "-0.1250", ">="),
        ("my-own", "my-own", "score", "-0.1250", ">="),
    ],
)
def test_what_a_detectors_score_says(detector: str, method: str, quantity: str, text: str, side: str) -> None:
    reading = reading_of(detector)
    assert method_of(detector) == method
    assert (reading.quantity, reading.text(-0.125), reading.rejects) == (quantity, text, side)


def test_an_entropy_of_nothing_has_no_sign() -> None:
    assert math.copysign(1.0, reading_of("strip").value(0.0)) == 1.0
    assert reading_of("strip").text(-0.0) == "0.0000 bits"
