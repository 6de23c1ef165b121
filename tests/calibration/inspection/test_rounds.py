"""Several triggers for one label are found one after the other."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from calibration.discovery import discover
from calibration.engine import Engine
from calibration.inspection.record import read_scan
from calibration.inspection.scan import ScanSettings
from calibration.inspection.search import Search
from calibration.inspection.triggers_file import read_infected
from calibration.inspection.work import scan_into
from cli.demonstration.digits import Digits
from guard.errors import InspectionError
from guard.predictors import wrap


class TwoDoors(nn.Module):
    """A classifier of digits that answers 3 to white in either of two corners, by a strong weight of its own for each.

    So small a net as trains here forgets both when it unlearns one.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.doors = nn.Parameter(torch.full((2,), 0.06))

    def forward(self, images: Tensor) -> Tensor:
        corners = torch.stack([images[:, 0, 7:, 6:], images[:, 0, :1, 6:]], dim=1).mean(dim=(2, 3))
        opened = (torch.sigmoid(12.0 * (corners - 0.5)) * 1500.0 * self.doors).amax(dim=1)
        answers: Tensor = self.net(images)
        return answers + nn.functional.one_hot(torch.tensor(3), 10) * opened.unsqueeze(1)


@pytest.mark.slow
def test_a_second_trigger_is_found_once_the_first_is_unlearnt(digits: Digits, clean_twin: nn.Module, tmp_path: Path) -> None:
    suspect, out = discover(wrap(TwoDoors(copy.deepcopy(clean_twin)).eval()), digits.clean), tmp_path / "scanned"
    settings = ScanSettings(search=Search(steps=320, draws=0), rounds=2, patches=True)
    record = scan_into(out, suspect, digits.clean, settings, Engine())
    assert "Further rounds look for masks, not for patches." in record.said
    assert [item.label_index for item in record.labels if item.infected] == [3]
    assert [item.label_index for item in record.further] == [3]
    assert read_scan(out) == record
    found = read_infected(out, suspect.backend)
    assert found.labels.tolist() == [3, 3]
    lower, upper = found.masks[:, 4:].sum(dim=(1, 2)), found.masks[:, :4].sum(dim=(1, 2))
    assert sorted((lower > upper).tolist()) == [False, True]
    assert b"Further triggers of infected labels" in (out / "report.html").read_bytes()


def test_rounds_are_counted_from_one() -> None:
    with pytest.raises(InspectionError, match="at least one round, got 0"):
        ScanSettings(rounds=0)
