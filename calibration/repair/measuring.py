"""What a repair came to: figures of a copy, by images that it has not learnt from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy import special
from torch import Tensor

from calibration.division import missing_classes
from calibration.repair.cases import Part
from calibration.repair.methods import Outcome, Task
from calibration.repair.record import RepairFigures
from calibration.repair.recovered import Recovered, successes_on
from calibration.statistics import proportion
from guard import Predictor
from guard.preprocessors import Preprocessor, answer_through

_DRAWS = 4  # of a preprocessor that draws, to measure accuracy through it
_KEPT, _BY_CHANCE = 0.5, 0.01  # of a label's images, that a copy must keep; and how likely fewer may be, for any label


def known_triggers(task: Task, preprocessor: Preprocessor | None) -> Recovered | None:
    """How often the triggers that are known work on held-out images, before and after."""
    triggers, clean = task.triggers, task.clean.held_out
    if triggers is None:
        return None
    generator = torch.Generator().manual_seed(task.settings.seed)

    def after(images: Tensor) -> Tensor:
        return answer_through(task.copied.predictor, preprocessor, images, generator)

    before, left = (successes_on(of, triggers, clean.images, clean.answers.argmax(dim=1)) for of in (task.original, after))
    return Recovered(triggers, before, left)


def measure(task: Task, outcome: Outcome, recovered: Recovered | None, labelled: bool) -> RepairFigures:
    """What the copy came to; the time is not known yet.

    Args:
        task: The repair's.
        outcome: What the method made.
        recovered: See `known_triggers`.
        labelled: Whether the clean images have labels of their own.
    """
    clean, suspects, erased = task.clean.held_out, task.quarantined, outcome.erased
    works = (None, None) if recovered is None else recovered.best
    shares = _shares(
        task.copied.predictor, outcome.preprocessor, clean, None if suspects is None else suspects.held_out, task.settings.seed
    )
    agreement = shares.agreement if erased is None or len(clean) else erased.agreement
    return RepairFigures(
        clean_accuracy_before=share_right(clean.answers, clean.labels) if labelled else None,
        clean_accuracy_after=shares.right if labelled else None,
        clean_accuracy_interval=_interval(shares.right, len(clean)) if labelled and len(clean) else None,
        agreement=agreement,
        forgotten_labels=shares.forgotten,
        attack_success_seen_before=None if suspects is None else 1.0,
        attack_success_seen_after=shares.still,
        generated_triggers_work=min(
            (item.trigger_works for item in outcome.learnt if item.trigger_works is not None), default=outcome.works
        ),
        rounds=len(outcome.learnt),
        clean_images=len(task.clean),
        quarantined_images=0 if suspects is None else len(suspects),
        held_out_clean=len(clean),
        held_out_quarantined=0 if suspects is None else len(suspects.held_out),
        seconds=0.0,
        recovered_triggers=0 if outcome.triggers is None else len(outcome.triggers),
        recovered_success_before=works[0],
        recovered_success_after=works[1],
        generated_samples=0 if erased is None else erased.compared,
        generated_agreement=None if erased is None else erased.agreement,
        generated_steadiness=None if erased is None else erased.steadiness,
        generated_labels=0 if erased is None else erased.labels,
        generated_foremost=None if erased is None else erased.foremost,
        said=(*outcome.said, *_missing(task)),
    )


def forgotten(labels: Tensor, before: Tensor, after: Sequence[Tensor]) -> tuple[int, ...]:
    """Labels that a copy hardly gives any more.

    Where the original was right with one, the copy is less than half the time, and so much less often than with others that
    chance doesn't explain it.

    Args:
        labels: (N,), int64, of clean images.
        before: (N,), int64, what the original answers.
        after: (N,), int64, each, what the copy does.

    Returns:
        Those, in order.
    """
    known, every = labels == before, labels.unique().tolist()
    kept = torch.stack([answer == labels for answer in after]).double().mean(dim=0)
    usual = float(kept[known].mean())
    lost = []
    for label in every:
        own = kept[known & (labels == label)]
        by_chance = special.bdtr(round(float(own.sum())), len(own), usual) * len(every)
        if len(own) and float(own.mean()) < _KEPT and by_chance < _BY_CHANCE:
            lost.append(int(label))
    return tuple(lost)


def share_right(answers: Tensor, labels: Tensor) -> float:
    """Of answers, (N, M), those that are (N,), int64."""
    return float((answers.argmax(dim=1) == labels).double().mean())


def _missing(task: Task) -> list[str]:
    """What the images can't tell, in words."""
    parts = (task.clean.tuning, task.clean.stopping, task.clean.held_out)
    labels = torch.cat([part.labels for part in parts])
    missing = missing_classes(labels, task.original) if len(labels) else ""
    return [f"The clean images hold none of {missing}: what the copy makes of these, nothing here tells."] if missing else []


@dataclass(frozen=True)
class _Shares:
    right: float
    agreement: float
    still: float | None
    forgotten: tuple[int, ...]


def _shares(predictor: Predictor, preprocessor: Preprocessor | None, clean: Part, suspects: Part | None, seed: int) -> _Shares:
    generator = torch.Generator().manual_seed(seed)

    def answered(images: Tensor) -> Sequence[Tensor]:
        """Labels, several times over where the preprocessor draws."""
        if len(images) == 0:  # the mean of none is no number
            return [torch.empty(0, dtype=torch.int64)]
        if preprocessor is None:
            return [predictor(images).argmax(dim=1).cpu()]
        draws = [answer_through(predictor, preprocessor, images, generator) for _ in range(_DRAWS)]
        return [draw.argmax(dim=1).cpu() for draw in draws]

    def mean(answers: Sequence[Tensor], wanted: Tensor) -> float:
        return float(torch.stack([(answer == wanted).double().mean() for answer in answers]).mean())

    on_clean = answered(clean.images)
    return _Shares(
        right=mean(on_clean, clean.labels),
        agreement=mean(on_clean, clean.answers.argmax(dim=1)),
        still=None if suspects is None else mean(answered(suspects.images), suspects.labels),
        forgotten=forgotten(clean.labels, clean.answers.argmax(dim=1), on_clean),
    )


def _interval(share: float, images: int) -> tuple[float, float]:
    found = proportion(round(share * images), images)
    return found.low, found.high
