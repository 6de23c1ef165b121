"""Fine-tuning that keeps what the model knows: the original answers each clean image, the copy learns to answer alike.

    loss = (1 - w) CE(student(t(x)), y) + w T^2 KL(softmax(teacher(x) / T) || softmax(student(t(x)) / T))

t is what a repair does to an image: GYM's preprocessing, or the trigger that CoDefend's generator puts on. The images x are
clean ones and mixtures of two of them (mixup), which only the second term learns from: with a few hundred images, that is what
keeps clean accuracy.

References: Hinton et al., Distilling the Knowledge in a Neural Network, arXiv:1503.02531; Beyer et al., Knowledge distillation:
A good teacher is patient and consistent, arXiv:2106.05237; Zhang et al., mixup, arXiv:1710.09412.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal, final

import msgspec
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from calibration.checkpoints import Checkpoints
from calibration.data import Progress, no_progress
from calibration.engine import Engine
from calibration.fine_tuning import TrainableCopy
from calibration.repair.batch_norm import batch_statistics
from guard import Predictor
from guard.errors import ModelError, one_line

_AT_ONCE = 256
_MOMENTUM = 0.9


@final
@dataclass(frozen=True)
class Lesson:
    """A batch to learn from.

    Attributes:
        images: (B, C, H, W), in [0, 1]: what the copy sees.
        answers: (B, M), logits: what the original says of the images behind them.
        labels: (B,), int64: true labels; -1 where only the answers count.
    """

    images: Tensor
    answers: Tensor
    labels: Tensor


Loss = Callable[[nn.Module, Lesson], Tensor]
"""Of a module, images to logits, on a batch."""


class Tuning(msgspec.Struct, frozen=True, kw_only=True):
    """How to fine-tune.

    Attributes:
        epochs: Passes over the images, at most.
        rate: Highest learning rate; it falls linearly to 0.
        warm_up: Share of the steps in which the rate rises to its highest.
        decay: Weight decay.
        batch: Images a step.
        weight: w, of the original's answers against the labels.
        temperature: T.
        mixed: Share of the images that are mixtures of two.
        optimizer: `adamw`; `sgd`, with Nesterov's momentum of 0.9; or `adadelta` (GYM's) at a constant rate.
        patience: Epochs without a better score after which to stop.
        batch_statistics: Let batch norm take its statistics from the batches, where the model has any.
    """

    epochs: int
    rate: float = 1e-3
    warm_up: float = 0.0
    decay: float = 0.0
    batch: int = 32
    weight: float = 0.9
    temperature: float = 4.0
    mixed: float = 0.7
    optimizer: Literal["adamw", "adadelta", "sgd"] = "adamw"
    patience: int = 1_000_000
    batch_statistics: bool = False


def mix(images: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mix some images with others of the batch, in random proportion.

    Args:
        images: (B, C, H, W).
        share: Of the images that are mixed.
        generator: Draws.

    Returns:
        The images, and (B,) bool: which of them are mixtures.
    """
    mixed = torch.rand(len(images), generator=generator) < share
    own = torch.where(mixed, torch.rand(len(images), generator=generator), 1.0).view(-1, 1, 1, 1)
    others = images[torch.randperm(len(images), generator=generator)]
    return own * images + (1.0 - own) * others, mixed


def tune(
    copied: TrainableCopy,
    lessons: Callable[[int], Iterable[Lesson]],
    steps: int,
    tuning: Tuning,
    engine: Engine,
    score: Callable[[], float],
    checkpoints: Checkpoints | None = None,
    name: str = "tuning",
    progress: Progress = no_progress,
    loss: Loss | None = None,
    after_step: Callable[[], None] | None = None,
) -> None:
    """Train a copy in place; it ends with the weights that scored best.

    Args:
        copied: The copy.
        lessons: Epoch to its batches.
        steps: Batches an epoch.
        tuning: How.
        engine: Where.
        score: Of the copy as it stands, higher is better; asked after each epoch.
        checkpoints: Written after each epoch, and gone on from.
        name: Of the checkpoint.
        progress: Told how far it is.
        loss: Of a batch; `distillation_loss` by default. It runs the module that it is given once, and has its images, answers
            and labels on the engine's device.
        after_step: Called after each step: what must hold of the weights, whatever the optimizer makes of them.

    Raises:
        ModelError: The model can't be trained.
    """
    loss = loss or partial(_lesson_loss, tuning)
    answers, own = copied.answers(), _optimizer(copied.parameters, tuning)
    module, optimizer = engine.setup(answers, own)  # first: a checkpoint's state goes where the weights are then
    best = {key: value.detach().clone() for key, value in answers.state_dict().items()}
    epoch, best_score, since = 0, float("-inf"), 0
    found = None if checkpoints is None else checkpoints.load(name, {"copy": answers}, {"copy": own})
    if found is not None:
        epoch, best, facts = found
        best_score, since = facts["best_score"], int(facts["since"])
    schedule = LambdaLR(own, lambda step: _share_of_rate(step / (steps * tuning.epochs), tuning))
    schedule.last_epoch = epoch * steps
    for group in own.param_groups:  # what the scheduler does only at its next step
        group["lr"] = tuning.rate * _share_of_rate(epoch / tuning.epochs, tuning)
    while epoch < tuning.epochs and since < tuning.patience:
        with batch_statistics(answers, tuning.batch_statistics):
            for number, lesson in enumerate(lessons(epoch)):
                _step(module, optimizer, lesson, loss, engine, first=number == 0)
                schedule.step()
                if after_step is not None:
                    after_step()
        epoch += 1
        reached = engine.agree(score())
        since += 1
        if reached >= best_score:
            best_score, since = reached, 0
            best = {name: value.detach().clone() for name, value in answers.state_dict().items()}
        if checkpoints is not None:
            checkpoints.save(name, epoch, {"copy": answers}, {"copy": own}, best, {"best_score": best_score, "since": since})
        progress("fine-tuning", epoch, tuning.epochs)
    if epoch < tuning.epochs:
        progress("fine-tuning", tuning.epochs, tuning.epochs)
    if best_score == float("-inf"):
        raise ModelError(
            "the model can't be fine-tuned: its loss is not a number after every epoch; check --mean, --std, --output"
        )
    answers.load_state_dict(best)


