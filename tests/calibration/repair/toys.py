"""The toy as a model that can be repaired, its images, and a repair of it that takes a moment."""

from __future__ import annotations

from pathlib import Path

import torch

from calibration import Hints, ImageSet
from calibration.discovery import discover
from calibration.engine import Engine
from calibration.repair.repair import Repaired, repair
from calibration.repair.settings import RepairSettings
from calibration.sources import ModelSource, open_model
from tests.guard.models import save_exported
from tests.toy import LearningToy, toy_images


def factory(folder: Path) -> str:
    return "tests.toy:LearningToy"


def exported(folder: Path) -> str:
    return str(save_exported(LearningToy(), folder / "toy.pt2"))


def toys(count: int, labelled: bool = True, seed: int = 0) -> ImageSet:
    images, labels = toy_images(count, seed=seed)
    return ImageSet((images * 255).round().to(torch.uint8), labels if labelled else None)


def repaired_toy(name: str, folder: Path, engine: Engine, labelled: bool = True) -> tuple[ModelSource, Repaired]:
    """Tuned for GYM, for a moment."""
    source = open_model(name, None, folder)
    clean = toys(200, labelled)
    settings = RepairSettings(method="gym", epochs=2, max_accuracy_drop=100.0)
    predictor = discover(source.backend, clean, Hints(mean=(0.1,), std=(0.9,)))
    return source, repair(predictor, clean, settings, engine=engine)
