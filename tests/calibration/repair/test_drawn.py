"""DHBE by drawings: the loss by hand, what is refused, and a trigger that goes without any data."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor, nn

from calibration.checkpoints import Checkpoints
from calibration.engine import Engine
from calibration.fine_tuning import TrainableCopy
from calibration.repair.dhbe_game import DhbeOutcome
from calibration.repair.drawings import Drawings
from calibration.repair.drawn import Drawn, repair_by_drawings
from calibration.repair.drawn_loss import drawn_loss, patched_answers
from guard import InputSpec, Predictor
from guard.errors import ModelError, RepairError
from guard.predictors import load_backend
from tests.calibration.repair.test_dhbe import Normed, Rounding, predictor, weights
from tests.guard.models import save_exported
from tests.toy import SPEC, LearningToy

TINY = Drawn(epochs=1, iterations=2, student_steps=2, batch=8, drawings=20, search=4)


def test_the_loss_by_hand() -> None:
    wanted, patched = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 2.0]])
    loss = drawn_loss(torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, 1.0]]), wanted, patched, 2.0)
    assert float(loss) == pytest.approx((1.0 + 3.0) / 2.0 + 2.0 * 1.5 / 2.0)


def test_only_patches_of_labels_that_stand_out_are_to_be_overlooked() -> None:
    own, wanted = torch.tensor([[9.0, 7.0, 1.0]] * 2), torch.tensor([[2.0, 4.0, 6.0]] * 2)
    found = patched_answers(own, wanted, torch.tensor([0, 1]), torch.tensor([True, False, False]))
    assert found.tolist() == [[2.0, 4.0, 6.0], [2.0, 7.0, 1.0]]  # nor does another one raise such a label


class Corner(nn.Module):
    """Random units on 28x28 pixels, and one that white in a corner excites, for label 2: a backdoor made by hand."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(784, 16), nn.Linear(16, 4)
        corner = torch.zeros(28, 28)
        corner[20:26, 2:8] = 1.0 / 12.0
        with torch.no_grad():
            self.first.weight.mul_(8.0)
            self.first.weight[0], self.first.bias[0] = corner.flatten(), -1.8
            self.last.weight[:, 0] = torch.tensor([0.0, 0.0, 8.0, 0.0])
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        answers: Tensor = self.last(self.first(images.flatten(1)).relu())
        return answers


def test_the_trigger_goes_without_any_data(engine: Engine) -> None:
    original = predictor(Corner(), InputSpec(channels=1, height=28, width=28))
    copied = TrainableCopy.of(original)
    images = Drawings((1, 28, 28), 500, seed=99).stock
    images[:, :, 20:26, 2:8] *= 0.3  # none of them holds the trigger
    answers = original(images).argmax(dim=1)
    triggered = images.clone()
    triggered[:, :, 20:26, 2:8] = 1.0

    def works(of: Predictor) -> float:
        return float((of(triggered)[answers != 2].argmax(dim=1) == 2).double().mean())

    assert works(original) > 0.95
    outcome = repair_by_drawings(copied, original, Drawn(epochs=2, rate=3e-3, drawings=1000, search=200), engine, 0)
    assert works(copied.predictor) < 0.1
    assert float((copied.predictor(images).argmax(dim=1) == answers).double().mean()) > 0.9
    assert "move the original most to label 2" in outcome.said[0]
    assert outcome.labels == 4


def test_an_interrupted_training_goes_on_as_if_it_had_not_been(engine: Engine, tmp_path: Path) -> None:
    original = predictor(Normed())
    settings = msgspec.structs.replace(TINY, epochs=4, student_steps=3)
    whole, halved, resumed = (TrainableCopy.of(original) for _ in range(3))
    state, before = torch.get_rng_state(), original.backend.fingerprint()
    expected = repair_by_drawings(whole, original, settings, engine, 3)

    def interrupt(what: str, done: int, _: int) -> None:
        if done == 2 and what == "erasing backdoors":
            raise KeyboardInterrupt

    checkpoints, watched = Checkpoints(tmp_path / "checkpoint", "work"), list[int]()
    with pytest.raises(KeyboardInterrupt):
        repair_by_drawings(halved, original, settings, engine, 3, checkpoints, interrupt, watched.append)
    found = repair_by_drawings(resumed, original, settings, engine, 3, checkpoints, watch=watched.append)
    assert watched == [1, 2, 3, 4]
    for value, wanted in zip(weights(resumed), weights(whole), strict=True):
        torch.testing.assert_close(value, wanted, atol=1e-5, rtol=1e-4)
    assert found.said == expected.said
    assert torch.equal(torch.get_rng_state(), state)
    assert original.backend.fingerprint() == before
    assert any(not torch.equal(*pair) for pair in zip(weights(whole), weights(TrainableCopy.of(original)), strict=True))


