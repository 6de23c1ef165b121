"""GYM's fine-tuning: what it is told, what it learns, and through which preprocessor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from calibration.checkpoints import Checkpoints
from calibration.data import ImageSet
from calibration.engine import Engine
from calibration.fine_tuning import TrainableCopy
from calibration.repair.cases import clean_parts
from calibration.repair.gym import Recipe, bears_flips, fine_tune_gym, lightweight
from calibration.repair.repair import repair
from calibration.repair.settings import RepairSettings
from calibration.repair.tuning import Tuning
from cli.demonstration.digits import ATTACK, Digits
from guard import Predictor
from guard.predictors import wrap
from guard.preprocessors import Gym
from tests.calibration.repair.conftest import Case
from tests.toy import SPEC as TOY
from tests.toy import LearningToy, toy_images


@pytest.mark.parametrize(("side", "kernel"), [(8, 1), (32, 1), (64, 1), (96, 3), (160, 3), (224, 5), (640, 5)])
def test_the_kernel_is_in_proportion_to_the_image(side: int, kernel: int) -> None:
    assert lightweight((3, side, side)).kernel == kernel
    assert lightweight((3, side, 2 * side), "paper") == Gym()


@pytest.mark.parametrize(("recipe", "epochs", "least", "most"), [("distilled", 30, 0.8, 0.1), ("paper", 8, 0.15, 1.0)])
def test_the_tuned_model_answers_through_its_preprocessor_and_the_trigger_hardly_works(
    case: Case, digits: Digits, engine: Engine, recipe: Recipe, epochs: int, least: float, most: float
) -> None:
    settings = RepairSettings(method="gym", recipe=recipe, epochs=epochs)
    made = repair(case.original, digits.clean, settings, case.quarantined, engine=engine)
    assert made.preprocessor == lightweight((1, 8, 8), recipe)
    generator = torch.Generator().manual_seed(3)

    def share(predictor: Predictor, images: ImageSet, wanted: torch.Tensor) -> float:
        assert made.preprocessor is not None
        shown = made.preprocessor(images.images(slice(None)), generator)
        return float((predictor(shown).argmax(dim=1) == wanted).double().mean())

    accuracy = share(made.predictor, digits.test, digits.test.known_labels)
    assert accuracy >= least
    assert accuracy >= share(case.original, digits.test, digits.test.known_labels) + 0.05
    target = torch.full_like(digits.triggered.known_labels, ATTACK.target_label)
    assert share(made.predictor, digits.triggered, target) <= most
    figures = made.figures
    assert figures.clean_accuracy_after == pytest.approx(accuracy, abs=0.12)
    assert figures.attack_success_seen_after is not None
    assert figures.attack_success_seen_after <= most + 0.15
    assert figures.generated_triggers_work is None
    assert figures.rounds == 0


class Mirrored(nn.Module):
    """Sees the same in an image and in its mirror image."""

    def __init__(self) -> None:
        super().__init__()
        self.net = LearningToy()
        self.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        both: torch.Tensor = self.net(images) + self.net(images.flip(-1))
        return both


def test_mirror_images_are_used_where_the_original_bears_them(case: Case) -> None:
    parts = clean_parts(case.clean, case.original, 0)
    assert not bears_flips(case.original, parts.tuning)  # digits
    images, labels = toy_images(80)

    both_sides = Predictor(wrap(Mirrored()), TOY, 4, "logits")
    halves = ImageSet((images * 255).round().to(torch.uint8), labels)
    assert bears_flips(both_sides, clean_parts(halves, both_sides, 0).tuning)
    one_side = Predictor(wrap(LearningToy()), TOY, 4, "logits")
    assert not bears_flips(one_side, clean_parts(halves, one_side, 0).tuning)


def test_what_another_method_has_kept_is_not_gone_on_with(case: Case, engine: Engine, tmp_path: Path) -> None:
    kept, settings = Checkpoints(tmp_path / "work", []), RepairSettings(method="gym", epochs=1)
    repair(case.original, case.clean, RepairSettings(method="fine-tune", epochs=1), engine=engine, checkpoints=kept)
    after, alone = (repair(case.original, case.clean, settings, engine=engine, checkpoints=place) for place in (kept, None))
    assert after.predictor.backend.fingerprint() == alone.predictor.backend.fingerprint()


@pytest.mark.parametrize("count", [32, 33, 34])
def test_an_interrupted_tuning_goes_on_as_if_it_had_not_been_whatever_the_last_batch(
    case: Case, engine: Engine, tmp_path: Path, count: int
) -> None:
    parts = clean_parts(case.clean, case.original, 0)
    few = replace(parts.tuning, **{name: getattr(parts.tuning, name)[:count] for name in ("images", "labels", "answers")})

    def tuned(checkpoints: Checkpoints | None, stop: int = 0) -> list[torch.Tensor]:
        def show(_: str, done: int, __: int) -> None:
            if done == stop:
                raise KeyboardInterrupt

        copied = TrainableCopy.of(case.original)
        how = Tuning(epochs=4, batch=16)
        fine_tune_gym(copied, case.original, replace(parts, tuning=few), "distilled", how, engine, 0, checkpoints, show)
        return [value.detach().clone() for value in copied.parameters]

    kept = Checkpoints(tmp_path / "work", [])
    with pytest.raises(KeyboardInterrupt):
        tuned(kept, stop=2)
    for resumed, whole in zip(tuned(kept), tuned(None), strict=True):
        torch.testing.assert_close(resumed, whole, atol=1e-6, rtol=1e-5)
