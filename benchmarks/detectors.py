"""Every detector on the same victims: how well it separates, what it misses at a false rejection rate of 1%, what it costs.

    python -m benchmarks.detectors measure --name gtsrb-b    # one victim, trained if it is not cached
    python -m benchmarks.detectors measure --all
    python -m benchmarks.detectors table                     # the committed results as docs/methods.md holds them

Each detector stands alone. Overlays, neurons and thresholds are of the defender's images, the filter's trigger is what a scan
of 1,500 of them found, and every figure is of the evaluation part. Where such a scan finds one trigger of two, or none, the
filter is tried again by a scan with the option for such triggers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch

from benchmarks.datasets import Parts
from benchmarks.entry import enter
from benchmarks.plans import Plan
from benchmarks.reports import load_results, markdown, percent, run, versions
from benchmarks.roster import DETECTED
from benchmarks.scans import options_of, reason_of, scanned
from benchmarks.strip import Probe, as_onnx, evaluation_images, shuffled
from benchmarks.victims import CACHE, Victim, bars, victim
from calibration import Calibration, Settings, calibrate
from calibration.data import Progress
from calibration.evaluation import judge, summarise
from calibration.filters import infected_triggers
from calibration.inspection.scan import ScanSettings
from calibration.statistics import Estimate, proportion
from calibration.thresholds import set_threshold
from guard.detectors.strip import STAGE_ROWS
from guard.errors import CalibrationError, InputError, InspectionError
from guard.predictors import wrap

DETECTORS = ("strip", "feature-squeezing", "activation-filter")
BETTER_SCANS: Mapping[str, ScanSettings] = {
    "cifar10-two-triggers": ScanSettings(rounds=3),
    "cifar10-trojan-sq": ScanSettings(patches=True),
}
"""For another filter, by the victim's name."""

PAPER_FRR = 0.05
"""Of Neural Cleanse's Table III, at which its filter misses 1.63% of BadNets' triggers at most."""

_DEFENDERS = 5_000
_CLEAN, _TRIGGERED = 5_000, 1_000


