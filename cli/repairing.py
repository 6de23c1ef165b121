"""A repair before calibration: `guard calibrate --repair`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, final

import torch

from cli.extras import needs
from cli.threads import settle_threads
from guard.errors import CalibrationError, InputError

if TYPE_CHECKING:
    from calibration import Hints, ImageSet, Settings
    from calibration.data import Progress
    from calibration.sources import ModelSource


@final
@dataclass(frozen=True)
class Repairing:
    """What was asked for.

    Attributes:
        method: Of the repair.
        quarantine: What the guard rejected.
        max_accuracy_drop: Points; None for the method's own.
        seed: Of the repair.
        skip_unreadable: Leave out pictures that can't be read.
    """

    method: Literal["gym", "codefend"]
    quarantine: Path | None
    max_accuracy_drop: float | None
    seed: int
    skip_unreadable: bool


def check_repair(method: Literal["gym", "codefend"] | None, quarantine: Path | None) -> None:
    """Refuse, before any work, what can't be repaired.

    Raises:
        InputError: It says what is missing.
    """
    if method is None and quarantine is not None:
        raise InputError("expected --repair with --quarantine, got none: name how, --repair codefend")
    if method == "codefend" and quarantine is None:
        raise InputError("expected --quarantine DIR for codefend, which learns the trigger from it, got none")


@final
@dataclass(frozen=True)
class RepairedFirst:
    """What a repair before calibration came to.

    Attributes:
        source: The repaired model.
        rest: The clean images that it has not seen.
        pages: What the profile keeps of it, by file name.
        skipped: Quarantined items that were left out, each with the reason.
        work: Folder of its checkpoints, to be removed once the profile is written.
    """

    source: ModelSource
    rest: ImageSet
    pages: dict[str, bytes]
    skipped: tuple[tuple[str, str], ...]
    work: Path


def repair_first(
    asked: Repairing,
    source: ModelSource,
    clean: ImageSet,
    settings: Settings,
    hints: Hints,
    out: Path,
    scratch: Path,
    progress: Progress,
) -> RepairedFirst:
    """Repair with one half of the clean images.

    Raises:
        CalibrationError: Too few images for both.
    """
    with needs("repair"):
        from calibration.data import digests
        from calibration.discovery import discover
        from calibration.engine import Engine
        from calibration.repair.cases import FEWEST_CLEAN, check_enough, load_quarantined
        from calibration.repair.record import JSON, REPORT
        from calibration.repair.settings import RepairSettings
        from calibration.repair.work import checkpoints_beside, repair_into
        from calibration.settings import check_settings
        from calibration.sources import open_model

    order = torch.randperm(len(clean), generator=torch.Generator().manual_seed(settings.seed ^ 0x4EA))
    half = len(clean) // 2
    ours, rest = clean.select(order[:half]), clean.select(order[half:])
    try:
        if half < FEWEST_CLEAN:
            raise CalibrationError(f"expected at least {FEWEST_CLEAN} images to repair with, got {half}")
        check_settings(settings, len(rest))
    except CalibrationError as error:
        raise CalibrationError(
            f"--repair takes {half} of {len(clean)} clean images for itself and leaves {len(rest)}, which is too few: {error}"
        ) from error
    predictor = discover(source.backend, ours, hints)
    settle_threads(predictor)
    suspects = (
        None
        if asked.quarantine is None
        else load_quarantined(asked.quarantine, predictor.spec.shape, skip_unreadable=asked.skip_unreadable, progress=progress)
    )
    if suspects is not None:  # what is among the other half is a false alarm, too, and must not be learnt from
        known = frozenset(digests(rest.images(slice(None))))
        suspects = replace(suspects.select(torch.nonzero(~suspects.among(known)).squeeze(1)), skipped=suspects.skipped)
    check_enough(ours, suspects)
    how = RepairSettings(
        method=asked.method,
        max_accuracy_drop=asked.max_accuracy_drop,
        allow_missing_classes=settings.allow_missing_classes,
        seed=asked.seed,
    )
    folder, work = scratch / "repaired", checkpoints_beside(out)
    rejected = None if suspects is None else suspects.images(slice(None))
    repair_into(folder, source, predictor, ours, how, rejected, Engine(), progress, work)
    pages = {"repair.json": (folder / JSON).read_bytes(), "repair.html": (folder / REPORT).read_bytes()}
    return RepairedFirst(
        open_model(str(folder), None, scratch), rest, pages, () if suspects is None else suspects.skipped, work
    )
