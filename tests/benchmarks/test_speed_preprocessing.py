"""What is timed side by side gives the same images."""

from __future__ import annotations

import pytest
import torch

from benchmarks.speed.preprocessing import OURS, operations


@pytest.mark.parametrize("operation", ["median 3x3", "median 5x5", "affine"])
def test_all_ways_do_the_same(operation: str) -> None:
    ways = operations(28)[operation]
    ours = ways[OURS]()
    for way in ways.values():
        torch.testing.assert_close(way(), ours, atol=0.05 if operation == "affine" else 1e-6, rtol=0.0)
