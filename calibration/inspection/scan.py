"""Inspection: is a model backdoored, for which labels, and with which triggers?

Neural Cleanse finds the smallest trigger for each label. Its anomaly index says which sizes are unusual; a second opinion
(`mask_verdicts`) decides which of them are a backdoor's.

Blind to: triggers that cover the image or change with it, backdoors for which an attack succeeds only from certain classes
(unless pairs are searched), and all-to-all ones, where no label is an outlier.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import final

import msgspec
import torch
from torch import Tensor

from calibration.accuracy import NEAR_CHANCE, answers, near_chance
from calibration.checkpoints import Checkpoints
from calibration.data import ImageSet, Progress, no_progress
from calibration.division import check_labels, missing_classes
from calibration.engine import Engine
from calibration.frozen import frozen
from calibration.inspection.anomaly import check_reached
from calibration.inspection.judge import Judge
from calibration.inspection.mask_verdicts import SMALL_PAIR, Look, feasible, find_masks, judge_masks
from calibration.inspection.passes import Sound
from calibration.inspection.patch_verdicts import judge_patches
from calibration.inspection.patches import PatchSearch
from calibration.inspection.record import LabelFinding, PatchFinding, ScanFigures
from calibration.inspection.search import Search
from calibration.inspection.silent_units import check_rectifiers, through_silent_units
from calibration.inspection.triggers import Goals, Triggers
from guard import Predictor
from guard.errors import InspectionError

FEWEST_IMAGES = 50
_SILENT_STEPS, _SILENT_IMAGES, _SILENT_SMALLEST = 320, 32, 0.1  # a short search will do: the way is straight
_FEWEST_COMPARED = 3  # labels
_SHOWN = 8  # images
_REACHED = {"labels": "labels", "pairs": "pairs of labels", "silent-units": "labels behind silent units"}
_MOST_SEARCHED, _MOST_HELD_OUT = 1000, 500
_HELD_OUT = 1.0 / 3.0


class ScanSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How to inspect.

    Attributes:
        search: For triggers.
        pairs: Look for triggers from each label to each other one, too.
        silent_units: Look for triggers behind units that are silent without them, too; see `silent_units`.
        patches: Look for the best patch of a few pixels, too; see `patches`.
        rounds: Of searches for further triggers of an infected label, see `rounds`; 1 for none.
        seed: Of the cut and of every draw.
    """

    search: Search = Search()
    pairs: bool = False
    silent_units: bool = False
    patches: bool = False
    rounds: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        if self.rounds < 1:
            raise InspectionError(f"expected at least one round, got {self.rounds}")


@final
@dataclass(frozen=True)
class Scan:
    """An inspection, not yet on disk.

    Attributes:
        figures: What was found.
        triggers: Of the labels, in the order of `figures.labels`.
        pair_triggers: Of the pairs, likewise; None where they were not asked for.
        settings: How.
        clean: (K, C, H, W), a few held-out images, to show triggers on.
        further_triggers: In the order of `figures.further`; None where no further rounds were asked for, or needed.
        silent_triggers: In the order of `figures.silent_units`; None where that was not asked for.
        patch_triggers: In the order of `figures.patches`; likewise.
    """

    figures: ScanFigures
    triggers: Triggers
    pair_triggers: Triggers | None
    settings: ScanSettings
    clean: Tensor
    further_triggers: Triggers | None = None
    silent_triggers: Triggers | None = None
    patch_triggers: Triggers | None = None

    @property
    def infected(self) -> Triggers:
        """The triggers of the infected labels, those behind silent units after the others, and patches after these."""
        figures, parts = self.figures, [(self.triggers, [item.infected for item in self.figures.labels])]
        if self.silent_triggers is not None:
            parts.append((self.silent_triggers, [item.infected for item in figures.silent_units]))
        if self.patch_triggers is not None:
            parts.append((self.patch_triggers, [item.infected for item in figures.patches]))
        return Triggers.together(
            [part.select([row for row, is_so in enumerate(infected) if is_so]) for part, infected in parts]
        )


