"""Generative distribution modelling: not one trigger of a backdoor is unlearnt, but all that work.

Whatever resembles the trigger enough works too, and a copy that unlearns one trigger still answers to the others. So triggers
are drawn from their whole distribution (see `mesa`), in the place where one was found and of the label that it leads to; and a
copy learns, on clean images with such triggers, what the original says of them without (see `tuning`).

Ours: the original's answers beside the true labels; many more images with triggers; triggers without the noise that modelling
puts on them, which the attacker's has not either. It is not tuned for long: a copy that goes on learning tells the modelled
triggers from the attacker's, which then works again. Several backdoors are unlearnt together: one after the other, the first
would come back while the next is unlearnt.

Reference: Qiao et al., Defending Neural Backdoors via Generative Distribution Modeling, NeurIPS 2019,
arXiv:1910.04749, and its public code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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

TUNING = Tuning(epochs=12, rate=1e-3, batch=32)

_PICTURES = 8


class Gdm(msgspec.Struct, frozen=True, kw_only=True):
    """How triggers are modelled, and unlearnt.

    Attributes:
        mesa: How they are modelled.
        margin: Share of its sides by which the box of a recovered trigger is widened all round: where one was found that works,
            the attacker's need not quite lie.
        share: Of the clean images, those that are shown once more with a trigger; the public code: 1%.
        tuning: Of the copy; the public code: 10 epochs of plain SGD at 1e-3, from labels alone.
    """

    mesa: Mesa = Mesa()
    margin: float = 0.25
    share: float = 1.0
    tuning: Tuning = TUNING

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        if not 0.0 < self.share <= 1.0:
            raise RepairError(f"expected a share of the images over 0 and up to 1, got {self.share}")
        if self.margin < 0.0:
            raise RepairError(f"expected a margin of at least 0, got {self.margin}")


@final
@dataclass(frozen=True)
class Backdoor:
    """What is known of one.

    Attributes:
        target_label: To which label it sends images.
        place: Of its trigger.
    """

    target_label: int
    place: Place


@final
@dataclass(frozen=True)
class GdmOutcome:
    """What was learnt of a backdoor, for each level.

    Attributes:
        backdoor: Which.
        works: (L,), share of held-out clean images of other labels that get the target, in the original, by modelled triggers.
        still_works: (L,), the same in the repaired copy.
        triggers: (L, n, C, h, w), a few of them, in [0, 1].
    """

    backdoor: Backdoor
    works: Tensor
    still_works: Tensor
    triggers: Tensor

    @property
    def best(self) -> float:
        """What works, of the best level."""
        return float(self.works.max())

    def words(self, names: Sequence[str] = ()) -> str:
        """What must be told of it; `names` are those of the classes."""
        label, (top, left, height, width) = self.backdoor.target_label, self.backdoor.place
        name = names[label] if label < len(names) else str(label)
        which = f"{label}" if name == str(label) else f"{label} ({name})"
        return (
            f"Label {which}: triggers were modelled in the {height}x{width} pixels from row {top}, column {left}; they worked "
            f"on {self.best:.1%} of held-out images of other labels in the original, and on "
            f"{float(self.still_works.max()):.1%} after."
        )


@final
@dataclass(frozen=True)
class _Modelled:
    """A backdoor's triggers, and how they are put on images."""

    staircase: Staircase
    stamp: Stamp


