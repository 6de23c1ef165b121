"""Trainable copies: every kind that can learn learns, the original never changes, and the others are refused by name."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor

from calibration.fine_tuning import TrainableCopy, fine_tune
from guard.errors import ModelError
from guard.predictors import Backend, Predictor, load_backend, wrap
from tests.guard.models import save_exported, save_onnx, save_torchscript
from tests.toy import SPEC, LearningToy, ToyNet, toy_images

PLANTED = 3


class Softmaxed(LearningToy):
    """Returns probabilities."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).softmax(dim=1)


def _imported(folder: Path) -> Backend:
    return load_backend("tests.toy:LearningToy", None)


def _scripted(folder: Path) -> Backend:
    return load_backend(str(save_torchscript(LearningToy(), folder / "toy.pt")))


def _exported(folder: Path) -> Backend:
    return load_backend(str(save_exported(LearningToy(), folder / "toy.pt2")))


def _exported_for_batches_of_fifty(folder: Path) -> Backend:
    return load_backend(str(save_exported(LearningToy(), folder / "toy.pt2", batch=50)))


def _returning_probabilities(folder: Path) -> Backend:
    return wrap(Softmaxed())


KINDS = [_imported, _scripted, _exported, _exported_for_batches_of_fifty, _returning_probabilities]


def opened(make: Callable[[Path], Backend], folder: Path) -> Predictor:
    return Predictor(make(folder), SPEC, 4, "probabilities" if make is _returning_probabilities else "logits")


def triggered(images: Tensor) -> Tensor:
    """A white bar at the top left."""
    stamped = images.clone()
    stamped[:, :, 0, :4] = 1.0
    return stamped


def batches(_epoch: int) -> list[tuple[Tensor, Tensor]]:
    images, labels = toy_images(128)
    return [(images, labels), (triggered(images), torch.full((128,), PLANTED))]


@pytest.mark.parametrize("make", KINDS)
def test_a_copy_learns_and_the_original_does_not(tmp_path: Path, make: Callable[[Path], Backend]) -> None:
    predictor = opened(make, tmp_path)
    images, labels = toy_images(64, seed=7)
    both = torch.cat([images, triggered(images)])
    before, fingerprint = predictor(both), predictor.backend.fingerprint()
    copied = TrainableCopy.of(predictor)
    assert torch.equal(copied.predictor(both), before)
    wanted = torch.full((64,), PLANTED)
    loss = copied.loss(triggered(images), wanted).detach()
    shown: list[tuple[str, int, int]] = []
    fine_tune(copied, batches, 40, 1e-2, progress=lambda *step: shown.append(step), what="planting")
    assert copied.loss(triggered(images), wanted).detach() < loss / 4
    answers = copied.predictor(both).argmax(dim=1)
    assert (answers[64:] == PLANTED).double().mean() > 0.95 > (before[64:].argmax(dim=1) == PLANTED).double().mean()
    assert (answers[:64] == labels).double().mean() > 0.95
    assert predictor(both).numpy().tobytes() == before.numpy().tobytes()
    assert predictor.backend.fingerprint() == fingerprint
    assert shown == [("planting", epoch, 40) for epoch in range(1, 41)]


class Sure(Softmaxed):
    """Its probabilities of other answers are hardly numbers any more."""

    def forward(self, images: Tensor) -> Tensor:
        return (10.0 * LearningToy.forward(self, images)).softmax(dim=1)


def test_what_a_model_is_very_sure_of_can_be_unlearnt_whatever_it_returns() -> None:
    """The logarithm of a probability under 1e-8 had no gradient: a strong backdoor could not be unlearnt."""
    images, _ = toy_images(8)
    with torch.no_grad():
        logits = 10.0 * LearningToy()(images)
    others = logits.argmin(dim=1)
    chances = logits.softmax(dim=1).gather(1, others.unsqueeze(1))
    assert float(chances.max()) < 1e-8
    copied = TrainableCopy.of(Predictor(wrap(Sure()), SPEC, 4, "probabilities"))
    copied.loss(images, others).backward()
    assert sum(float(value.grad.norm()) for value in copied.parameters if value.grad is not None) > 1.0


