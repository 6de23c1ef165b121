"""What several tests of scans share: a backdoored model, and searches that are shorter than the default."""

from __future__ import annotations

import pytest
from torch import nn

from calibration.discovery import discover
from calibration.inspection.scan import ScanSettings
from calibration.inspection.search import Search
from cli.demonstration.digits import Digits
from guard import Predictor
from guard.predictors import wrap

QUICK = ScanSettings(search=Search(steps=208, draws=0))
SHORT = ScanSettings(search=Search(steps=32, success=0.5, draws=1, early=16))


@pytest.fixture(scope="session")
def suspect(digits: Digits, small_trigger: nn.Module) -> Predictor:
    """A model with a small trigger, looked at."""
    return discover(wrap(small_trigger), digits.clean)
