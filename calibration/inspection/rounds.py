"""Several triggers for one label: find one, unlearn it in a copy, and look again.

A search finds one trigger for a label, whatever their number; the filter, pruning and unlearning know that one alone. So what
was found is unlearnt in a copy, which is then scanned for what is left, round by round.

Reference: Wang et al., Neural Cleanse, IEEE S&P 2019, section VIII.
"""

from __future__ import annotations

from dataclasses import replace

import msgspec

from calibration.checkpoints import Checkpoints
from calibration.data import ImageSet, Progress, no_progress
from calibration.engine import Engine
from calibration.fine_tuning import TrainableCopy, weights_sha256
from calibration.inspection.record import LabelFinding
from calibration.inspection.scan import Scan, ScanSettings, scan
from calibration.inspection.triggers import Triggers
from calibration.repair.cases import Part, clean_parts
from calibration.repair.unlearning import TUNING, repair_by_unlearning
from guard import Predictor
from guard.errors import InspectionError

_OBEYED = 0.5


def scan_rounds(
    predictor: Predictor,
    clean: ImageSet,
    settings: ScanSettings,
    *,
    engine: Engine | None = None,
    checkpoints: Checkpoints | None = None,
    progress: Progress = no_progress,
) -> Scan:
    """Inspect a model; of labels that are infected, look for further triggers in as many rounds as the settings allow.

    Args:
        predictor: The model.
        clean: See `scan`.
        settings: How.
        engine: Where; this machine's first device by default.
        checkpoints: Written while it works, gone on from, and removed by nobody here.
        progress: Told how far it is.

    Raises:
        InspectionError: Too few images, or answers near chance.
        ModelError: The model has no gradients.
    """
    engine = engine or Engine()
    first = scan(predictor, clean, settings, engine=engine, checkpoints=checkpoints, progress=progress)
    if settings.rounds == 1 or not len(first.infected):
        return first
    findings: list[LabelFinding] = []
    triggers: list[Triggers] = []
    passes, said = first.figures.passes, list(first.figures.said)

    def again(copied: TrainableCopy, before: Triggers, number: int) -> Triggers:
        """What is left of the labels that were infected; nothing in the last round, after which nothing is unlearnt."""
        nonlocal passes
        try:
            items, found, more = scan_again(copied, before, clean, settings, number, engine, checkpoints, progress)
        except InspectionError as problem:  # what earlier rounds found is not lost
            said.append(f"Of round {number + 1} nothing is said: {problem}.")
            triggers.append(before.select([]))
            return triggers[-1]
        passes += more
        rows = [row for row in range(len(found)) if _works(predictor, found, row, parts.held_out)]
        findings.extend(items[row] for row in rows)
        triggers.append(found.select(rows))
        what = ", ".join(str(items[row].label_index) for row in rows)
        said.append(f"Round {number + 1} found " + (f"further triggers to {what}." if rows else "no further trigger."))
        return found if number + 1 < settings.rounds else found.select([])

    if settings.patches:
        said.append("Further rounds look for masks, not for patches.")
    copied = TrainableCopy.of(predictor).faster(first.clean[:2])
    parts = clean_parts(clean, predictor, settings.seed)
    repair_by_unlearning(
        copied,
        predictor,
        parts,
        first.infected,
        TUNING,
        engine,
        settings.seed,
        again,
        settings.rounds,
        checkpoints,
        progress,
    )
    return replace(
        first,
        figures=msgspec.structs.replace(
            first.figures,
            further=tuple(findings),
            passes=passes,
            said=tuple(said),
            seconds=first.figures.seconds if checkpoints is None else checkpoints.seconds,
        ),
        further_triggers=Triggers.together(triggers),
    )


def _works(predictor: Predictor, triggers: Triggers, row: int, part: Part) -> bool:
    """Whether a trigger works on the model itself: one that only the copy obeys is none of the model's."""
    label = int(triggers.labels[row])
    others = part.images[part.answers.argmax(dim=1) != label]
    return float((predictor(triggers.put_on(row, others)).argmax(dim=1) == label).double().mean()) >= _OBEYED


def scan_again(
    copied: TrainableCopy,
    before: Triggers,
    clean: ImageSet,
    settings: ScanSettings,
    number: int,
    engine: Engine,
    checkpoints: Checkpoints | None,
    progress: Progress,
) -> tuple[list[LabelFinding], Triggers, int]:
    """What a scan of a copy, that unlearnt some triggers, finds of their labels, and the passes that it took.

    Args:
        copied: The copy.
        before: What it unlearnt.
        clean: See `scan`.
        settings: Of the first scan; this one looks at no pairs, and draws otherwise.
        number: Of rounds that are done.
        engine: Where.
        checkpoints: Of the whole work.
        progress: Told how far it is.
    """

    def shown(what: str, done: int, total: int) -> None:
        progress(f"{what}, round {number + 1}", done, total)

    alone = msgspec.structs.replace(
        settings, pairs=False, silent_units=False, patches=False, rounds=1, seed=settings.seed + number
    )
    own = None if checkpoints is None else checkpoints.within(f"round-{number + 1}", weights_sha256(copied.predictor))
    found = scan(copied.predictor, clean, alone, engine=engine, checkpoints=own, progress=shown)
    labels = set(before.labels.tolist())
    rows = [row for row, item in enumerate(found.figures.labels) if item.infected and item.label_index in labels]
    return [found.figures.labels[row] for row in rows], found.triggers.select(rows), found.figures.passes
