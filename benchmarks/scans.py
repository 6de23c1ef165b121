"""Scans of models, kept beside them: what several benchmarks look at is looked for once."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import torch

from benchmarks.datasets import Parts
from benchmarks.strip import shuffled
from benchmarks.victims import Victim, name_of
from calibration.attacks import SourceSpecific, TrojanNet
from calibration.data import ImageSet, Progress
from calibration.discovery import discover
from calibration.engine import Engine
from calibration.inspection.scan import ScanSettings
from calibration.inspection.work import scan_into
from guard.errors import GuardError
from guard.predictors import wrap

_IMAGES = 1500
_PLAIN = ScanSettings()


def scanned(
    found: Victim, parts: Parts, cache: Path, progress: Progress, again: bool = False, settings: ScanSettings = _PLAIN
) -> Path:
    """The folder that `guard scan` would write of a model, with 1,500 of the defender's images.

    Pairs are searched for where the attack works from some labels alone; triggers behind silent units where a module was
    inserted and, to see whether that makes false alarms, in clean models.

    Args:
        found: The model.
        parts: Its images.
        cache: Of the victims; scans lie beside it.
        progress: Told how far it is.
        again: Scan even if there is a scan already, which may be by an older search.
        settings: What else is looked for.
    """
    folder = cache.parent / "scans" / f"{name_of(found.record.plan)}{options_of(settings)}".replace(" ", "")
    if again:
        shutil.rmtree(folder, ignore_errors=True)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        clean = defenders_images(parts)
        hidden = found.attack is None or isinstance(found.attack, TrojanNet)
        settings = msgspec.structs.replace(settings, pairs=isinstance(found.attack, SourceSpecific), silent_units=hidden)
        scan_into(folder, discover(wrap(found.model), clean), clean, settings, Engine(), progress)
    return folder


def options_of(settings: ScanSettings) -> str:
    """Those of `guard scan` that benchmarks set, such as ` --rounds 3`; empty for none."""
    return " --patches" * settings.patches + f" --rounds {settings.rounds}" * (settings.rounds > 1)


def reason_of(problem: GuardError, cache: Path) -> str:
    """Why something gave up, for a committed result: without the path of this machine's cache."""
    return str(problem).replace(f"{cache.parent}/", "")


def defenders_images(parts: Parts) -> ImageSet:
    """What a scan sees."""
    return shuffled(parts.defender, 0).select(torch.arange(_IMAGES))
