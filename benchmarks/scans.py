"""Scans of victims, kept beside them: what several benchmarks look at is looked for once."""

from __future__ import annotations

from pathlib import Path

from benchmarks.datasets import Parts
from benchmarks.inspection import defenders_images
from benchmarks.victims import Victim, name_of
from calibration.data import Progress
from calibration.discovery import discover
from calibration.engine import Engine
from calibration.inspection.scan import ScanSettings
from calibration.inspection.work import scan_into
from guard.predictors import wrap


def scanned(found: Victim, parts: Parts, cache: Path, progress: Progress) -> Path:
    """The folder that `guard scan` would write of a victim, with 1,500 of the defender's images."""
    folder = cache.parent / "scans" / name_of(found.record.plan)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        clean = defenders_images(parts)
        scan_into(folder, discover(wrap(found.model), clean), clean, ScanSettings(), Engine(), progress)
    return folder
