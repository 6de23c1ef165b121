"""Fine-tuning by distillation: its loss by hand, its schedule, and what it keeps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from calibration.checkpoints import Checkpoints
from calibration.engine import Engine
from calibration.fine_tuning import TrainableCopy
from calibration.repair.tuning import Lesson, Tuning, distillation_loss, mix, tune
from guard import Predictor
from guard.errors import ModelError
from guard.predictors import wrap
from tests.toy import SPEC, LearningToy, ToyNet, toy_images

LOGITS = torch.tensor([[2.0, 0.0], [0.0, 1.0]])


def test_the_loss_by_hand() -> None:
    labels = torch.tensor([0, -1])
    own = math.log(1.0 + math.exp(-2.0)) / 2.0  # one of two images has a label
    assert float(distillation_loss(LOGITS, LOGITS, labels, 0.0, 4.0)) == pytest.approx(own)
    assert float(distillation_loss(LOGITS, LOGITS, labels, 1.0, 4.0)) == pytest.approx(0.0, abs=1e-6)
    wanted = LOGITS.flip(1)
    half = torch.tensor([math.exp(1.0), 1.0]) / (math.exp(1.0) + 1.0)  # the first image at temperature 2
    apart = [float((half.flip(0) * (half.flip(0) / half).log()).sum())]
    quarter = torch.tensor([1.0, math.exp(0.5)]) / (1.0 + math.exp(0.5))
    apart.append(float((quarter.flip(0) * (quarter.flip(0) / quarter).log()).sum()))
    assert float(distillation_loss(LOGITS, wanted, labels, 1.0, 2.0)) == pytest.approx(4.0 * sum(apart) / 2.0, rel=1e-5)
    both = float(distillation_loss(LOGITS, wanted, labels, 0.25, 2.0))
    assert both == pytest.approx(0.75 * own + 0.25 * 4.0 * sum(apart) / 2.0, rel=1e-5)


def test_mixtures_lie_between_two_images_of_the_batch() -> None:
    images = torch.arange(100, dtype=torch.float32).view(-1, 1, 1, 1) / 100
    mixed, which = mix(images, 0.7, torch.Generator().manual_seed(0))
    assert 55 <= int(which.sum()) <= 85
    assert torch.equal(mixed[~which], images[~which])
    assert float((mixed[which] - images[which]).abs().mean()) > 0.05
    assert mixed.min() >= 0
    assert mixed.max() <= 0.99
    assert not bool(mix(images, 0.0, torch.Generator())[1].any())


def trained(copied: TrainableCopy, engine: Engine, tuning: Tuning, **options: object) -> None:
    images, labels = toy_images(80)
    white = images.clone()
    white[:, :, 0, 0:2] = 1.0  # what it shall learn to answer 3 to

    def lessons(_: int) -> Iterator[Lesson]:
        for rows in torch.arange(80).split(tuning.batch):
            wanted = torch.full((len(rows),), 3)
            yield Lesson(
                torch.cat([images[rows], white[rows]]),
                torch.cat([10.0 * nn.functional.one_hot(answer, 4) for answer in (labels[rows], wanted)]),
                torch.cat([labels[rows], wanted]),
            )

    tune(copied, lessons, -(-80 // tuning.batch), tuning, engine, **{"score": lambda: 0.0, **options})  # type: ignore[arg-type]


def fresh() -> TrainableCopy:
    return TrainableCopy.of(Predictor(wrap(LearningToy()), SPEC, 4, "logits"))


def share(copied: TrainableCopy, stamp: bool) -> float:
    images, labels = toy_images(40, seed=9)
    if stamp:
        images[:, :, 0, 0:2] = 1.0
    return float((copied.predictor(images).argmax(dim=1) == (torch.full_like(labels, 3) if stamp else labels)).double().mean())


@pytest.mark.parametrize(("optimizer", "rate"), [("adamw", 1e-2), ("adadelta", 1.0), ("sgd", 1e-2)])
def test_it_learns(engine: Engine, optimizer: str, rate: float) -> None:
    copied = fresh()
    assert share(copied, stamp=True) <= 0.3
    trained(copied, engine, Tuning(epochs=25, rate=rate, optimizer=optimizer, warm_up=0.2))  # type: ignore[arg-type]
    assert share(copied, stamp=True) == 1.0
    assert share(copied, stamp=False) == 1.0


def test_it_keeps_the_weights_that_scored_best_and_stops_when_nothing_is_gained(engine: Engine) -> None:
    copied, seen, shown = fresh(), [], []

    def score() -> float:
        seen.append(copied.parameters[0].detach().clone())
        return 1.0 if len(seen) == 3 else 0.0

    trained(
        copied, engine, Tuning(epochs=30, patience=4), score=score, progress=lambda _, done, total: shown.append((done, total))
    )
    assert len(seen) == 7
    assert torch.equal(copied.parameters[0], seen[2])
    assert shown[-1] == (30, 30)


def test_another_loss_and_what_must_hold_after_each_step(engine: Engine) -> None:
    copied, steps = fresh(), []

    def loss(module: nn.Module, lesson: Lesson) -> Tensor:
        return nn.functional.cross_entropy(module(lesson.images), torch.full_like(lesson.labels, 1))

    def after_step() -> None:
        with torch.no_grad():
            copied.parameters[0][2:] = 0.0
        steps.append(copied.parameters[0].detach().clone())

    trained(copied, engine, Tuning(epochs=12, rate=1e-2), loss=loss, after_step=after_step)
    assert len(steps) == 12 * 3
    assert torch.equal(copied.parameters[0], steps[-1])
    assert not bool(copied.parameters[0][2:].any())
    assert bool(copied.parameters[0][:2].any())
    images, _ = toy_images(40, seed=9)
    images[:, :, 0, 0:2] = 1.0
    assert float((copied.predictor(images).argmax(dim=1) == 1).double().mean()) >= 0.9


def test_an_interrupted_tuning_goes_on(engine: Engine, tmp_path: Path) -> None:
    whole, halved = fresh(), fresh()
    tuning = Tuning(epochs=6, warm_up=0.3)
    trained(whole, engine, tuning)

    def interrupt(_: str, done: int, __: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    checkpoints = Checkpoints(tmp_path / "checkpoint", 1)
    with pytest.raises(KeyboardInterrupt):
        trained(halved, engine, tuning, checkpoints=checkpoints, progress=interrupt)
    resumed, epochs = fresh(), []
    trained(resumed, engine, tuning, checkpoints=checkpoints, progress=lambda _, done, __: epochs.append(done))
    assert epochs == [5, 6]
    torch.testing.assert_close(resumed.parameters[0], whole.parameters[0], atol=1e-5, rtol=1e-4)


class Normed(nn.Module):
    """Batch norm before a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.BatchNorm2d(1), nn.Linear(64, 4)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.last(self.norm(images).flatten(1))
        return out


@pytest.mark.parametrize("wanted", [False, True])
def test_batch_norm_takes_its_statistics_from_the_batches_where_that_is_asked_for(engine: Engine, wanted: bool) -> None:
    net = Normed()
    copied = TrainableCopy.of(Predictor(wrap(net), SPEC, 4, "logits"))
    trained(copied, engine, Tuning(epochs=2, batch_statistics=wanted))
    norm = copied.answers().module.norm
    assert isinstance(norm, nn.BatchNorm2d)
    assert not norm.training
    assert norm.running_mean is not None
    assert (float(norm.running_mean.abs()) > 0.01) == wanted
    assert net.norm.running_mean is not None
    assert float(net.norm.running_mean) == 0.0  # the original's


def test_a_model_without_weights_is_refused() -> None:
    with pytest.raises(ModelError, match="got one without weights"):
        TrainableCopy.of(Predictor(wrap(ToyNet()), SPEC, 4, "logits"))