def repair_by_gdm(
    copied: TrainableCopy,
    original: Predictor,
    clean: Parts,
    backdoors: Sequence[Backdoor],
    settings: Gdm,
    engine: Engine,
    seed: int,
    checkpoints: Checkpoints | None = None,
    progress: Progress = no_progress,
) -> list[GdmOutcome]:
    """Unlearn backdoors in place, of which only the target label and the place are known.

    Args:
        copied: The copy, not yet changed: triggers are modelled on it.
        original: Answers clean images.
        clean: Cut.
        backdoors: At least one.
        settings: How.
        engine: Where.
        seed: Of what is drawn.
        checkpoints: Written now and then, and gone on from.
        progress: Told how far it is.

    Returns:
        What was learnt, in the order of the backdoors.

    Raises:
        RepairError: A place is not in the image, there is no such label, or there are no images to send there.
        ModelError: The model can't be trained.
    """
    for backdoor in backdoors:
        _check(original, clean, backdoor)
    found: list[_Modelled] = []
    for number, backdoor in enumerate(backdoors, start=1):

        def shown(what: str, done: int, total: int, more: str = "" if number == 1 else f" {number}") -> None:
            progress(what + more, done, total)

        stamp = Stamp(original.spec.shape, backdoor.place, settings.mesa.scattered)
        answers, target_label = engine.place(copied.answers()), backdoor.target_label
        images = clean.tuning.images[clean.tuning.answers.argmax(dim=1) != target_label]
        name = f"gdm-{number}"
        staircase = model_triggers(answers, images, target_label, stamp, settings.mesa, engine, seed, checkpoints, shown, name)
        found.append(_Modelled(staircase, stamp))
    _unlearn(copied, original, clean, found, settings, engine, seed, checkpoints, progress)
    return [
        _outcome(backdoor, modelled, original, copied.predictor, clean.held_out, seed)
        for backdoor, modelled in zip(backdoors, found, strict=True)
    ]


def _check(original: Predictor, clean: Parts, backdoor: Backdoor) -> None:
    place, target_label = backdoor.place, backdoor.target_label
    (top, left, height, width), (_, rows, columns) = place, original.spec.shape
    if min(top, left) < 0 or min(height, width) < 1 or top + height > rows or left + width > columns:
        raise RepairError(f"expected a place (top, left, height, width) in an image of {rows}x{columns}, got {place}")
    if not 0 <= target_label < original.num_classes:
        raise RepairError(f"expected a target label from 0 to {original.num_classes - 1}, got {target_label}")
    if any(not bool((part.answers.argmax(dim=1) != target_label).any()) for part in (clean.tuning, clean.held_out)):
        raise RepairError(
            f"expected clean images that the model gives another label than {target_label}, got none or few: add images"
        )


def _outcome(
    backdoor: Backdoor, modelled: _Modelled, original: Predictor, repaired: Predictor, held_out: Part, seed: int
) -> GdmOutcome:
    staircase, stamp, label = modelled.staircase, modelled.stamp, backdoor.target_label
    levels = range(len(staircase.generators))
    return GdmOutcome(
        backdoor,
        staircase.success(original, held_out, label, stamp, seed),
        staircase.success(repaired, held_out, label, stamp, seed),
        torch.stack([staircase.sample(_PICTURES, level, generator_of(seed)) for level in levels]),
    )


def _unlearn(
    copied: TrainableCopy,
    original: Predictor,
    clean: Parts,
    modelled: Sequence[_Modelled],
    settings: Gdm,
    engine: Engine,
    seed: int,
    checkpoints: Checkpoints | None,
    progress: Progress,
) -> None:
    """Fine-tune a copy on clean images, with and without triggers."""
    part, tuning = clean.stopping, settings.tuning
    taught = [replace(item, staircase=replace(item.staircase, blur=0.0)) for item in modelled]
    shown = torch.cat([part.images, *(item.staircase.stamped(part.images, item.stamp, generator_of(seed)) for item in taught)])
    times = 1 + len(taught)

    def score() -> float:
        return likeness(copied.predictor, shown, part.answers.repeat(times, 1), part.labels.repeat(times), tuning)

    tune(
        copied,
        lambda epoch: _lessons(original, clean.tuning, taught, settings, seed * 1_000_003 + epoch + 1),
        -(-len(clean.tuning) // tuning.batch),
        tuning,
        engine,
        score,
        checkpoints,
        "gdm-tuning",
        progress,
    )


def _lessons(original: Predictor, part: Part, taught: Sequence[_Modelled], settings: Gdm, seed: int) -> Iterator[Lesson]:
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
            torch.cat([images, _with_triggers(images[some], taught, generator)]),
            torch.cat([answers, answers[some]]),
            torch.cat([labels, labels[some]]),
        )


def _with_triggers(images: Tensor, taught: Sequence[_Modelled], generator: torch.Generator) -> Tensor:
    """Each image, (B, C, H, W), with a trigger of one of the backdoors."""
    which = torch.randint(len(taught), (len(images),), generator=generator)
    stamped = images.clone()
    for number, item in enumerate(taught):
        rows = which == number
        if bool(rows.any()):
            stamped[rows] = item.staircase.stamped(images[rows], item.stamp, generator)
    return stamped
