"""What exports are compared on."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from calibration import calibrate
from calibration.sources import open_model
from cli.demonstration.digits import Digits, save_exported
from export.original import Original


@pytest.mark.usefixtures("one_order")
def test_the_overlays_of_all_detectors(tmp_path: Path, digits: Digits, backdoored: nn.Module) -> None:
    save_exported(backdoored, digits.train.images(slice(0, 2)), tmp_path / "model.pt2")
    source = open_model(str(tmp_path / "model.pt2"), None, tmp_path)
    calibration = calibrate(source.backend, digits.clean, record=source.record)
    calibration.save(tmp_path / "profile", source.file)
    original = Original.load(tmp_path / "profile")
    assert len(original.overlays) == sum(len(strip.overlays) for strip in calibration.strips) == 100
    assert original.compare(source.backend) < 1e-6