def _optimizer(parameters: Iterable[nn.Parameter], tuning: Tuning) -> torch.optim.Optimizer:
    if tuning.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=tuning.rate, weight_decay=tuning.decay)
    if tuning.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=tuning.rate, momentum=_MOMENTUM, nesterov=True, weight_decay=tuning.decay)
    return torch.optim.Adadelta(parameters, lr=tuning.rate)


def _share_of_rate(done: float, tuning: Tuning) -> float:
    """Of the highest rate, when so much of the work is done."""
    if tuning.optimizer == "adadelta":
        return 1.0
    if done < tuning.warm_up:
        return 0.04 + 0.96 * done / tuning.warm_up
    return max(0.0, (1.0 - done) / (1.0 - tuning.warm_up))


def _step(module: nn.Module, optimizer: torch.optim.Optimizer, lesson: Lesson, loss: Loss, engine: Engine, first: bool) -> None:
    optimizer.zero_grad(set_to_none=True)
    lesson = Lesson(*(engine.share(part).to(engine.device) for part in (lesson.images, lesson.answers, lesson.labels)))
    try:
        engine.backward(loss(module, lesson))
    except ModelError:
        raise
    except Exception as error:  # foreign code
        raise ModelError(f"the model can't be fine-tuned: {one_line(error)}") from error
    if first and not any(value.grad is not None and bool(value.grad.any()) for value in module.parameters()):
        raise ModelError("expected a model that can be fine-tuned, got one whose weights get no gradients: pass its factory")
    optimizer.step()


def _lesson_loss(tuning: Tuning, module: nn.Module, lesson: Lesson) -> Tensor:
    return distillation_loss(module(lesson.images), lesson.answers, lesson.labels, tuning.weight, tuning.temperature)


def distillation_loss(logits: Tensor, wanted: Tensor, labels: Tensor, weight: float, temperature: float) -> Tensor:
    """See the top of this file, in nats.

    Args:
        logits: (B, M), of the copy.
        wanted: (B, M), of the original.
        labels: (B,), -1 for none.
        weight: w.
        temperature: T.
    """
    known = labels >= 0
    loss = logits.new_zeros(())
    if weight < 1.0 and bool(known.any()):
        own = nn.functional.cross_entropy(logits[known], labels[known], reduction="sum") / len(labels)
        loss = loss + (1.0 - weight) * own
    if weight > 0.0:
        student, teacher = (logits / temperature).log_softmax(dim=1), (wanted / temperature).log_softmax(dim=1)
        apart = nn.functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
        loss = loss + weight * temperature**2 * apart
    return loss


def likeness(predictor: Predictor, images: Tensor, wanted: Tensor, labels: Tensor, tuning: Tuning) -> float:
    """Minus the loss of a model as it stands, on images that it does not learn from: a score for `tune`.

    A loss says more about a few images than the share of right answers does.

    Args:
        predictor: The model.
        images: (N, C, H, W), in [0, 1].
        wanted: (N, M), logits of the original.
        labels: (N,), int64.
        tuning: Whose loss.
    """
    answers = torch.cat([predictor(part).cpu() for part in images.split(_AT_ONCE)]).clamp_min(1e-8).log()
    return -float(distillation_loss(answers, wanted, labels, tuning.weight, tuning.temperature))
