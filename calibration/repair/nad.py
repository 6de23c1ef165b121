"""Neural attention distillation: a fine-tuned copy teaches the backdoored one where to look.

The teacher is a copy that is plainly fine-tuned; the student starts as the backdoored model and learns

    loss = CE(f(t(x)), y) + beta * sum_l mean((A(F_l) - A(F_l^T))^2),   A(F) = G / |G|_2,   G = sum_c |F_c|^p

from moved clean images t(x), see `plain_fine_tuning`: an attention map A is what a layer's channels see in each place. Where a
trigger is all that the student looks at, it unlearns that, although no trigger is shown.

Layers l: in the paper, the outputs of a ResNet's groups of blocks. Here the last feature maps of each size that convolutions
give, which in a ResNet are just these, whatever the model is made of: a forward pass is watched function by function, of plain
modules as of `torch.export` programs. Inside TorchScript nothing is seen.

Reference: Li et al., Neural Attention Distillation, ICLR 2021, arXiv:2101.05930; the distance, a mean over pixels, is that of
the public code, which has beta = 5000 for the last layer alone, and 20 epochs of SGD.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import msgspec
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from calibration.checkpoints import Checkpoints
from calibration.data import Progress, no_progress
from calibration.engine import Engine
from calibration.fine_tuning import TrainableCopy, trainable
from calibration.repair.batch_norm import switchable
from calibration.repair.cases import Parts
from calibration.repair.plain_fine_tuning import FineTuning, repair_by_fine_tuning
from calibration.repair.tuning import Lesson, Loss, Tuning, distillation_loss
from guard import Predictor
from guard.errors import ModelError, RepairError

BRISK = Tuning(
    epochs=60, rate=0.05, warm_up=0.2, decay=1e-4, batch=64, weight=0.0, mixed=0.0, optimizer="sgd", batch_statistics=True
)
"""Attention holds the student back, so that at a low rate it forgets less than its teacher; the public code begins at 0.1."""

_CONVOLUTIONS = {"conv2d", "convolution", "_convolution"}


class Nad(msgspec.Struct, frozen=True, kw_only=True):
    """How to distil attention.

    Attributes:
        beta: Weight of each layer's attention distance; BackdoorBench has 500 to 1000 for three layers.
        power: p.
        teacher: How the teacher is fine-tuned.
        student: How the student is, beside the attention; None for as the teacher or, where the model has batch norm, which
            bears the rate, by `BRISK` for as many epochs.
    """

    beta: float = 1000.0
    power: float = 2.0
    teacher: FineTuning = FineTuning()
    student: FineTuning | None = None

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        if self.beta < 0.0 or self.power < 1.0:
            raise RepairError(f"expected a beta of 0 or more and a power of 1 or more, got {self.beta} and {self.power}")

    def student_of(self, module: nn.Module) -> FineTuning:
        """How a model is tuned as a student."""
        if self.student is not None:
            return self.student
        if not switchable(module):
            return self.teacher
        brisk = msgspec.structs.replace(BRISK, epochs=self.teacher.tuning.epochs)
        return msgspec.structs.replace(self.teacher, tuning=brisk)


def repair_by_nad(
    copied: TrainableCopy,
    original: Predictor,
    clean: Parts,
    settings: Nad,
    engine: Engine,
    seed: int,
    checkpoints: Checkpoints | None = None,
    progress: Progress = no_progress,
) -> None:
    """Distil attention into a copy in place.

    Args:
        copied: The copy, the student.
        original: The model.
        clean: Cut.
        settings: How.
        engine: Where.
        seed: Of what is drawn.
        checkpoints: Written after each epoch of both, and gone on from.
        progress: Told how far it is.

    Raises:
        ModelError: The model can't be trained, or has no feature maps that can be watched.
    """
    check_watchable(copied, clean.stopping.images[:2])
    teacher = TrainableCopy.of(copied.predictor)

    def shown(_: str, done: int, total: int) -> None:
        progress("fine-tuning the teacher", done, total)

    repair_by_fine_tuning(teacher, original, clean, settings.teacher, engine, seed, checkpoints, shown, name="teacher")
    student = settings.student_of(trainable(copied.predictor.backend))
    loss = attention_loss(engine.place(teacher.answers()), student.tuning, settings.beta, settings.power, engine)
    repair_by_fine_tuning(copied, original, clean, student, engine, seed, checkpoints, progress, loss=loss)


def attention_loss(teacher: nn.Module, tuning: Tuning, beta: float, power: float, engine: Engine) -> Loss:
    """The loss at the top of this file, of a student on a batch; the teacher, on the engine's device, stays as it is."""

    def loss(student: nn.Module, lesson: Lesson) -> Tensor:
        with FeatureMaps() as own:
            logits = student(lesson.images)
        with FeatureMaps() as wanted, torch.no_grad(), engine.autocast():
            teacher(lesson.images)
        distances = [
            nn.functional.mse_loss(attention(maps, power), attention(wanted.last[size], power))
            for size, maps in own.last.items()
        ]
        task = distillation_loss(logits, lesson.answers, lesson.labels, tuning.weight, tuning.temperature)
        return task + beta * torch.stack(distances).sum()

    return loss


def attention(maps: Tensor, power: float) -> Tensor:
    """(B, H W), of length 1 each: how much all channels of (B, C, H, W) together see in each place."""
    return nn.functional.normalize(maps.float().abs().pow(power).sum(dim=1).flatten(1), dim=1)


def check_watchable(copied: TrainableCopy, images: Tensor) -> None:
    """Refuse a model without feature maps that can be watched.

    Raises:
        ModelError: It says what to pass.
    """
    with FeatureMaps() as found:
        copied.answers()(images.to(copied.parameters[0].device))
    if not found.last:
        raise ModelError(
            "expected a model with convolutions that can be watched, got none that give more than one pixel: "
            "pass package.module:factory or a .pt2 file, or use another method"
        )


@final
class FeatureMaps(TorchFunctionMode):
    """Remembers, of a forward pass, the last feature maps of each size that a convolution gives.

    Attributes:
        last: (H, W) to (B, C, H, W), of more than one pixel.
    """

    def __init__(self) -> None:
        super().__init__()
        self.last: dict[tuple[int, int], Tensor] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.ndim == 4 and result[0, 0].numel() > 1:
            size = (result.shape[2], result.shape[3])
            name = getattr(func, "__name__", "").partition(".")[0]
            if size in self.last or name in _CONVOLUTIONS:
                self.last[size] = result
        return result