class Dark(Normed):
    """One made for dark images: whatever is brighter is label 3 to it."""

    dark = 0.3

    def forward(self, images: Tensor) -> Tensor:
        bright = torch.tensor([0.0, 0.0, 0.0, 200.0]) * (images.mean(dim=(1, 2, 3)).unsqueeze(1) - self.dark)
        return super().forward(images) + bright


class Brighter(Dark):
    """One for images as bright as scenes, that are all label 3 to it as figures are; it can't tell either apart."""

    dark = -1.0


class Various(Normed):
    """One to which drawings are of all labels."""

    def forward(self, images: Tensor) -> Tensor:
        angles = 300.0 * images.mean(dim=(1, 2, 3)).unsqueeze(1) + torch.arange(4) * (torch.pi / 2.0)
        return super().forward(images) + 50.0 * angles.sin()


def test_a_model_that_cannot_tell_drawings_apart_is_not_to_be_relied_on(engine: Engine) -> None:
    def outcome(module: nn.Module) -> DhbeOutcome:
        original = predictor(module)
        return repair_by_drawings(TrainableCopy.of(original), original, TINY, engine, 0)

    doubtful, of_figures, fine = (outcome(module) for module in (Brighter(), Dark(), Various()))
    assert "The original gives 100% of the drawings label 3: they hardly resemble the images" in doubtful.said[1]
    assert doubtful.foremost == 1.0
    assert of_figures.said[1].startswith("Drawings are figures on black")
    assert len(fine.said) == 1
    assert fine.foremost is not None
    assert fine.foremost < 0.4


def test_a_model_file_can_be_repaired(tmp_path: Path, engine: Engine) -> None:
    original = Predictor(load_backend(str(save_exported(LearningToy(), tmp_path / "toy.pt2", batch=5))), SPEC, 4, "logits")
    copied = TrainableCopy.of(original)
    before = weights(copied)
    outcome = repair_by_drawings(copied, original, TINY, engine, 0)
    assert outcome.samples.shape == (16, 1, 8, 8)
    assert outcome.compared == 1024
    assert any(not torch.equal(*pair) for pair in zip(weights(copied), before, strict=True))


class Failing(Normed):
    def forward(self, images: Tensor) -> Tensor:
        if images.requires_grad:
            raise ValueError("no gradients here")
        return super().forward(images)


def test_what_can_not_be_repaired(engine: Engine) -> None:
    def attempt(module: nn.Module, spec: InputSpec = SPEC) -> None:
        original = predictor(module, spec)
        repair_by_drawings(TrainableCopy.of(original), original, TINY, engine, seed=0)

    with pytest.raises(ModelError, match="got one that takes uint8"):
        attempt(Normed(), msgspec.structs.replace(SPEC, dtype="uint8"))
    with pytest.raises(ModelError, match="expected a model that gives its input gradients"):
        attempt(Rounding())
    with pytest.raises(ModelError, match="run for gradients, on a batch of 8: ValueError: no gradients here"):
        attempt(Failing())
    with pytest.raises(RepairError, match="images of 28 to 64 pixels a side for dhbe, got 8x8"):
        Drawn.suited(SPEC)


@pytest.mark.parametrize("changes", [{"epochs": 0}, {"drawings": 0}, {"batch": 1}])
def test_settings_that_mean_nothing_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(RepairError, match=next(iter(changes))):
        msgspec.structs.replace(TINY, **changes)
