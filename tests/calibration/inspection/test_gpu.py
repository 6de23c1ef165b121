"""Scans on a GPU: all labels in one batch are several times as fast as one after the other, and find what a CPU finds."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from calibration.discovery import discover
from calibration.engine import Engine
from calibration.inspection.neural_cleanse import recover_triggers
from calibration.inspection.scan import ScanSettings, scan
from calibration.inspection.search import Search
from calibration.inspection.triggers import Goals
from cli.demonstration.digits import Digits
from guard.predictors import wrap
from tests.nets import SMALL

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def test_the_backdoored_label_alone_is_infected(digits: Digits, small_trigger: nn.Module) -> None:
    figures = scan(discover(wrap(small_trigger), digits.clean), digits.clean, ScanSettings()).figures
    assert [item.label_index for item in figures.labels if item.infected] == [SMALL.target_label]


def test_a_batch_of_43_labels_is_five_times_as_fast_as_one_at_a_time() -> None:
    engine, search = Engine(), Search(steps=64, window=16).plain()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for before, after in ((3, 32), (32, 64), (64, 128)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.Conv2d(after, after, 3, padding=1), nn.ReLU()]
            layers += [nn.MaxPool2d(2)]
        net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, 43)).eval().requires_grad_(False)
        images = torch.rand(500, 3, 32, 32)
    placed = engine.place(net)

    def seconds(goals: Goals) -> float:
        torch.cuda.synchronize()
        started = time.monotonic()
        recover_triggers(placed, images, goals, search, 0, engine)
        torch.cuda.synchronize()
        return time.monotonic() - started

    seconds(Goals.of(torch.tensor([0])))  # warm
    together, alone = seconds(Goals.all_labels(43)), sum(seconds(Goals.of(torch.tensor([label]))) for label in range(43))
    assert alone >= 5.0 * together
