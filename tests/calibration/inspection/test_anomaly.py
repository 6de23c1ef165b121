"""The anomaly index, against hand-computed values."""

from __future__ import annotations

import pytest
import torch

from calibration.inspection.anomaly import anomaly_indices, check_reached
from guard.errors import CalibrationError, InspectionError


def test_hand_computed() -> None:
    found = anomaly_indices(torch.tensor([10.0, 11.0, 12.0, 13.0, 2.0]))  # median 11; deviations 1 0 1 2 9, their median 1
    torch.testing.assert_close(found, torch.tensor([1.0, 0.0, -1.0, -2.0, 9.0], dtype=torch.float64) / 1.4826)


def test_the_size_does_not_matter_only_its_place() -> None:
    sizes = torch.rand(12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(anomaly_indices(sizes), anomaly_indices(sizes * 40.0 + 7.0), rtol=1e-4, atol=1e-4)


def test_equal_sizes_hold_no_outlier() -> None:
    assert anomaly_indices(torch.tensor([3.0, 3.0, 3.0, 3.0, 1.0])).tolist() == [0.0] * 5


@pytest.mark.parametrize("sizes", [torch.ones(2), torch.ones(2, 3), torch.tensor([1.0, float("nan"), 2.0])])
def test_what_has_no_index_is_refused(sizes: torch.Tensor) -> None:
    with pytest.raises(CalibrationError, match="expected at least 3 finite sizes"):
        anomaly_indices(sizes)


def test_labels_without_a_trigger_are_told_and_too_many_decide_nothing() -> None:
    def reached(count: int) -> torch.Tensor:
        return torch.arange(5) < count

    assert check_reached(reached(5), "") == ""
    assert check_reached(reached(3), "").startswith("For 2 of 5 labels no trigger was found that works")
    with pytest.raises(
        InspectionError, match=r"more than half of the 5 labels, .*, got 2: nothing can be said .*; more steps;"
    ):
        check_reached(reached(2), "more steps")
    assert "For 2 of 5 pairs of labels no trigger" in check_reached(reached(3), "", "pairs of labels")
