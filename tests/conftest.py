"""What several tests share: a really backdoored digit classifier."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from calibration import Calibration, Settings, calibrate
from calibration.inspection import judge
from cli.demonstration.digits import Digits, load_digits
from tests.nets import load_net

torch.set_num_threads(1)  # the nets are tiny, and servers run beside them


@pytest.fixture(autouse=True)
def _same_weights() -> None:
    """Nets that a test draws are the same in every run: torch begins each process with a seed of its own."""
    torch.manual_seed(0)


@pytest.fixture
def one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """No way to run a model is clearly faster than PyTorch's own: what is calibrated twice is the same to the last bit."""
    monkeypatch.setattr("calibration.execution._timed", lambda *_: 1.0)


@pytest.fixture(scope="session")
def digits() -> Digits:
    """Scikit-learn's digits in three parts that never mix."""
    return load_digits()


@pytest.fixture(scope="session")
def backdoored() -> nn.Sequential:
    """A classifier of digits that answers 7 to a white corner."""
    return load_net("backdoored")


@pytest.fixture(scope="session")
def clean_twin() -> nn.Sequential:
    """The same without a backdoor."""
    return load_net("clean_twin")


@pytest.fixture(scope="session")
def small_trigger() -> nn.Sequential:
    """One that answers 3 to 2x2 white pixels."""
    return load_net("small_trigger")


@pytest.fixture(scope="session")
def calibration(digits: Digits, backdoored: nn.Sequential) -> Calibration:
    """It, calibrated with the defaults."""
    return calibrate(backdoored, digits.clean, Settings())


@pytest.fixture(scope="session")
def reference(clean_twin: nn.Sequential) -> nn.Module:
    """A clean model of the task, as a scan trains one; smaller, for a scan spends most of its time on searches through it."""
    return copy.deepcopy(clean_twin).requires_grad_(False)


@pytest.fixture
def known_reference(reference: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scans of digits find their reference trained."""
    monkeypatch.setattr(judge, "train_reference", lambda *_: reference)
