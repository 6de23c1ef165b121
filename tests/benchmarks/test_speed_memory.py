"""The memory that inspecting takes is the user's to set."""

from __future__ import annotations

from benchmarks.speed.memory import peak
from guard.predictors import Execution


def test_large_images_stay_within_the_limit() -> None:
    found = peak(256, Execution())
    assert 1 <= found.rows < 32
    assert found.taken < 256.0
