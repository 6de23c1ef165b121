"""Each method of repair, as `repair` calls it: a copy is changed in place, and what must be told of it comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import msgspec

from calibration.checkpoints import Checkpoints
from calibration.data import ImageSet, Progress, no_progress
from calibration.engine import Engine
from calibration.fine_tuning import TrainableCopy
from calibration.inspection.rounds import scan_again
from calibration.inspection.scan import ScanSettings, scan
from calibration.inspection.triggers import Triggers
from calibration.repair.batch_norm import switchable
from calibration.repair.cases import Parts
from calibration.repair.codefend import TUNING, Learnt, fine_tune_codefend
from calibration.repair.dhbe import repair_by_dhbe
from calibration.repair.dhbe_game import DhbeOutcome
from calibration.repair.dhbe_settings import Dhbe
from calibration.repair.drawn import Drawn, repair_by_drawings
from calibration.repair.exhibits import Exhibit, drawn, generated, modelled
from calibration.repair.fine_pruning import FinePruning, repair_by_fine_pruning
from calibration.repair.gdm import Gdm, repair_by_gdm
from calibration.repair.gdm_places import backdoors_of
from calibration.repair.gym import DISTILLED, PAPER, fine_tune_gym
from calibration.repair.mcr import Mcr, repair_by_mcr
from calibration.repair.nad import Nad, repair_by_nad
from calibration.repair.plain_fine_tuning import FineTuning, repair_by_fine_tuning
from calibration.repair.pruning import Pruned, Pruning, repair_by_pruning
from calibration.repair.settings import RepairSettings
from calibration.repair.tuning import Tuning
from calibration.repair.unlearning import TUNING as UNLEARNING
from calibration.repair.unlearning import repair_by_unlearning
from guard import Predictor
from guard.errors import InspectionError, RepairError
from guard.preprocessors import Gym

_FEWEST_UNLEARNING, _FEWEST_MODELLED = 200, 300  # steps of a turn, and of a tuning
_BELIEVED = "The model is believed to normalise images for itself, as neither --mean nor --std was given"


@final
@dataclass(frozen=True)
class Task:
    """What a repair has to work with.

    Attributes:
        copied: The copy, which is changed in place.
        original: The model.
        clean: Cut; of a method that learns from no images all are held out, if there are any.
        quarantined: Cut likewise; None without.
        triggers: Of the infected labels; None where the method needs none.
        settings: How.
        engine: Where.
        checkpoints: Written while it works.
        progress: Told how far it is.
    """

    copied: TrainableCopy
    original: Predictor
    clean: Parts
    quarantined: Parts | None
    triggers: Triggers | None
    settings: RepairSettings
    engine: Engine
    checkpoints: Checkpoints | None
    progress: Progress


@final
@dataclass(frozen=True)
class Outcome:
    """What came of it, besides the copy.

    Attributes:
        preprocessor: That the copy was tuned for.
        learnt: What each round of codefend learnt.
        triggers: That were unlearnt, or pruned away.
        works: Share of held-out images on which triggers that gdm modelled work on the original; of several labels the least.
        erased: What dhbe's game came to.
        exhibits: What is to be shown.
        said: In words.
    """

    preprocessor: Gym | None = None
    learnt: Sequence[Learnt] = ()
    triggers: Triggers | None = None
    works: float | None = None
    erased: DhbeOutcome | None = None
    exhibits: Sequence[Exhibit] = ()
    said: tuple[str, ...] = ()


def apply(task: Task) -> Outcome:
    """Repair the copy.

    Raises:
        RepairError: Something that the method needs is missing, or nothing can be repaired with it.
        ModelError: The model can't be trained, or not be looked into.
    """
    how, copied, original, clean = task.settings, task.copied, task.original, task.clean
    rest = (task.engine, how.seed, task.checkpoints, task.progress)
    match how.method:
        case "gym":
            tuning = _with_epochs(PAPER if how.recipe == "paper" else DISTILLED, how)
            tuned = fine_tune_gym(copied, original, clean, how.recipe, tuning, *rest)
            return Outcome(preprocessor=msgspec.structs.replace(tuned, views=how.views))
        case "codefend":
            if task.quarantined is None:
                raise RepairError(
                    "expected --quarantine DIR for codefend, which learns the trigger from it, got none: or --method gym"
                )
            return Outcome(
                learnt=fine_tune_codefend(copied, original, clean, task.quarantined, how.gan, _with_epochs(TUNING, how), *rest)
            )
        case "unlearn":
            return _unlearn(task)
        case "prune":
            pruning = Pruning(budget=min(100.0, max(0.0, how.allowed_drop)))
            pruned = repair_by_pruning(copied, original, clean, _given(task), pruning, task.engine, task.progress)
            return Outcome(triggers=_given(task), said=(_pruned(pruned, "neurons"),))
        case "gdm":
            return _unlearn_modelled(task)
        case "dhbe":
            return _erase(task)
        case "fine-prune":
            pruned = repair_by_fine_pruning(copied, original, clean, FinePruning(fine_tuning=_fine_tuning(how)), *rest)
            return Outcome(said=(_pruned(pruned, "channels of the last convolution"),))
        case "fine-tune":
            repair_by_fine_tuning(copied, original, clean, _fine_tuning(how), *rest)
        case "nad":
            repair_by_nad(copied, original, clean, Nad(teacher=_fine_tuning(how)), *rest)
        case "mcr":
            connected = repair_by_mcr(copied, original, clean, _mcr(how), *rest)
            return Outcome(
                said=(f"The model lies at {connected.point:g} of the curve from the original to a fine-tuned copy.",)
            )
    return Outcome()


def find_triggers(task: Task) -> Triggers:
    """Scan the original for triggers of infected labels, with images that the repair may see.

    Raises:
        RepairError: No label is infected.
    """
    settings = ScanSettings(search=task.settings.search, seed=task.settings.seed)
    found = infected_by_scan(task.original, task.clean, settings, task.engine, task.checkpoints, task.progress)
    if not len(found):
        raise RepairError(
            f"a scan finds no label infected, so that there is no trigger to {task.settings.method} by: look at guard scan's "
            "report, or use a method that needs none, like gym"
        )
    return found


def infected_by_scan(
    predictor: Predictor,
    clean: Parts,
    settings: ScanSettings,
    engine: Engine,
    checkpoints: Checkpoints | None = None,
    progress: Progress = no_progress,
) -> Triggers:
    """The triggers of the labels that a scan finds infected, by images that a repair may see; none if it finds none."""
    seen = ImageSet(clean.tuning.images, clean.tuning.labels)
    return scan(predictor, seen, settings, engine=engine, checkpoints=checkpoints, progress=progress).infected


def _unlearn(task: Task) -> Outcome:
    how, seen = task.settings, ImageSet(task.clean.tuning.images, task.clean.tuning.labels)
    settings = ScanSettings(search=how.search, seed=how.seed)

    said: list[str] = []

    def again(copied: TrainableCopy, before: Triggers, number: int) -> Triggers:
        try:
            return scan_again(copied, before, seen, settings, number, task.engine, task.checkpoints, task.progress)[1]
        except InspectionError as problem:  # what was unlearnt is not lost
            said.append(f"Whether further triggers are left was not found out: {problem}.")
            return before.select([])

    triggers = repair_by_unlearning(
        task.copied,
        task.original,
        task.clean,
        _given(task),
        _with_steps(UNLEARNING, how, task.clean, _FEWEST_UNLEARNING),
        task.engine,
        how.seed,
        again,
        how.rounds,
        task.checkpoints,
        task.progress,
    )
    return Outcome(
        triggers=triggers,
        said=(
            "1 recovered trigger was unlearnt." if len(triggers) == 1 else f"{len(triggers)} recovered triggers were unlearnt.",
            *said,
        ),
    )


def _unlearn_modelled(task: Task) -> Outcome:
    how, triggers = task.settings, _given(task)
    settings = how.gdm or Gdm()
    settings = msgspec.structs.replace(settings, tuning=_with_steps(settings.tuning, how, task.clean, _FEWEST_MODELLED))
    backdoors = backdoors_of(triggers, settings.margin)
    found = repair_by_gdm(
        task.copied, task.original, task.clean, backdoors, settings, task.engine, how.seed, task.checkpoints, task.progress
    )
    return Outcome(
        triggers=triggers,
        works=min(item.best for item in found),
        exhibits=[modelled(item, settings) for item in found],
        said=tuple(item.words(task.original.spec.class_names) for item in found),
    )


def _erase(task: Task) -> Outcome:
    """By drawings (ours), or as published."""
    how = task.settings
    if how.recipe == "paper" or how.dhbe is not None:
        return _erase_as_published(task)
    settings = how.drawn or Drawn.suited(task.original.spec)
    if how.epochs is not None:
        settings = msgspec.structs.replace(settings, epochs=how.epochs)
    erased = repair_by_drawings(task.copied, task.original, settings, task.engine, how.seed, task.checkpoints, task.progress)
    believed = () if task.original.spec.mean or task.original.spec.std else (f"{_BELIEVED}.",)
    return Outcome(erased=erased, exhibits=(drawn(erased),), said=(*erased.said, *believed))


def _erase_as_published(task: Task) -> Outcome:
    how, spec = task.settings, task.original.spec
    batch_norm = bool(switchable(task.copied.answers()))
    settings = how.dhbe or Dhbe.suited(spec, batch_norm)
    if how.epochs is not None:
        settings = msgspec.structs.replace(settings, epochs=how.epochs)
    erased = repair_by_dhbe(task.copied, task.original, settings, task.engine, how.seed, task.checkpoints, task.progress)
    norm = (
        "its batch norm took its statistics from the samples"
        if batch_norm and settings.batch_statistics
        else "models without batch norm that can be switched bear no more"
    )
    said = [f"The copy learnt for {settings.epochs} epochs, at first at a rate of {settings.rate:g}: {norm}."]
    if not spec.mean and not spec.std:
        mean, std = settings.pixels(spec)
        said.append(
            f"{_BELIEVED}; samples had a mean of {float(mean.mean()):g} and a standard deviation of {float(std.mean()):g}."
        )
    return Outcome(erased=erased, exhibits=(generated(erased),), said=tuple(said))


def _given(task: Task) -> Triggers:
    if task.triggers is None:
        raise RepairError(f"expected recovered triggers for {task.settings.method}, got none: pass --scan DIR")
    return task.triggers


def _with_epochs(tuning: Tuning, how: RepairSettings) -> Tuning:
    return tuning if how.epochs is None else msgspec.structs.replace(tuning, epochs=how.epochs)


def _with_steps(tuning: Tuning, how: RepairSettings, clean: Parts, fewest: int) -> Tuning:
    """With few images more epochs: a trigger is soon forgotten, and its label with it, which takes longer to learn again."""
    steps = -(-len(clean.tuning) // tuning.batch)
    return _with_epochs(msgspec.structs.replace(tuning, epochs=max(tuning.epochs, -(-fewest // steps))), how)


def _fine_tuning(how: RepairSettings) -> FineTuning:
    usual = FineTuning()
    return msgspec.structs.replace(usual, tuning=_with_epochs(usual.tuning, how))


def _mcr(how: RepairSettings) -> Mcr:
    usual = Mcr()
    bend = msgspec.structs.replace(usual.bend, tuning=_with_epochs(usual.bend.tuning, how))
    return msgspec.structs.replace(usual, end=_fine_tuning(how), bend=bend)


def _pruned(pruned: Pruned, of_what: str) -> str:
    return f"{len(pruned.channels):,} of {pruned.total:,} {of_what} were silenced."