class Detected(msgspec.Struct, frozen=True, kw_only=True):
    """One detector.

    Attributes:
        detector: Which; the filter with its scan's options.
        gave_up: Why it can't be set up; empty where it can. What follows is None then.
        auroc: Of its score, clean against successfully attacked.
        frr: At a threshold for 1%.
        far: Triggered images accepted, among successful attacks, there.
        far_at_paper_rate: The same at a threshold for 5%.
        passes: Of a clean image, curtailed.
    """

    detector: str
    gave_up: str = ""
    auroc: Estimate | None = None
    frr: Estimate | None = None
    far: Estimate | None = None
    far_at_paper_rate: Estimate | None = None
    passes: float | None = None


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One victim.

    Attributes:
        name: Of the victim.
        command: That made this.
        plan: What was trained.
        attack_success: On the images that detectors are measured on.
        detected: By each detector.
        libraries: Versions.
    """

    name: str
    command: str
    plan: Plan
    attack_success: Estimate
    detected: tuple[Detected, ...]
    libraries: dict[str, str]

    def of(self, detector: str) -> Detected:
        """One of the detectors."""
        return next(item for item in self.detected if item.detector == detector)


def measure(name: str, parts: Parts, cache: Path = CACHE) -> Report:
    """Measure one victim."""
    plan = DETECTED[name]
    with bars() as progress:
        found = victim(plan, parts, cache, progress)
        if found.attack is None:
            raise InputError(f"expected a victim, got the clean model {name}")
        probe = evaluation_images(found, parts, _CLEAN, _TRIGGERED)
        detected = []
        success: Estimate | None = None
        tried = [(detector, ScanSettings()) for detector in DETECTORS]
        if name in BETTER_SCANS:
            tried.append((f"activation-filter, scan{options_of(BETTER_SCANS[name])}", BETTER_SCANS[name]))
        for detector, settings in tried:
            try:
                calibration = _calibrated(detector, found, parts, cache, progress, settings)
            except (CalibrationError, InspectionError) as reason:
                detected.append(Detected(detector=detector, gave_up=reason_of(reason, cache)))
                continue
            item, success = _examined(detector, calibration, probe, progress)
            detected.append(item)
    if success is None:
        raise InputError(f"expected a detector that can be set up for {name}, got none")
    return Report(
        name=name,
        command=f"python -m benchmarks.detectors measure --name {name}",
        plan=plan,
        attack_success=success,
        detected=tuple(detected),
        libraries=versions(),
    )


def _calibrated(
    detector: str, found: Victim, parts: Parts, cache: Path, progress: Progress, settings: ScanSettings
) -> Calibration:
    """One detector alone; the filter looks into the module, the others into its ONNX file."""
    clean = shuffled(parts.defender, 0).select(torch.arange(_DEFENDERS))
    if detector == "strip":
        return calibrate(as_onnx(found, parts, cache), clean, Settings(stage_rows=STAGE_ROWS), progress=progress)
    if detector == "feature-squeezing":
        return calibrate(as_onnx(found, parts, cache), clean, Settings(detectors=("feature-squeezing",)), progress=progress)
    backend = wrap(found.model)
    triggers = infected_triggers(scanned(found, parts, cache, progress, settings=settings), backend)
    return calibrate(backend, clean, Settings(detectors=()), triggers=triggers, progress=progress)


def _examined(detector: str, calibration: Calibration, probe: Probe, progress: Progress) -> tuple[Detected, Estimate]:
    guard = calibration.guard()
    on_clean = judge(guard, probe.clean, f"clean, {detector}", progress)
    on_triggered = judge(guard, probe.triggered, f"triggered, {detector}", progress)
    figures = summarise(on_clean, probe.clean.labels, on_triggered, probe.triggered.labels, probe.targets)
    if figures.attack_success_rate is None:
        raise InputError("expected triggered images that the attack wants something of, got none")
    count = len(calibration.parts)
    limits = np.array(
        [[np.float32(set_threshold(part.scores, PAPER_FRR, detectors=count).value)] for part in calibration.parts]
    )
    success = (on_triggered.answers == probe.targets).numpy()
    missed = int((on_triggered.by_detector[:, success] < limits).all(axis=0).sum())
    return (
        Detected(
            detector=detector,
            auroc=figures.auroc,
            frr=figures.frr,
            far=figures.far_successful,
            far_at_paper_rate=proportion(missed, int(success.sum())),
            passes=sum(part.mean_passes for part in calibration.parts),
        ),
        figures.attack_success_rate,
    )


def load_reports() -> list[Report]:
    """The committed results, in the order of `DETECTED`."""
    return load_results("detectors", list(DETECTED), Report)


def table(reports: Sequence[Report]) -> str:
    """Markdown, one line per victim and detector."""
    header = ("victim", "ASR", "detector", "AUROC", "FRR, set to 1%", "FAR there", "FAR at 5%", "passes")
    rows = []
    for report in reports:
        for number, item in enumerate(report.detected):
            first = [report.name, percent(report.attack_success)] if number == 0 else ["", ""]
            if item.gave_up:
                rows.append([*first, item.detector, "can't be set up: " + item.gave_up.split(",")[0], "", "", "", ""])
                continue
            area = "" if item.auroc is None else f"{item.auroc.value:.4f}"
            passes = "" if item.passes is None else f"{item.passes:.1f}"
            rows.append(
                [*first, item.detector, area, percent(item.frr), percent(item.far), percent(item.far_at_paper_rate), passes]
            )
    return markdown(header, rows)


def main() -> int:
    """Run from the command line."""
    return run("detectors", __doc__, DETECTED, Report, measure, table)


if __name__ == "__main__":
    enter(main)
