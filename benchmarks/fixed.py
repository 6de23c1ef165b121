"""Fixed settings of STRIP, each calibrated and measured on the same images of a victim.

    python -m benchmarks.fixed measure --all    # the development victims, with the defender's images alone
    python -m benchmarks.fixed table

The defender's images alone are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch

from benchmarks.datasets import Parts
from benchmarks.entry import enter
from benchmarks.plans import Plan
from benchmarks.reports import load_results, markdown, percent, run, versions
from benchmarks.roster import DEVELOPMENT
from benchmarks.strip import Probe, as_onnx, shuffled
from benchmarks.victims import CACHE, bars, victim
from calibration import BlendChoice, ImageSet, Settings, calibrate
from calibration.data import Progress
from calibration.evaluation import Evaluation, judge, summarise
from calibration.red_team import CANDIDATES
from calibration.trials import Setting
from guard.errors import InputError
from guard.predictors import Backend

_SET_ASIDE, _CLEAN, _TRIGGERED = 700, 400, 300  # overlays and threshold, then fresh images


class Fixed(msgspec.Struct, frozen=True, kw_only=True):
    """One setting, calibrated and measured.

    Attributes:
        setting: The setting.
        evaluation: Its figures.
        threshold_images: That set its thresholds.
    """

    setting: Setting
    evaluation: Evaluation
    threshold_images: int


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Fixed settings on one development victim."""

    name: str
    command: str
    plan: Plan
    fixed: list[Fixed]
    libraries: dict[str, str]


def measure_setting(backend: Backend, setting: Setting, images: ImageSet, probe: Probe, progress: Progress) -> Fixed:
    """Calibrate on some images, measure on others."""
    asked = Settings(blend=setting.blend, alpha=setting.alpha, overlays=setting.overlays, allow_missing_classes=True)
    calibration = calibrate(backend, images, asked, progress=progress)
    guard = calibration.guard()
    clean = judge(guard, probe.clean, f"clean, {setting}", progress)
    attacked = judge(guard, probe.triggered, f"triggered, {setting}", progress)
    found = summarise(clean, probe.clean.labels, attacked, probe.triggered.labels, probe.targets)
    return Fixed(setting=setting, evaluation=found, threshold_images=calibration.thresholds[0].images)


def settings(candidates: Sequence[tuple[BlendChoice, float | None]] = CANDIDATES) -> list[Setting]:
    """The fixed settings that are compared: the red team's candidates with all overlays."""
    return [Setting(blend, alpha, 100) for blend, alpha in candidates]


def measure(name: str, parts: Parts, cache: Path = CACHE) -> Report:
    """Compare settings on a development victim."""
    with bars() as progress:
        found = victim(DEVELOPMENT[name], parts, cache, progress)
        if found.attack is None:
            raise InputError(f"expected a victim, got the clean model {name}")
        backend = as_onnx(found, parts, cache)
        defender = shuffled(parts.defender, 2)
        aside, fresh = defender.select(torch.arange(_SET_ASIDE)), defender.select(torch.arange(_SET_ASIDE, _SET_ASIDE + _CLEAN))
        rest = defender.select(torch.arange(_SET_ASIDE + _CLEAN, len(defender)))
        wanted = found.attack.targets(rest.images(slice(None)), rest.known_labels)
        rows = torch.nonzero(wanted >= 0).squeeze(1)[:_TRIGGERED]
        probe = Probe.of(found.attack, fresh, rest.select(rows), wanted[rows])
        fixed = [measure_setting(backend, setting, aside, probe, progress) for setting in settings()]
    return Report(
        name=name,
        command=f"python -m benchmarks.fixed measure --name {name}",
        plan=DEVELOPMENT[name],
        fixed=fixed,
        libraries=versions(),
    )


def load_reports() -> list[Report]:
    """The committed results, in the order of `DEVELOPMENT`."""
    return load_results("fixed", list(DEVELOPMENT), Report)


def table(reports: Sequence[Report]) -> str:
    """Markdown: FAR among successful attacks, and FRR."""
    rows = []
    for row in zip(*(report.fixed for report in reports), strict=True):
        figures = [item.evaluation for item in row]
        cells = [f"FAR {percent(found.far_successful)}, FRR {found.frr.value:.1%}" for found in figures]
        rows.append([str(row[0].setting), *cells])
    return markdown(["setting", *(report.name for report in reports)], rows)


def main() -> int:
    """Run from the command line."""
    return run("fixed", __doc__, DEVELOPMENT, Report, measure, table)


if __name__ == "__main__":
    enter(main)
