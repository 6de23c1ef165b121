"""Repair on its own: look at the model, choose a method by what is known of its backdoor, and believe no repair unverified.

| known | methods, in this order |
|---|---|
| a scan finds infected labels | unlearn, gdm, prune; then codefend, with a quarantine; then gym |
| it finds none, but a guard rejected inputs | codefend, gym |
| nothing | gym |
| there are no clean images | dhbe |

The first one is taken that keeps to the allowed loss of accuracy, whose figures give no reason to doubt it, whose rescan finds
no label infected, and on which no recovered trigger works any more. Where there is none, the first one that figures alone speak
against is given out with what they say. A scan that finds nothing is no proof that there is nothing: it is blind to
triggers that cover the image. So `gym`, which needs to know no trigger, is the last resort.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import msgspec
from torch import Tensor

from calibration.checkpoints import Checkpoints
from calibration.data import ImageSet, Progress, no_progress
from calibration.engine import Engine
from calibration.fine_tuning import weights_sha256
from calibration.inspection.figures import label_names
from calibration.inspection.scan import ScanSettings
from calibration.inspection.triggers import Triggers
from calibration.repair.cases import Parts, clean_parts
from calibration.repair.figures import doubts
from calibration.repair.methods import infected_by_scan
from calibration.repair.record import Method, Verification
from calibration.repair.repair import Repaired, check_classes, check_scannable, repair
from calibration.repair.settings import RepairSettings
from calibration.repair.verification import LEFT, Candidate, red_team, verify
from guard import Predictor
from guard.errors import CalibrationError, CheckpointError, GuardError, InspectionError, ModelError, RepairError

_PLANTED_WORKS, _PLANTED_LEFT = 0.8, 0.2
_MOST_CAUGHT = 500
_FAILURES = (RepairError, InspectionError, CalibrationError, ModelError)  # of one method: others may do


@final
@dataclass(frozen=True)
class Choice:
    """A method that may do, and why."""

    method: Method
    why: str


def choices(infected: Sequence[str], quarantined: bool, scanned: bool = True) -> list[Choice]:
    """The methods to try, in their order.

    Args:
        infected: Names of the labels that a scan found infected.
        quarantined: Whether a guard rejected inputs that are at hand.
        scanned: Whether a scan could tell.
    """
    gym = Choice("gym", "gym needs to know no trigger: the copy is tuned for a preprocessor that breaks most of them")
    codefend = Choice("codefend", "codefend learns the trigger from what the guard rejected")
    if not infected:
        nothing = "a scan finds no label infected, which it would not for a trigger that covers the image; " if scanned else ""
        return [
            Choice(item.method, nothing + item.why if number == 0 else item.why)
            for number, item in enumerate([codefend, gym] if quarantined else [gym])
        ]
    labels = f"label {infected[0]}" if len(infected) == 1 else f"labels {', '.join(infected)}"
    found = [
        Choice("unlearn", f"a scan finds {labels} infected; unlearn removes the triggers that it recovered"),
        Choice("gdm", "gdm unlearns all triggers that work at the place of the recovered ones"),
        Choice("prune", "prune silences the neurons that the recovered triggers excite"),
    ]
    return [*found, codefend, gym] if quarantined else [*found, gym]


def repair_automatically(
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
    """Choose a method, repair with it, and verify.

    Args:
        predictor: The model.
        clean: See `repair`; without, nothing can be scanned or verified.
        settings: See `repair`; their method is what is chosen here.
        quarantined: See `repair`.
        triggers: Of infected labels, where the model was scanned already.
        engine: Where.
        checkpoints: Written while it works, gone on from, and removed by nobody here.
        progress: Told how far it is.

    Returns:
        The copy; its figures say what was tried, and `verification` what was found.

    Raises:
        RepairError: Too few images, or no method did; it says what each came to.
        ModelError: The model can't be trained.
    """
    if clean is None:
        by = _by(settings, "dhbe")
        only = repair(predictor, None, by, quarantined, engine=engine, checkpoints=checkpoints, progress=progress)
        only.check()
        return _told(only, ["Chosen automatically: there are no clean images, and dhbe needs none. Nothing was verified."])
    engine, started = engine or Engine(), time.monotonic()
    check_classes(clean, predictor, settings)
    cut = clean_parts(clean, predictor, settings.seed)
    if triggers is None:
        check_scannable(cut, "auto")
    how = ScanSettings(search=settings.search, seed=settings.seed)
    tried: list[str] = []
    if triggers is None:
        try:
            triggers = infected_by_scan(predictor, cut, how, engine, checkpoints, progress)
        except InspectionError as reason:  # others need no scan
            tried.append(f"a scan can't tell: {reason}")
    known = triggers if triggers is not None and len(triggers) else None
    labels = [] if known is None else label_names(sorted(set(known.labels.tolist())), predictor.spec.class_names)
    doubted: Repaired | None = None
    for choice in choices(labels, quarantined is not None, scanned=triggers is not None):
        own = None if checkpoints is None else checkpoints.within(choice.method)
        try:
            repaired = repair(
                predictor,
                clean,
                _by(settings, choice.method),
                quarantined,
                triggers=known,
                engine=engine,
                checkpoints=own,
                progress=progress,
            )
            repaired.check()
        except _FAILURES as reason:
            tried.append(f"{choice.method} gave up: {reason}")
            continue
        reasons = doubts(repaired.figures)
        if reasons:
            tried.append(f"{choice.method} did not do: {' '.join(reasons).rstrip('.')}")
            doubted = doubted or (None if repaired.figures.forgotten_labels else repaired)
            continue
        candidate = Candidate(repaired.predictor, repaired.preprocessor)
        try:
            found = verify(candidate, known, cut, msgspec.structs.replace(how, seed=how.seed + 1), engine, progress, own)
        except _FAILURES as reason:
            tried.append(f"{choice.method} can't be verified: {reason}")
            continue
        wrong = _wrong(found, known is not None, predictor.spec.class_names)
        if wrong:
            tried.append(f"{choice.method} did not do: {wrong}")
            continue
        found, warning = _with_red_team(found, predictor, clean, cut, _by(settings, choice.method), engine, own, progress)
        said = [f"Chosen automatically: {choice.why}.", *(f"Before, {line}." for line in tried), *warning]
        if tried:
            said.append("Held-out images chose among methods, and so speak a little too well of this one.")
        seconds = max(repaired.figures.seconds, time.monotonic() - started)  # checkpoints count the time of earlier attempts
        figures = msgspec.structs.replace(repaired.figures, verification=found, seconds=seconds)
        return _told(replace(repaired, figures=figures), said)
    if doubted is not None:
        return _told(
            doubted, ["Chosen automatically, for want of a better one.", *(f"Of those tried, {line}." for line in tried)]
        )
    raise RepairError(f"no method that was tried repairs this model: {'; '.join(tried)}; or name one of the others, as dhbe")


def _by(settings: RepairSettings, method: Method) -> RepairSettings:
    return msgspec.structs.replace(settings, method=method)


def _told(repaired: Repaired, said: Sequence[str]) -> Repaired:
    figures = repaired.figures
    return replace(repaired, figures=msgspec.structs.replace(figures, said=(*said, *figures.said)))


def _wrong(found: Verification, recovered: bool, names: Sequence[str]) -> str:
    """What speaks against a repair, in words; empty for nothing.

    Args:
        found: By verification.
        recovered: Whether there are recovered triggers.
        names: Of the labels.
    """
    if recovered and found.recovered_success is None:
        return "no image can tell whether the recovered triggers still work"
    if found.rescan_infected:
        return f"a scan of the copy finds infected {', '.join(label_names(found.rescan_infected, names))}"
    if found.recovered_success is not None and found.recovered_success[0] > LEFT:
        return f"a recovered trigger still works on {found.recovered_success[0]:.0%} of held-out images"
    return ""


def _with_red_team(
    found: Verification,
    predictor: Predictor,
    clean: ImageSet,
    cut: Parts,
    settings: RepairSettings,
    engine: Engine,
    checkpoints: Checkpoints | None,
    progress: Progress,
) -> tuple[Verification, list[str]]:
    """The same with the red team's figures, and what must be said of them."""

    def shown(what: str, done: int, total: int) -> None:
        progress(f"red team: {what}", done, total)

    failed = ""

    def again(planted: Predictor, caught: Tensor, _labels: Tensor) -> Candidate:
        nonlocal failed
        suspects = caught[:_MOST_CAUGHT] if settings.method == "codefend" else None
        own = None if checkpoints is None else checkpoints.within("red-team", weights_sha256(planted))
        try:
            repaired = repair(planted, clean, settings, suspects, engine=engine, checkpoints=own, progress=shown)
        except RepairError:  # above all, a scan that does not find the trigger: then nothing is repaired
            return Candidate(planted, None)
        except _FAILURES as reason:
            failed = str(reason)
            return Candidate(planted, None)
        try:
            repaired.check()
        except RepairError as reason:
            failed = str(reason)
        if repaired.figures.forgotten_labels:
            failed = "the copy hardly gives some label any more"
        return Candidate(repaired.predictor, repaired.preprocessor)

    progress("red team: does the same repair remove a known trigger?", 1, 1)
    try:
        name, before, after = red_team(predictor, cut, again, settings.seed, progress)
    except CheckpointError:  # which says nothing of the trigger
        raise
    except GuardError as reason:
        return found, [f"The red team could not plant a trigger: {reason}."]
    if failed:
        return found, [f"The red team tells nothing: the same repair of a copy with a planted trigger did not do: {failed}."]
    if before < _PLANTED_WORKS:
        return found, [f"The red team could not plant a trigger: a {name} worked on {before:.0%} of the images alone."]
    verified = msgspec.structs.replace(found, planted=name, planted_success_before=before, planted_success_after=after)
    if after <= _PLANTED_LEFT:
        return verified, []
    return verified, [
        f"A {name} that was planted in a copy of the model still worked on {after:.0%} of the images after the same repair "
        f"({before:.0%} before): a trigger that the scan misses would stay. Keep a guard in front of the repaired model."
    ]
