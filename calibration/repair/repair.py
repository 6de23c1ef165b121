"""Repair: from a suspicious model, clean images and what was quarantined to a model that can be trusted more, and its figures.

The model itself never changes: a copy is tuned. A held-out part of both sets is kept from it, and measures what it came to.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import msgspec
import torch
from torch import Tensor

from calibration.accuracy import NEAR_CHANCE, near_chance
from calibration.checkpoints import Checkpoints
from calibration.data import ImageSet, Progress, digests, no_progress
from calibration.division import check_labels, missing_classes
from calibration.engine import Engine
from calibration.fine_tuning import TrainableCopy
from calibration.inspection.scan import FEWEST_IMAGES
from calibration.inspection.triggers import Triggers
from calibration.repair.cases import Part, Parts, clean_parts, quarantined_parts
from calibration.repair.codefend import Learnt
from calibration.repair.exhibits import Exhibit
from calibration.repair.measuring import known_triggers, measure, share_right
from calibration.repair.methods import Task, apply, find_triggers
from calibration.repair.record import RepairFigures
from calibration.repair.recovered import Recovered
from calibration.repair.settings import DATA_FREE, NEEDS_TRIGGERS, RepairSettings
from guard import Predictor
from guard.errors import RepairError
from guard.preprocessors import Gym

_ROUNDING = 1e-9  # of points: 0.97 - 0.94 is more than 0.03 in floating point
_EXAMPLES = 10
_USABLE = 25.0  # points: nobody wants a model that loses more


@final
@dataclass(frozen=True)
class Repaired:
    """A repaired copy, not yet on disk.

    Attributes:
        predictor: Answers with the copy.
        preprocessor: That it was tuned for; None for none.
        figures: What was measured.
        settings: How it was made.
        learnt: What each round of codefend learnt.
        images: Digests of the images that taught it or told it when to stop.
        examples: Names, and a few held-out images of each kind.
        triggers: Recovered ones that it was repaired by.
        recovered: Those that are known, whether it was repaired by them or not; None for none.
        exhibits: What else is to be shown of it.
    """

    predictor: Predictor
    preprocessor: Gym | None
    figures: RepairFigures
    settings: RepairSettings
    learnt: Sequence[Learnt] = ()
    images: frozenset[str] = frozenset()
    examples: Sequence[tuple[str, Tensor]] = ()
    triggers: Triggers | None = None
    recovered: Recovered | None = None
    exhibits: Sequence[Exhibit] = ()

    def check(self) -> None:
        """Refuse a repair that costs too much or, where no images could measure it, one that is plainly worthless.

        Raises:
            RepairError: It says how much, and how to allow it.
        """
        figures, allowed = self.figures, self.settings.allowed_drop
        if not figures.measured:
            self._check_collapse()
            return
        if figures.drop <= allowed + _ROUNDING:
            return
        before, after = figures.clean_accuracy_before, figures.clean_accuracy_after
        what = "agreement with the original" if before is None or after is None else f"{before:.1%} to {after:.1%}"
        more = "give more clean images" if self.settings.epochs is None else "give more clean images, or more --epochs"
        if self.settings.method in DATA_FREE:
            more = "give it more --epochs"
        allow = f", or allow it with --max-accuracy-drop {math.ceil(figures.drop * 10.0) / 10.0:g}"
        raise RepairError(
            f"the repair costs {figures.drop:.1f} points of clean accuracy ({what}, {figures.held_out_clean} held-out images)"
            f", more than --max-accuracy-drop {allowed:g}: {more}{allow if figures.drop <= _USABLE else ''}"
        )

    def _check_collapse(self) -> None:
        if self.figures.generated_labels == 1:
            raise RepairError(
                f"expected a copy that gives different labels, got one that gives all of {self.figures.generated_samples} "
                "generated samples the same: either it has collapsed, or these say nothing of the model; give it more "
                "--epochs, or --data to measure it by"
            )


def repair(
    predictor: Predictor,
    clean: ImageSet | None,
    settings: RepairSettings,
    quarantined: Tensor | None = None,
    *,
    triggers: Triggers | None = None,
    engine: Engine | None = None,
    checkpoints: Checkpoints | None = None,
    progress: Progress = no_progress,
) -> Repaired:
    """Repair a copy of a model.

    Args:
        predictor: The model.
        clean: Clean images; without labels, the model's own answers stand in for them. A method that learns from none does
            without; those that it gets are all held out.
        settings: How.
        quarantined: (N, C, H, W), in [0, 1], what the guard rejected; codefend learns from a part of it, the rest measures.
        triggers: Of the infected labels, as a scan recovered them; where the method needs them and there are none, the model is
            scanned with those of the images that the repair may see.
        engine: Where; this machine's first device by default.
        checkpoints: Written while it works, gone on from, and removed by nobody here.
        progress: Told how far it is.

    Returns:
        The copy and its figures; `check` refuses one that lost too much.

    Raises:
        RepairError: Too few images, or something else that the method needs is missing.
        ModelError: The model can't be trained.
    """
    started = time.monotonic()
    copied = TrainableCopy.of(predictor)
    cases, suspects = _cases(predictor, clean, quarantined, settings)
    _check_scannable(cases, settings, triggers)
    engine = engine or Engine()
    copied = copied.faster(torch.rand(2, *predictor.spec.shape, generator=torch.Generator().manual_seed(settings.seed)))
    task = Task(copied, predictor, cases, suspects, triggers, settings, engine, checkpoints, progress)
    if settings.method in NEEDS_TRIGGERS and triggers is None:
        task = replace(task, triggers=find_triggers(task))
    outcome = apply(task)
    copied.settle()
    recovered = known_triggers(task, outcome.preprocessor)
    figures = measure(task, outcome, recovered, clean is not None and clean.labels is not None)
    seconds = time.monotonic() - started if checkpoints is None else checkpoints.seconds
    seen = _learnt_from(cases, suspects if outcome.learnt else None)
    return Repaired(
        copied.predictor,
        outcome.preprocessor,
        msgspec.structs.replace(figures, seconds=seconds),
        settings,
        outcome.learnt,
        frozenset(digests(torch.cat([part.images for part in seen]))),
        [
            (name, item.held_out.images[:_EXAMPLES])
            for name, item in (("clean", cases), ("quarantined", suspects))
            if item is not None
        ],
        outcome.triggers,
        recovered,
        outcome.exhibits,
    )


def _cases(
    predictor: Predictor, clean: ImageSet | None, quarantined: Tensor | None, settings: RepairSettings
) -> tuple[Parts, Parts | None]:
    """What the repair works on, and is measured by."""
    learns = settings.method not in DATA_FREE
    if settings.method == "codefend" and quarantined is None:
        raise RepairError("expected --quarantine DIR for codefend, which learns the trigger from it, got none: or --method gym")
    if clean is None and learns:
        raise RepairError(f"expected clean images for {settings.method}, which learns from them, got none: or --method dhbe")
    if clean is None:
        cases, known = Parts.none(predictor), frozenset[str]()
    else:
        check_labels(clean, predictor)
        if learns:
            check_classes(clean, predictor, settings)
        cases = clean_parts(clean, predictor, settings.seed, learns)
        part = cases.tuning if learns else cases.held_out
        right = share_right(part.answers, part.labels)
        if near_chance(right, predictor.num_classes):
            raise RepairError(f"the model's answers to the clean images are near chance ({right:.1%} right): {NEAR_CHANCE}")
        known = frozenset(digests(clean.images(slice(None))))
    if quarantined is None:
        return cases, None
    return cases, quarantined_parts(quarantined, predictor, settings.seed, known, learns)


def _check_scannable(cases: Parts, settings: RepairSettings, triggers: Triggers | None) -> None:
    """Refuse, before any work, too few images for the scans that a method needs: unlearning scans what it has come to, too.

    Raises:
        RepairError: It says how many there must be.
    """
    if settings.method not in NEEDS_TRIGGERS or (settings.method != "unlearn" and triggers is not None):
        return
    check_scannable(cases, settings.method)


def check_scannable(cases: Parts, method: str) -> None:
    """The same, of a method that scans."""
    if len(cases.tuning) < FEWEST_IMAGES:
        needed = math.ceil(FEWEST_IMAGES * len(cases) / len(cases.tuning))
        raise RepairError(
            f"expected at least {needed} different clean images for {method}, which scans with those that are not "
            f"held out, got {len(cases)}: add images, or name a method that scans nothing, as gym"
        )


def check_classes(clean: ImageSet, predictor: Predictor, settings: RepairSettings) -> None:
    """Refuse labelled images that hold none of a class, which the copy may forget, unless the settings allow it.

    Raises:
        RepairError: It names the classes.
    """
    if clean.labels is None or settings.allow_missing_classes:
        return
    missing = missing_classes(clean.labels, predictor)
    if missing:
        raise RepairError(
            f"expected clean images of all {predictor.num_classes} classes, got none of {missing}: the copy may forget these, "
            "and nothing would show it; add some, or pass --allow-missing-classes"
        )


def _learnt_from(*sets: Parts | None) -> list[Part]:
    return [part for item in sets if item is not None for part in (item.tuning, item.stopping)]