def scan(
    predictor: Predictor,
    clean: ImageSet,
    settings: ScanSettings,
    *,
    engine: Engine | None = None,
    checkpoints: Checkpoints | None = None,
    progress: Progress = no_progress,
) -> Scan:
    """Inspect a model.

    Args:
        predictor: The model.
        clean: Clean images, of which equal ones count once; labels are optional, and allow the model's accuracy to be checked.
        settings: How.
        engine: Where; this machine's first device by default.
        checkpoints: Written while it works, gone on from, and removed by nobody here.
        progress: Told how far it is.

    Raises:
        InspectionError: Too few different images, answers near chance or none, or no trigger was found for most labels.
        ModelError: The model has no gradients.
    """
    started = time.monotonic()
    judge = _judge(predictor, clean, settings.seed, engine or Engine(), checkpoints, progress)
    classes, names = predictor.num_classes, clean.class_names
    if settings.silent_units:
        if classes < _FEWEST_COMPARED:
            raise InspectionError(
                f"expected a model of at least {_FEWEST_COMPARED} labels, which silent units are compared over, got {classes}: "
                "scan without --silent-units"
            )
        check_rectifiers(judge.answers, judge.searched[:1].to(judge.engine.device))
    everywhere = Look("labels", Goals.all_labels(classes), settings.search)
    found = find_masks(judge, everywhere)
    unreached = [_check_reached(everywhere, found)]
    triggers, labels = judge_masks(judge, everywhere, found, names)
    further: dict[str, tuple[Triggers, tuple[LabelFinding, ...]]] = {}
    clean_labels = torch.tensor([item.label_index for item in labels if not item.infected], dtype=torch.int64)
    patch_triggers, patches = None, tuple[PatchFinding, ...]()
    if settings.patches and len(clean_labels) >= _FEWEST_COMPARED:
        try:
            patch_triggers, patches = judge_patches(judge, Goals.of(clean_labels), PatchSearch(), names)
        except InspectionError as problem:
            if len(clean_labels) == classes:
                raise
            unreached.append(f"Of patches nothing is said: {problem}.")
    infected = {item.label_index for part in (labels, patches) for item in part if item.infected}
    clean_labels = torch.tensor([label for label in range(classes) if label not in infected], dtype=torch.int64)
    looked = [
        _not_looked_for("by patches", settings.patches, classes - sum(item.infected for item in labels)),
        _not_looked_for("behind silent units", settings.silent_units, len(clean_labels)),
    ]
    for look in _further_looks(settings, classes, clean_labels):
        look, left_out = feasible(judge, look)
        unreached.append(left_out)
        try:
            more = find_masks(judge, look)
            unreached.append(_check_reached(look, more))
            further[look.name] = judge_masks(judge, look, more, names)
            infected |= {item.label_index for item in further[look.name][1] if item.infected}
        except InspectionError as problem:
            if not infected:  # else that is known, and is not lost
                raise
            unreached.append(f"Of these nothing is said: {problem}.")
    pair_triggers, pairs = further.get("pairs", (None, ()))
    silent_triggers, silent = further.get("silent-units", (None, ()))
    everything: tuple[LabelFinding | PatchFinding, ...] = (*labels, *silent, *patches, *pairs)
    return Scan(
        ScanFigures(
            infected=any(item.infected for item in everything),
            labels=labels,
            pairs=pairs,
            silent_units=silent,
            patches=patches,
            median_l1=statistics.median(item.mask_l1 for item in labels),
            reference_agreement=judge.agreement,
            clean_images=len(judge.searched),
            held_out=len(judge.held_out),
            passes=sum(item.passes for item in everything),
            seconds=time.monotonic() - started if checkpoints is None else checkpoints.seconds,
            said=tuple(
                filter(
                    None,
                    [
                        _missing(predictor, torch.cat([judge.known, judge.own])),
                        *unreached,
                        *looked,
                        judge.thinly(),
                    ],
                )
            ),
        ),
        triggers,
        pair_triggers,
        settings,
        judge.held_out[:_SHOWN],
        silent_triggers=silent_triggers,
        patch_triggers=patch_triggers,
    )


def look_for_patches(
    predictor: Predictor, clean: ImageSet, seed: int = 0, *, engine: Engine | None = None, progress: Progress = no_progress
) -> tuple[Triggers, tuple[PatchFinding, ...]]:
    """What `scan` does with patches, alone, and of every label.

    Args:
        predictor: The model, of at least three labels.
        clean: See `scan`.
        seed: Of the cut and of every draw.
        engine: Where; this machine's first device by default.
        progress: Told how far it is.

    Raises:
        InspectionError: Too few different images or labels, or answers near chance or none.
        ModelError: The model has no gradients.
    """
    if predictor.num_classes < _FEWEST_COMPARED:
        raise InspectionError(
            f"expected a model of at least {_FEWEST_COMPARED} labels, whose patches are compared, got {predictor.num_classes}"
        )
    judge = _judge(predictor, clean, seed, engine or Engine(), None, progress)
    return judge_patches(judge, Goals.all_labels(predictor.num_classes), PatchSearch(), clean.class_names)


