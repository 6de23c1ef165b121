"""Whose batch norm can be switched, and that it is switched back."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from calibration.fine_tuning import trainable
from calibration.repair.batch_norm import batch_statistics, switchable
from guard.predictors import load_backend
from tests.calibration.repair.test_dhbe import Normed
from tests.guard.models import save_exported, save_torchscript
from tests.toy import LearningToy


def test_layers_of_modules_are_found_and_those_of_programs_are_not(tmp_path: Path) -> None:
    net = Normed()
    assert switchable(nn.Sequential(nn.Identity(), net)) == [net.norm]
    assert switchable(LearningToy()) == []
    for file in (save_torchscript(net, tmp_path / "net.pt"), save_exported(net, tmp_path / "net.pt2")):
        assert switchable(trainable(load_backend(str(file)))) == []


@pytest.mark.parametrize("wanted", [True, False])
def test_statistics_are_those_of_the_batches_inside_alone(wanted: bool) -> None:
    net = Normed()
    with batch_statistics(net, wanted):
        assert net.norm.training is wanted
        assert not net.training
    assert not net.norm.training


def test_it_is_switched_back_after_an_error() -> None:
    net = Normed()
    with pytest.raises(ZeroDivisionError), batch_statistics(net, True):
        1 / 0  # noqa: B018
    assert not net.norm.training
