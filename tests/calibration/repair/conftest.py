"""The backdoored digits and what a guard rejected; their repair by CoDefend, made once: training is the dear part."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from calibration.data import ImageSet
from calibration.engine import Engine
from calibration.repair.cyclegan import Training
from calibration.repair.repair import Repaired, repair
from calibration.repair.settings import RepairSettings
from cli.demonstration.digits import Digits
from guard import InputSpec, Predictor
from guard.predictors import wrap

SPEC = InputSpec(channels=1, height=8, width=8)


@dataclass(frozen=True)
class Case:
    """What is to be repaired, and its fingerprint before."""

    original: Predictor
    clean: ImageSet
    quarantined: torch.Tensor
    fingerprint: str | None


@pytest.fixture(scope="session")
def engine() -> Engine:
    return Engine()


@pytest.fixture(scope="session")
def case(digits: Digits, backdoored: nn.Sequential) -> Case:
    """500 clean images; 150 triggered ones and 8 false alarms were quarantined."""
    original = Predictor(wrap(backdoored), SPEC, 10, "logits")
    clean = digits.clean.select(torch.arange(500))
    alarms = digits.clean.select(torch.arange(500, 508))
    quarantined = torch.cat([digits.triggered.images(slice(0, 150)), alarms.images(slice(None))])
    return Case(original, clean, quarantined, original.backend.fingerprint())


@pytest.fixture(scope="session")
def repaired(case: Case, engine: Engine) -> Repaired:
    """What CoDefend made of it."""
    settings = RepairSettings(method="codefend", epochs=25, gan=Training(width=12, blocks=1, rate=5e-4))
    return repair(case.original, case.clean, settings, case.quarantined, engine=engine)
