"""Mode connectivity repair: a point on a curve from the backdoored model to a fine-tuned copy, along which clean loss is low.

    w(t) = (1 - t)^2 w_0 + 2 t (1 - t) b + t^2 w_1        minimise over b  E_t CE(f(x; w(t)), y),  t uniform in [0, 1]

w_0 are the weights of the model as it came or, with `both_tuned`, of another fine-tuned copy; w_1 those of a copy that is
plainly fine-tuned on clean images x, which are moved as in `plain_fine_tuning`. Clean images hold the curve to what they need;
nothing holds it to the backdoor, which neither the images know of nor, the further from w_0, the weights.

Which t: of those at which accuracy on the stopping part, as it is and moved, is within `slack` of the best, the one nearest to
the middle, which is furthest from both ends (ours); of two, the one nearer to w_1. The paper takes the middle, or a point near
it, where accuracy lets it.

Batch norm's statistics are blended like weights, and the bend is trained with them so: a few images are enough. The paper takes
new ones from clean images in the end.

References: Zhao et al., Bridging Mode Connectivity in Loss Landscapes and Adversarial Robustness, ICLR 2020, arXiv:2005.00060;
Garipov et al., Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs, arXiv:1802.10026.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import msgspec
import torch
from torch import Tensor, nn
from torch.func import functional_call

from calibration.checkpoints import Checkpoints
from calibration.data import Progress, no_progress
from calibration.engine import Engine
from calibration.fine_tuning import TrainableCopy, trainable
from calibration.repair.cases import Parts
from calibration.repair.plain_fine_tuning import FineTuning, Moves, batches, repair_by_fine_tuning
from calibration.repair.prunable import accuracy_of
from calibration.repair.tuning import Lesson, Tuning, likeness, tune
from guard import Predictor
from guard.errors import RepairError
from guard.predictors import Backend
from guard.predictors.exported import ExportedBackend
from guard.predictors.module import ModuleBackend

PAPER = Tuning(epochs=100, rate=0.01, decay=1e-4, batch=128, weight=0.0, mixed=0.0, optimizer="sgd")
"""Of the bend, in the public code."""

_SCORED = (0.25, 0.5, 0.75)
_ROUNDING = 1e-9


class Mcr(msgspec.Struct, frozen=True, kw_only=True):
    """How to look for a curve, and for a point on it.

    Attributes:
        end: How the copy is fine-tuned where the curve ends.
        bend: How the bend is trained.
        both_tuned: Let the curve begin at another fine-tuned copy, in place of the model as it came.
        points: t that may be taken.
        slack: Points of accuracy under the best of them that a point nearer to the middle may have.
    """

    end: FineTuning = FineTuning()
    bend: FineTuning = FineTuning()
    both_tuned: bool = False
    points: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    slack: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        if not self.points or not all(0.0 <= point <= 1.0 for point in self.points):
            raise RepairError(f"expected points from 0 to 1 on the curve, got {self.points}")
        if self.bend.tuning.batch_statistics:
            raise RepairError("expected a bend with fixed batch norm statistics, got batch_statistics: the curve blends them")


@final
@dataclass(frozen=True)
class Connected:
    """What was taken of the curve.

    Attributes:
        point: t.
        accuracies: Of each point that might have been: t, and accuracy on the stopping part, also moved.
    """

    point: float
    accuracies: tuple[tuple[float, float], ...]


def repair_by_mcr(
    copied: TrainableCopy,
    original: Predictor,
    clean: Parts,
    settings: Mcr,
    engine: Engine,
    seed: int,
    checkpoints: Checkpoints | None = None,
    progress: Progress = no_progress,
) -> Connected:
    """Bring a copy's weights to a point on the curve, in place.

    Args:
        copied: The copy.
        original: The model.
        clean: Cut.
        settings: How.
        engine: Where.
        seed: Of what is drawn.
        checkpoints: Written after each epoch of each training, and gone on from.
        progress: Told how far it is.

    Raises:
        ModelError: The model can't be trained.
    """
    ends = [TrainableCopy.of(copied.predictor), TrainableCopy.of(copied.predictor)]
    for number, end in enumerate(ends):
        if number == 0 and not settings.both_tuned:
            continue

        def shown(_: str, done: int, total: int, number: int = number) -> None:
            progress(f"fine-tuning end {number + 1} of the curve", done, total)

        repair_by_fine_tuning(
            end, original, clean, settings.end, engine, seed + number, checkpoints, shown, name=f"end{number}"
        )
    curve, moving = Curve.between(copied, *ends)
    train_curve(curve, moving, original, clean, settings.bend, engine, seed, checkpoints, progress)
    found = choose_point(curve, moving.predictor, original, clean, settings, seed)
    with torch.no_grad():
        weights = curve.weights(found.point)
        for name, value in _tensors(trainable(copied.predictor.backend)).items():
            value.copy_(weights[name])
    return found


@final
class Curve(nn.Module):
    """A model that answers with the weights of a point on a curve, of which the bend can be trained.

    Args:
        bend: A module, which becomes the middle of the straight line to begin with.
        start: Another of the same kind, with the weights at 0.
        end: The same, with the weights at 1.

    Attributes:
        point: t.
    """

    def __init__(self, bend: nn.Module, start: nn.Module, end: nn.Module) -> None:
        super().__init__()
        self.bend, self.point, self.training = bend, 0.5, False
        self._names = [name for name, value in _tensors(bend).items() if value.is_floating_point()]
        for place, module in (("start", start), ("end", end)):
            tensors = _tensors(module)
            for number, name in enumerate(self._names):
                self.register_buffer(f"{place}_{number}", tensors[name].detach().clone())
        with torch.no_grad():
            own = _tensors(bend)
            for number, name in enumerate(self._names):
                own[name].copy_((self.get_buffer(f"start_{number}") + self.get_buffer(f"end_{number}")) / 2.0)

    @classmethod
    def between(cls, copied: TrainableCopy, start: TrainableCopy, end: TrainableCopy) -> tuple[Curve, TrainableCopy]:
        """A curve from one copy of a model to another, and a third that answers with its points, its bend for weights."""
        bend = TrainableCopy.of(copied.predictor)
        backend = bend.predictor.backend
        curve = cls(*(trainable(part.predictor.backend) for part in (bend, start, end)))
        moving: Backend = (
            dataclasses.replace(backend, run=curve) if isinstance(backend, ExportedBackend) else ModuleBackend(curve)
        )
        return curve, TrainableCopy(dataclasses.replace(bend.predictor, backend=moving), bend.parameters)

    def weights(self, point: float) -> dict[str, Tensor]:
        """By name, of a point from 0 to 1."""
        found = _tensors(self.bend)
        for number, name in enumerate(self._names):
            start, end = self.get_buffer(f"start_{number}"), self.get_buffer(f"end_{number}")
            found[name] = (1.0 - point) ** 2 * start + 2.0 * point * (1.0 - point) * found[name] + point**2 * end
        return found

    def forward(self, batch: Tensor) -> object:
        """What the model at this point returns."""
        weights = self.weights(self.point)
        if not isinstance(self.bend, torch.jit.ScriptModule):
            return functional_call(self.bend, weights, (batch,))
        own = _tensors(self.bend)
        try:
            _put(self.bend, weights)
            return self.bend(batch)
        finally:
            _put(self.bend, own)


def train_curve(
    curve: Curve,
    moving: TrainableCopy,
    original: Predictor,
    clean: Parts,
    settings: FineTuning,
    engine: Engine,
    seed: int,
    checkpoints: Checkpoints | None = None,
    progress: Progress = no_progress,
) -> None:
    """Train a curve's bend.

    Args:
        curve: The curve.
        moving: The copy that answers with its points.
        original: The model.
        clean: Cut.
        settings: How.
        engine: Where.
        seed: Of what is drawn.
        checkpoints: Written after each epoch, and gone on from.
        progress: Told how far it is.

    Raises:
        ModelError: The model can't be trained.
    """
    tuning = settings.tuning
    moves = Moves.of(settings, original, clean.tuning)
    shown = moves.beside(clean.stopping, seed)

    def lessons(epoch: int) -> Iterator[Lesson]:
        epoch_seed = seed * 1_000_003 + epoch + 1
        points = torch.Generator().manual_seed(2 * epoch_seed + 1)
        for lesson in moves.lessons(clean.tuning, tuning.batch, epoch_seed):
            curve.point = float(torch.rand((), generator=points))
            yield lesson

    def score() -> float:
        total = 0.0
        for point in _SCORED:
            curve.point = point
            total += likeness(moving.predictor, shown.images, shown.answers, shown.labels, tuning)
        return total / len(_SCORED)

    def told(_: str, done: int, total: int) -> None:
        progress("training the curve", done, total)

    tune(moving, lessons, batches(clean.tuning, tuning.batch), tuning, engine, score, checkpoints, "curve", told)


def choose_point(curve: Curve, predictor: Predictor, original: Predictor, clean: Parts, settings: Mcr, seed: int) -> Connected:
    """The point at the top of this file; `predictor` answers with the curve's points."""
    shown = Moves.of(settings.bend, original, clean.tuning).beside(clean.stopping, seed)
    accuracies = []
    for point in settings.points:
        curve.point = point
        accuracies.append((point, accuracy_of(predictor, shown)))
    return Connected(preferred(accuracies, settings.slack), tuple(accuracies))


def preferred(accuracies: Sequence[tuple[float, float]], slack: float) -> float:
    """Of points and their accuracies, the point nearest to the middle that is at most `slack` points under the best."""
    least = max(accuracy for _, accuracy in accuracies) - slack / 100.0 - _ROUNDING
    good = [point for point, accuracy in accuracies if accuracy >= least]
    return min(good, key=lambda point: (round(abs(point - 0.5), 6), -point))


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Its weights and buffers themselves, by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _put(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Set attributes of a TorchScript module, for which there is no `functional_call`."""
    owners = dict(module.named_modules())
    for name, value in tensors.items():
        owner, _, attribute = name.rpartition(".")
        setattr(owners[owner], attribute, value)
