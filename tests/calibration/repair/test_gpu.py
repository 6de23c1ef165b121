"""Repairs on a GPU: the model comes back to the CPU, repaired as well as there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from calibration.engine import Engine
from calibration.repair.record import Method
from calibration.repair.repair import repair
from calibration.repair.settings import RepairSettings
from cli.demonstration.digits import ATTACK, Digits
from guard import Predictor
from guard.predictors import wrap
from tests.calibration.repair.conftest import SPEC

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.mark.parametrize("method", ["codefend", "gym"])
def test_repairs_on_a_gpu(method: Method, digits: Digits, backdoored: nn.Module) -> None:
    original = Predictor(wrap(backdoored), SPEC, 10, "logits")
    settings = RepairSettings(method=method)
    made = repair(original, digits.clean, settings, digits.triggered.images(slice(0, 150)), engine=Engine())
    module = made.predictor.backend.module  # type: ignore[attr-defined]
    assert {parameter.device.type for parameter in module.parameters()} == {"cpu"}
    assert made.figures.attack_success_seen_after is not None
    assert made.figures.attack_success_seen_after <= 0.1
    if method == "codefend":
        answers = made.predictor(digits.triggered.images(slice(150, None))).argmax(dim=1)
        assert float((answers == ATTACK.target_label).double().mean()) <= 0.05