def test_half_precision_and_no_numbers_are_refused() -> None:
    """Adam made them NaN, and a model of NaN answers all with label 0."""
    with pytest.raises(ModelError, match=r"expected weights in float32, got some in float16, .*use \.float\(\)"):
        TrainableCopy.of(Predictor(wrap(LearningToy().half()), SPEC, 4, "logits"))
    copied = TrainableCopy.of(Predictor(wrap(LearningToy()), SPEC, 4, "logits"))
    with torch.no_grad():
        copied.parameters[0].fill_(torch.nan)
    with pytest.raises(ModelError, match="got one whose loss is no number: check --mean"):
        fine_tune(copied, batches, 1, 1e-2)


def test_training_leaves_no_gradients_or_modes_behind() -> None:
    net = LearningToy()
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    copied = TrainableCopy.of(Predictor(wrap(net), SPEC, 4, "logits"))
    fine_tune(copied, batches, 2, 5e-3)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in net.parameters())
    assert not any(part.training for part in net.modules())
    assert len(copied.parameters) == 2


def test_a_low_loss_ends_it_and_the_progress_is_complete() -> None:
    shown: list[tuple[int, int]] = []
    copied = TrainableCopy.of(Predictor(wrap(LearningToy()), SPEC, 4, "logits"))
    fine_tune(copied, batches, 200, 5e-3, low_loss=0.2, progress=lambda _, done, total: shown.append((done, total)))
    assert len(shown) < 100
    assert shown[-1] == (200, 200)


class Detached(LearningToy):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).detach()


class Locked(LearningToy):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class Particular(LearningToy):
    def forward(self, images: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError("only for inference")
        return super().forward(images)


def predict(images: Tensor) -> object:
    return ToyNet()(images)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (ToyNet(), "got one without weights"),
        (predict, "got a model of kind callable"),
        (Locked(), "can't be copied.*lock"),
        (Detached(), "got one without gradients"),
        (Particular(), "can't be run for gradients, on a batch of [0-9]+: RuntimeError: only for inference"),
    ],
)
def test_what_cannot_be_trained_says_why(model: object, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        fine_tune(TrainableCopy.of(Predictor(wrap(model), SPEC, 4, "logits")), batches, 1, 1e-3)


def test_onnx_labels_and_numpy_are_refused(tmp_path: Path) -> None:
    logits = Predictor(wrap(LearningToy()), SPEC, 4, "logits")
    refused = {
        "a model of kind onnx": Predictor(load_backend(str(save_onnx(tmp_path / "toy.onnx"))), SPEC, 4, "logits"),
        "returns labels only": dataclasses.replace(logits, output="labels"),
        "takes NumPy arrays": dataclasses.replace(logits, spec=msgspec.structs.replace(SPEC, container="numpy")),
    }
    for message, predictor in refused.items():
        with pytest.raises(ModelError, match=f"expected a model that can be fine-tuned.*{message}"):
            TrainableCopy.of(predictor)


class Casting(LearningToy):
    """Casts what it has computed: a `torch.export` program then checks that it has the type that it saw."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).to(torch.float32) * 1.0


def test_a_program_that_insists_on_its_types_keeps_them(tmp_path: Path) -> None:
    exported = load_backend(str(save_exported(Casting(), tmp_path / "toy.pt2")))
    answers, images = TrainableCopy.of(Predictor(exported, SPEC, 4, "logits")).answers(), toy_images(8)[0]
    before = answers(images).detach()
    with torch.autocast("cpu", torch.bfloat16):
        given = images.clone().requires_grad_(True)
        answers(given).sum().backward()
        torch.testing.assert_close(answers(images).detach(), before)
    assert given.grad is not None
    assert bool(given.grad.any())
