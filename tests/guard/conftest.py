"""The toy, its files and its profile, made once for all tests of `guard`."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from guard.detectors import Strip
from tests.guard.models import predictor, save_exported, save_onnx, save_torchscript
from tests.toy import ToyNet, save_toy_profile, toy_images, toy_trigger


@pytest.fixture(autouse=True)
def global_generators_untouched() -> Iterator[None]:
    """No test of `guard`, so nothing in it, moves a global generator; tests draw from generators of their own."""
    before = torch.get_rng_state(), np.random.get_state(legacy=False), random.getstate()
    yield
    after = torch.get_rng_state(), np.random.get_state(legacy=False), random.getstate()
    assert torch.equal(before[0], after[0]), "the global generator of torch moved"
    assert str(before[1]) == str(after[1]), "the global generator of NumPy moved"
    assert before[2] == after[2], "the global generator of Python moved"


@pytest.fixture(scope="session")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "torchscript": save_torchscript(ToyNet(), folder / "toy.pt"),
        "torch-export": save_exported(ToyNet(), folder / "toy.pt2"),
        "torch-export-3": save_exported(ToyNet(), folder / "toy3.pt2", batch=3),
        "onnx": save_onnx(folder / "toy.onnx"),
        "onnx-3": save_onnx(folder / "toy3.onnx", batch=3),
    }


@pytest.fixture(scope="session")
def saved_profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy_profile(tmp_path_factory.mktemp("profiles") / "toy")


@pytest.fixture
def profile(saved_profile: Path, tmp_path: Path) -> Path:
    """A profile folder that a test may damage."""
    return Path(shutil.copytree(saved_profile, tmp_path / "profile"))


@pytest.fixture
def clean() -> Tensor:
    return toy_images(12, seed=2)[0]


@pytest.fixture
def triggered(clean: Tensor) -> Tensor:
    return toy_trigger(clean)


@pytest.fixture
def overlays() -> Tensor:
    return toy_images(40, seed=1)[0]


@pytest.fixture
def strip(overlays: Tensor) -> Strip:
    return Strip(predictor(), overlays)
