"""The clean reference: what it knows, and what it does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from calibration.checkpoints import Checkpoints
from calibration.engine import Engine
from calibration.inspection.reference import train_reference
from cli.demonstration.digits import Digits
from tests.nets import SMALL

TARGET = SMALL.target_label


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calibration.inspection.reference._STEPS", 2)


def test_it_leaves_the_random_numbers_alone(digits: Digits) -> None:
    before = torch.random.get_rng_state()
    train_reference(digits.clean.images(slice(0, 64)), digits.clean.known_labels[:64], 10, 0, Engine())
    assert torch.equal(before, torch.random.get_rng_state())


def test_it_knows_the_task_but_not_the_trigger(digits: Digits, reference: nn.Module) -> None:
    test, others = digits.test, digits.test.known_labels != TARGET
    with torch.inference_mode():
        right = (reference(test.images(slice(None))).argmax(dim=1) == test.known_labels).double().mean()
        fooled = (reference(SMALL.trigger(test.images(others))).argmax(dim=1) == TARGET).double().mean()
    assert float(right) >= 0.85
    assert float(fooled) <= 0.05


def test_one_that_was_trained_is_kept_for_the_work_alone(digits: Digits, tmp_path: Path) -> None:
    images, labels, told = digits.clean.images(slice(0, 64)), digits.clean.known_labels[:64], list[str]()

    def train(key: str) -> nn.Module:
        return train_reference(
            images, labels, 10, 0, Engine(), lambda what, *_: told.append(what), Checkpoints(tmp_path / "checkpoint", key)
        )

    first, again = train("this"), train("this")
    assert told == ["training a clean reference"] * 2  # steps
    with torch.inference_mode():
        assert torch.equal(first(images), again(images))
    assert not again.training
    assert not any(parameter.requires_grad for parameter in again.parameters())
    train("other")
    assert len(told) == 4
