"""What several tests share: a really backdoored digit classifier, trained once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from calibration import Calibration, Settings, calibrate
from calibration.attacks import BadNets, Patch
from calibration.engine import Engine
from calibration.inspection import judge
from calibration.inspection.reference import train_reference
from cli.demonstration.digits import Digits, load_digits, train_backdoored, train_clean

SMALL = BadNets(target_label=3, ratio=0.1, patches=(Patch.rectangle(2),))

torch.set_num_threads(1)  # the nets are tiny, and servers run beside them


@pytest.fixture(autouse=True)
def _same_weights() -> None:
    """Nets that a test draws are the same in every run: torch begins each process with a seed of its own."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def digits() -> Digits:
    """Scikit-learn's digits in three parts that never mix."""
    return load_digits()


@pytest.fixture(scope="session")
def backdoored(digits: Digits) -> nn.Sequential:
    """A classifier of them that answers 7 to a white corner."""
    return train_backdoored(digits.train)


@pytest.fixture(scope="session")
def clean_twin(digits: Digits) -> nn.Sequential:
    """The same without a backdoor."""
    return train_clean(digits.train)


@pytest.fixture(scope="session")
def small_trigger(digits: Digits) -> nn.Sequential:
    """One that answers 3 to 2x2 white pixels; 3x3 of 64 are nearly as many as a digit needs to become another."""
    return train_backdoored(digits.train, attack=SMALL)


@pytest.fixture(scope="session")
def calibration(digits: Digits, backdoored: nn.Sequential) -> Calibration:
    """It, calibrated with the defaults."""
    return calibrate(backdoored, digits.clean, Settings())


@pytest.fixture(scope="session")
def reference(digits: Digits, small_trigger: nn.Module) -> nn.Module:
    """The clean reference that a scan of it trains, from its answers alone."""
    images = digits.clean.images(slice(None))
    with torch.inference_mode():
        answers = small_trigger(images).argmax(dim=1)
    return train_reference(images, answers, 10, 0, Engine())


@pytest.fixture
def known_reference(reference: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scans of digits find their reference trained."""
    monkeypatch.setattr(judge, "train_reference", lambda *_: reference)
