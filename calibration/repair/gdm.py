"""Generative distribution modelling: not one trigger of a backdoor is unlearnt, but all that work.

Whatever resembles the trigger enough works too, and a copy that unlearns one trigger still answers to the others. So triggers
are drawn from their whole distribution (see `mesa`), in the place where one was found and of the label that it leads to; and a
copy learns, on clean images with such triggers, what the original says of them without (see `tuning`).

Ours: the original's answers beside the true labels, and many more images with triggers.

Reference: Qiao et al., Defending Neural Backdoors via Generative Distribution Modeling, NeurIPS 2019,
arXiv:1910.04749, and its public code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import msgspec
import torch
from torch import Tensor

from calibration.checkpoints import Checkpoints
from calibration.data import Progress, no_progress
from calibration.engine import Engine
from calibration.fine_tuning import TrainableCopy
from calibration.repair.cases import Part, Parts, logits
from calibration.repair.mesa import Mesa, Place, Staircase, Stamp, generator_of, model_triggers
from calibration.repair.tuning import Lesson, Tuning, likeness, mix, tune
from guard import Predictor
from guard.errors import RepairError

TUNING = Tuning(epochs=30, rate=1e-3, batch=32)

_HALF = 0.5  # of a mask's largest value: what belongs to the patch
_PICTURES = 8


class Gdm(msgspec.Struct, frozen=True, kw_only=True):
    """How triggers are modelled, and unlearnt.

    Attributes:
        mesa: How they are modelled.
        share: Of the clean images, those that are shown once more with a trigger; the public code: 1%.
        tuning: Of the copy; the public code: 10 epochs of plain SGD at 1e-3, from labels alone.
    """

    mesa: Mesa = Mesa()
    share: float = 1.0
    tuning: Tuning = TUNING

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        if not 0.0 < self.share <= 1.0:
            raise RepairError(f"expected a share of the images over 0 and up to 1, got {self.share}")


@final
@dataclass(frozen=True)
class GdmOutcome:
    """What was learnt, for each level.

    Attributes:
        works: (L,), share of held-out clean images of other labels that get the target, in the original, by modelled triggers.
        still_works: (L,), the same in the repaired copy.
        triggers: (L, n, C, h, w), a few of them, in [0, 1].
    """

    works: Tensor
    still_works: Tensor
    triggers: Tensor


def repair_by_gdm(
    copied: TrainableCopy,
    original: Predictor,
    clean: Parts,
    target_label: int,
    place: Place,
    settings: Gdm,
    engine: Engine,
    seed: int,
    checkpoints: Checkpoints | None = None,
    progress: Progress = no_progress,
) -> GdmOutcome:
    """Unlearn a backdoor in place, of which only the target label and the place are known.

    Args:
        copied: The copy, not yet changed: triggers are modelled on it.
        original: Answers clean images.
        clean: Cut.
        target_label: To which label the backdoor sends images.
        place: Of its trigger, see `bounding_box`.
        settings: How.
        engine: Where.
        seed: Of what is drawn.
        checkpoints: Written now and then, and gone on from.
        progress: Told how far it is.

    Raises:
        RepairError: The place is not in the image, there is no such label, or there are no images to send there.
        ModelError: The model can't be trained.
    """
    _check(original, target_label, place)
    others, measured = (part.answers.argmax(dim=1) != target_label for part in (clean.tuning, clean.held_out))
    if not bool(others.any()) or not bool(measured.any()):
        raise RepairError(
            f"expected clean images that the model gives another label than {target_label}, got none or few: add images"
        )
    stamp = Stamp(original.spec.shape, place, settings.mesa.scattered)
    answers, images = engine.place(copied.answers()), clean.tuning.images[others]
    staircase = model_triggers(answers, images, target_label, stamp, settings.mesa, engine, seed, checkpoints, progress)
    works = staircase.success(original, clean.held_out, target_label, stamp, seed)
    _unlearn(copied, original, clean, staircase, stamp, settings, engine, seed, checkpoints, progress)
    return GdmOutcome(
        works,
        staircase.success(copied.predictor, clean.held_out, target_label, stamp, seed),
        torch.stack([staircase.sample(_PICTURES, level, generator_of(seed)) for level in range(len(settings.mesa.levels))]),
    )


def bounding_box(mask: Tensor) -> Place:
    """The smallest box around what is at least half of a mask's largest value.

    Args:
        mask: (H, W), in [0, 1].

    Raises:
        RepairError: It is empty.
    """
    if not float(mask.max()) > 0.0:
        raise RepairError("expected the mask of a trigger, got an empty one: scan the model again")
    rows, columns = torch.nonzero(mask >= _HALF * mask.max()).unbind(dim=1)
    top, left = int(rows.min()), int(columns.min())
    return top, left, int(rows.max()) - top + 1, int(columns.max()) - left + 1


def _check(original: Predictor, target_label: int, place: Place) -> None:
    (top, left, height, width), (_, rows, columns) = place, original.spec.shape
    if min(top, left) < 0 or min(height, width) < 1 or top + height > rows or left + width > columns:
        raise RepairError(f"expected a place (top, left, height, width) in an image of {rows}x{columns}, got {place}")
    if not 0 <= target_label < original.num_classes:
        raise RepairError(f"expected a target label from 0 to {original.num_classes - 1}, got {target_label}")


def _unlearn(
    copied: TrainableCopy,
    original: Predictor,
    clean: Parts,
    staircase: Staircase,
    stamp: Stamp,
    settings: Gdm,
    engine: Engine,
    seed: int,
    checkpoints: Checkpoints | None,
    progress: Progress,
) -> None:
    """Fine-tune a copy on clean images, with and without triggers."""
    part, tuning = clean.stopping, settings.tuning
    shown = torch.cat([part.images, staircase.stamped(part.images, stamp, generator_of(seed))])

    def score() -> float:
        return likeness(copied.predictor, shown, part.answers.repeat(2, 1), part.labels.repeat(2), tuning)

    tune(
        copied,
        lambda epoch: _lessons(original, clean.tuning, staircase, stamp, settings, seed * 1_000_003 + epoch + 1),
        -(-len(clean.tuning) // tuning.batch),
        tuning,
        engine,
        score,
        checkpoints,
        "gdm-tuning",
        progress,
    )


def _lessons(original: Predictor, part: Part, staircase: Staircase, stamp: Stamp, settings: Gdm, seed: int) -> Iterator[Lesson]:
    """Each batch as it is, and a share of it once more with triggers."""
    generator = torch.Generator().manual_seed(seed)
    for rows in torch.randperm(len(part), generator=generator).split(settings.tuning.batch):
        images, mixed = mix(part.images[rows], settings.tuning.mixed, generator)
        answers = part.answers[rows].clone()
        if bool(mixed.any()):
            answers[mixed] = logits(original, images[mixed])
        labels = torch.where(mixed, -1, part.labels[rows])
        some = torch.randperm(len(rows), generator=generator)[: max(1, round(settings.share * len(rows)))]
        yield Lesson(
            torch.cat([images, staircase.stamped(images[some], stamp, generator)]),
            torch.cat([answers, answers[some]]),
            torch.cat([labels, labels[some]]),
        )
