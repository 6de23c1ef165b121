"""What a repair refuses, before its work and after it."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import pytest
import torch

from calibration import ImageSet
from calibration.discovery import discover
from calibration.engine import Engine
from calibration.repair.repair import Repaired, repair
from calibration.repair.settings import RepairSettings
from calibration.sources import open_model
from guard import Predictor
from guard.errors import CalibrationError, ModelError, RepairError
from guard.predictors import wrap
from tests.calibration.repair.toys import factory, repaired_toy, toys
from tests.guard.models import save_onnx
from tests.toy import SPEC, LearningToy


def test_without_labels_agreement_stands_in_for_accuracy(tmp_path: Path, engine: Engine) -> None:
    _, made = repaired_toy(factory(tmp_path), tmp_path, engine, labelled=False)
    assert made.figures.clean_accuracy_before is None
    assert made.figures.clean_accuracy_after is None
    assert 0.0 < made.figures.agreement <= 1.0
    assert made.figures.drop == pytest.approx(100.0 * (1.0 - made.figures.agreement))


def test_a_repair_that_costs_too_much_is_refused_with_the_drop_and_the_option(tmp_path: Path, engine: Engine) -> None:
    _, made = repaired_toy(factory(tmp_path), tmp_path, engine)
    figures = msgspec.structs.replace(made.figures, clean_accuracy_before=0.95, clean_accuracy_after=0.9)
    dear = Repaired(made.predictor, made.preprocessor, figures, RepairSettings(method="codefend"))
    with pytest.raises(
        RepairError, match=r"costs 5\.0 points .* \(95\.0% to 90\.0%, 40 held-out.*allow it with --max-accuracy-drop 5"
    ):
        dear.check()
    Repaired(made.predictor, made.preprocessor, figures, RepairSettings(method="gym")).check()  # 12 are allowed
    with pytest.raises(RepairError, match="more than --max-accuracy-drop 4"):
        Repaired(made.predictor, None, figures, RepairSettings(method="gym", max_accuracy_drop=4.0)).check()


@pytest.mark.parametrize("images", [10, 49])
def test_too_few_images(images: int, engine: Engine, tmp_path: Path) -> None:
    source = open_model(factory(tmp_path), None, tmp_path)
    predictor = discover(source.backend, toys(60))
    with pytest.raises(RepairError, match=f"expected at least 50 clean images to repair with, got {images}"):
        repair(predictor, toys(images), RepairSettings(method="gym"), engine=engine)
    few = toys(20, seed=7).images(slice(None))
    with pytest.raises(RepairError, match="expected at least 30 quarantined images to learn the trigger from, got 20"):
        repair(predictor, toys(60), RepairSettings(method="codefend"), few, engine=engine)
    with pytest.raises(RepairError, match="expected --quarantine DIR for codefend"):
        repair(predictor, toys(60), RepairSettings(method="codefend"), engine=engine)


def test_onnx_can_not_be_repaired_and_the_error_says_what_to_pass(tmp_path: Path, engine: Engine) -> None:
    source = open_model(str(save_onnx(tmp_path / "toy.onnx", SPEC)), None, tmp_path)
    predictor = discover(source.backend, toys(60))
    with pytest.raises(
        ModelError, match=r"expected a model that can be fine-tuned \(a factory of an nn\.Module.*got a model of kind onnx"
    ):
        repair(predictor, toys(60), RepairSettings(method="gym"), engine=engine)


def test_labels_that_are_not_the_models_are_refused_before_any_work(tmp_path: Path, engine: Engine) -> None:
    source = open_model(factory(tmp_path), None, tmp_path)
    predictor = discover(source.backend, toys(60))
    settings = RepairSettings(method="gym", epochs=1)
    images = toys(80)
    only_two = ImageSet(images.pixels, images.known_labels % 2, ("south-west", "south-east"))
    with pytest.raises(CalibrationError, match="expected 4 class folders, one per output of the model, got 2"):
        repair(predictor, only_two, settings, engine=engine)
    with pytest.raises(ModelError, match="expected a model with more than 6 outputs for these labels, got 4"):
        repair(predictor, ImageSet(images.pixels, images.known_labels + 3), settings, engine=engine)
    with pytest.raises(RepairError, match=r"near chance \(0\.0% right\)"):
        repair(predictor, ImageSet(images.pixels, (images.known_labels + 1) % 4), settings, engine=engine)


class NotANumber(LearningToy):
    """Its gradients are NaN."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        answers: torch.Tensor = super().forward(images)
        return answers + 0.0 * self.learned.weight.sum().square().sqrt()


def test_a_training_that_fails_is_no_repair(engine: Engine, tmp_path: Path) -> None:
    predictor = Predictor(wrap(NotANumber()), SPEC, 4, "logits")
    with pytest.raises(ModelError, match="its loss is not a number"):
        repair(predictor, toys(120), RepairSettings(method="gym", epochs=2), engine=engine)


def test_allowances_that_are_no_points() -> None:
    with pytest.raises(RepairError, match="expected --max-accuracy-drop as points, got inf"):
        RepairSettings(method="gym", max_accuracy_drop=math.inf)


def test_three_images_of_a_hundred_are_three_points(tmp_path: Path, engine: Engine) -> None:
    _, made = repaired_toy(factory(tmp_path), tmp_path, engine)
    figures = msgspec.structs.replace(made.figures, clean_accuracy_before=0.97, clean_accuracy_after=0.94)
    Repaired(made.predictor, None, figures, RepairSettings(method="codefend")).check()


def test_images_that_are_too_small_for_codefend_are_told(engine: Engine) -> None:
    spec = msgspec.structs.replace(SPEC, height=7, width=7)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(49, 4)).eval()
    predictor = Predictor(wrap(net), spec, 4, "logits")
    images = ImageSet(torch.randint(0, 255, (120, 1, 7, 7), dtype=torch.uint8))
    with pytest.raises(RepairError, match="expected images of at least 8x8 pixels for codefend, got 7x7"):
        repair(
            predictor,
            images.select(torch.arange(80)),
            RepairSettings(method="codefend"),
            images.images(slice(80, None)),
            engine=engine,
        )