def _judge(
    predictor: Predictor, clean: ImageSet, seed: int, engine: Engine, checkpoints: Checkpoints | None, progress: Progress
) -> Judge:
    """With the images cut into those that are searched with and others."""
    check_labels(clean, predictor)
    to_search, held_out = _cut(_distinct(clean), seed)
    searched = to_search.images(slice(None))
    model = engine.place(Sound(frozen(predictor, searched[:2])))
    _refuse_chance(predictor, held_out)
    return Judge(
        model,
        predictor.num_classes,
        searched,
        to_search.labels,
        held_out.images(slice(None)),
        seed,
        engine,
        checkpoints,
        progress,
    )


def _further_looks(settings: ScanSettings, classes: int, clean: Tensor) -> list[Look]:
    """What else was asked for; behind silent units, of labels that seem clean so far."""
    looks, search = [], settings.search
    if settings.pairs:
        looks.append(Look("pairs", Goals.pairs(classes), search, SMALL_PAIR))
    if settings.silent_units and len(clean) >= _FEWEST_COMPARED:
        short = _through_silent_units(search)
        looks.append(Look("silent-units", Goals.of(clean), short, through=through_silent_units))
    return looks


def _through_silent_units(search: Search) -> Search:
    """From large masks: the module answers to nearly all of its pattern, and small ones show it nothing."""
    return msgspec.structs.replace(
        search,
        steps=min(search.steps, _SILENT_STEPS),
        images=max(search.images, _SILENT_IMAGES),
        start=1.0,
        smallest=_SILENT_SMALLEST,
        draws=0,
    )


def _check_reached(look: Look, found: Triggers) -> str:
    patient = "" if look.search == look.search.plain() else "--plain, "  # which keeps labels that are not reached in the batch
    hint = f"give {patient}--steps more than {look.search.steps}, or more varied images"
    return check_reached(found.sizes < found.masks[0].numel(), hint, _REACHED[look.name])


def _not_looked_for(how: str, asked: bool, labels: int) -> str:
    """What was asked for and can't be had, in words."""
    if not asked or labels >= _FEWEST_COMPARED:
        return ""
    return f"Nothing was looked for {how}: that takes {_FEWEST_COMPARED} labels that seem clean, not {labels}."


def _missing(predictor: Predictor, labels: Tensor) -> str:
    """What the images can't tell, in words."""
    missing = missing_classes(labels, predictor)
    if not missing:
        return ""
    return (
        f"The clean images hold none of {missing}: the clean reference can't tell whether these labels are easy to reach in "
        "any model. Add images of every class."
    )


def _distinct(clean: ImageSet) -> ImageSet:
    """Of equal images one: those that judge must not have been searched with."""
    found = clean.distinct()
    if len(found) < FEWEST_IMAGES:
        same = "" if len(found) == len(clean) else f" different ones among {len(clean)}"
        raise InspectionError(
            f"expected at least {FEWEST_IMAGES} clean images to scan with, got {len(found)}{same}: add images"
        )
    return found


def _cut(clean: ImageSet, seed: int) -> tuple[ImageSet, ImageSet]:
    """Images for the search, and others."""
    order = torch.randperm(len(clean), generator=torch.Generator().manual_seed(seed ^ 0x5CA))
    held_out = min(_MOST_HELD_OUT, max(1, round(_HELD_OUT * len(clean))))
    return clean.select(order[held_out : held_out + _MOST_SEARCHED]), clean.select(order[:held_out])


def _refuse_chance(predictor: Predictor, held_out: ImageSet) -> None:
    if held_out.labels is None:
        return
    right = float((answers(predictor, held_out) == held_out.known_labels).double().mean())
    if near_chance(right, predictor.num_classes):
        raise InspectionError(f"the model's answers to the clean images are near chance ({right:.1%} right): {NEAR_CHANCE}")
