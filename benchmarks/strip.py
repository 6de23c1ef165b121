"""STRIP, as calibrated by default, on every victim: what it rejects, and what it lets through.

    python -m benchmarks.strip measure --name gtsrb-b    # one victim, trained if it is not cached
    python -m benchmarks.strip measure --all
    python -m benchmarks.strip table                     # the committed results as docs/victims.md holds them

Thresholds are set on the defender's images; every figure is of the evaluation part, which no victim, setting or threshold has
seen. The models run as ONNX, one thread each, as a server would run them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self, final

import msgspec
import numpy as np
import torch
from torch import nn

from benchmarks.datasets import Parts, SetName
from benchmarks.entry import enter
from benchmarks.plans import Plan
from benchmarks.reports import load_results, markdown, percent, run, versions
from benchmarks.roster import REPORTED
from benchmarks.victims import CACHE, Victim, bars, name_of, share_right, triggered_images, victim
from calibration import Calibration, Evaluation, ImageSet, Settings, calibrate
from calibration.attacks import Attack
from calibration.evaluation import Judged, judge, summarise
from calibration.statistics import Estimate, proportion
from calibration.thresholds import set_threshold
from guard.detectors import Blend
from guard.detectors.strip import STAGE_ROWS
from guard.errors import InputError
from guard.predictors.onnx import OnnxBackend

CODEFEND_FRR: dict[SetName, float] = {"mnist": 0.001, "gtsrb": 0.006, "cifar10": 0.004}
"""False rejection rates of CoDefend, Table 3 (its FNR, as it names them), at which it reports to miss no trigger."""

_THRESHOLD_AND_OVERLAYS = 5_000
_CLEAN = 5_000
_TRIGGERED = 1_000
_CURTAILED = (1_000, 200)  # clean and triggered images on which curtailed and full verdicts are compared
_BATCH = 32  # of requests that are judged together
_AT_ONCE = 1_000  # images in memory


@final
@dataclass(frozen=True)
class Probe:
    """What a guard is measured on.

    Attributes:
        clean: Clean images with labels.
        triggered: Triggered images with their true labels, of which the attack wants something.
        targets: (m,), int64, what it wants.
        change: (m,), float64, by how much the trigger changes an image: mean absolute difference, in [0, 1].
    """

    clean: ImageSet
    triggered: ImageSet
    targets: torch.Tensor
    change: torch.Tensor

    @classmethod
    def of(cls, attack: Attack, clean: ImageSet, chosen: ImageSet, targets: torch.Tensor) -> Self:
        """Trigger the chosen images."""
        triggered = triggered_images(attack, chosen)
        change = (triggered.pixels.double() - chosen.pixels.double()).abs().flatten(1).mean(dim=1) / 255.0
        return cls(clean, triggered, targets, change)


class AtPaperRate(msgspec.Struct, frozen=True, kw_only=True):
    """The same guard at a paper's false rejection rate.

    Attributes:
        asked: The rate that the threshold was set for.
        frr: Measured.
        far: Among attacks that succeed unguarded.
    """

    asked: float
    frr: Estimate
    far: Estimate | None


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One victim under STRIP.

    Attributes:
        name: Of the victim in `REPORTED`.
        command: That made this.
        plan: What was trained.
        twin_accuracy: Clean accuracy of the clean twin, on the whole evaluation part.
        accuracy: Of the victim, there.
        evaluation: The figures.
        blends: Of the detectors, with their weights.
        threshold_bits: Entropy threshold of each detector.
        threshold_images: That set them.
        mean_passes: Of a clean input, curtailed, over all detectors.
        curtailed_inputs: On which curtailed and full verdicts were compared.
        curtailed_verdicts_that_differ: Of these.
        far_where_it_shows: FAR among successful attacks whose trigger changes the image at least half as much as it does at the
            median: a white patch on white is hardly there.
        at_paper_rate: At CoDefend's false rejection rate.
        training_minutes: Of the victim.
        seconds: Of the measurement.
        libraries: Versions.
    """

    name: str
    command: str
    plan: Plan
    twin_accuracy: float
    accuracy: float
    evaluation: Evaluation
    blends: list[tuple[Blend, float]]
    threshold_bits: list[float]
    threshold_images: int
    mean_passes: float
    curtailed_inputs: int
    curtailed_verdicts_that_differ: int
    far_where_it_shows: Estimate | None
    at_paper_rate: AtPaperRate
    training_minutes: float
    seconds: float
    libraries: dict[str, str]


def measure(name: str, parts: Parts, cache: Path = CACHE) -> Report:
    """Measure one victim."""
    started = time.monotonic()
    plan = REPORTED[name]
    with bars() as progress:
        found = victim(plan, parts, cache, progress)
        twin = victim(plan.twin(), parts, cache, progress)
        if found.attack is None:
            raise InputError(f"expected a victim, got the clean model {name}")
        backend = as_onnx(found, parts, cache)
        defender = shuffled(parts.defender, 0).select(torch.arange(_THRESHOLD_AND_OVERLAYS))
        calibration = calibrate(backend, defender, Settings(stage_rows=STAGE_ROWS), progress=progress)
        probe = evaluation_images(found, parts, _CLEAN, _TRIGGERED)
        guard = calibration.guard()
        on_clean = judge(guard, probe.clean, "clean", progress)
        on_triggered = judge(guard, probe.triggered, "triggered", progress)
        firsts = [
            images.select(torch.arange(min(count, len(images))))
            for images, count in zip((probe.clean, probe.triggered), _CURTAILED, strict=True)
        ]
        curtailed = [_curtailed(calibration, *item) for item in zip(firsts, (on_clean, on_triggered), strict=True)]
    rate = CODEFEND_FRR[plan.images]
    return Report(
        name=name,
        command=f"python -m benchmarks.strip measure --name {name}",
        plan=plan,
        twin_accuracy=share_right(twin.model, parts.evaluation),
        accuracy=share_right(found.model, parts.evaluation),
        evaluation=summarise(on_clean, probe.clean.labels, on_triggered, probe.triggered.labels, probe.targets),
        blends=[(strip.blend, strip.alpha) for strip in calibration.strips],
        threshold_bits=[-threshold.value for threshold in calibration.thresholds],
        threshold_images=calibration.thresholds[0].images,
        mean_passes=curtailed[0][1],
        curtailed_inputs=sum(len(images) for images in firsts),
        curtailed_verdicts_that_differ=curtailed[0][0] + curtailed[1][0],
        far_where_it_shows=far_where_it_shows(on_triggered, probe),
        at_paper_rate=_at(calibration, rate, on_clean, on_triggered, probe.targets),
        training_minutes=found.record.minutes,
        seconds=time.monotonic() - started,
        libraries=versions(),
    )


def evaluation_images(found: Victim, parts: Parts, clean: int, triggered: int) -> Probe:
    """From the evaluation part."""
    if found.attack is None:
        raise InputError("expected a victim, got a clean model")
    images = shuffled(parts.evaluation, 0)
    wanted = torch.cat(
        [
            found.attack.targets(images.images(rows), images.known_labels[rows])
            for rows in torch.arange(len(images)).split(_AT_ONCE)
        ]
    )
    rows = torch.nonzero(wanted >= 0).squeeze(1)[-triggered:]
    return Probe.of(found.attack, images.select(torch.arange(clean)), images.select(rows), wanted[rows])


def as_onnx(found: Victim, parts: Parts, cache: Path) -> OnnxBackend:
    """The victim's model as an ONNX file beside its weights."""
    path = cache / f"{name_of(found.record.plan)}.onnx"
    if not path.is_file():
        write_onnx(found.model, parts.evaluation.shape, path)
    return OnnxBackend.load(path, threads=1)


def write_onnx(model: nn.Module, shape: tuple[int, int, int], path: Path) -> None:
    """With a dynamic batch."""
    batch = torch.export.Dim("batch", min=1)
    program = torch.onnx.export(model, (torch.rand(2, *shape),), dynamic_shapes=({0: batch},), dynamo=True, verbose=False)
    if program is None:
        raise InputError("expected an ONNX program, got none")
    program.save(path)


def shuffled(images: ImageSet, seed: int) -> ImageSet:
    """The same images in a random order: files are often sorted by class."""
    return images.select(torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)))


def _curtailed(calibration: Calibration, images: ImageSet, full: Judged) -> tuple[int, float]:
    """How many verdicts differ from the full ones, and the mean number of passes over all detectors."""
    differ, passes = 0, 0
    for rows in torch.arange(len(images)).split(_BATCH):
        batch, fired = images.images(rows), torch.zeros(len(rows), dtype=torch.bool)
        for strip, threshold in zip(calibration.strips, calibration.thresholds, strict=True):
            found = strip.inspect(batch, threshold.value)
            fired |= found.exceeds
            passes += int(found.passes.sum())
        differ += int((fired != full.rejected[rows]).sum())
    return differ, passes / len(images)


def far_where_it_shows(triggered: Judged, probe: Probe) -> Estimate | None:
    """Triggered images accepted, among successful attacks whose trigger shows; see `Report`."""
    shows = (triggered.answers == probe.targets) & (probe.change >= 0.5 * probe.change.median())
    if not bool(shows.any()):
        return None
    return proportion(int((shows & ~triggered.rejected).sum()), int(shows.sum()))


def _at(calibration: Calibration, asked: float, clean: Judged, triggered: Judged, targets: torch.Tensor) -> AtPaperRate:
    """The same detectors with thresholds for another rate."""
    limits = np.array(
        [[np.float32(set_threshold(part.scores, asked, detectors=len(calibration.parts)).value)] for part in calibration.parts]
    )
    success = (triggered.answers == targets).numpy()
    accepted = int((triggered.by_detector[:, success] < limits).all(axis=0).sum())
    return AtPaperRate(
        asked=asked,
        frr=proportion(int((clean.by_detector >= limits).any(axis=0).sum()), clean.by_detector.shape[1]),
        far=proportion(accepted, int(success.sum())) if success.any() else None,
    )


def load_reports() -> list[Report]:
    """The committed results, in the order of `REPORTED`."""
    return load_results("strip", list(REPORTED), Report)


def table(reports: Sequence[Report]) -> str:
    """Markdown."""
    header = (
        "victim",
        "model",
        "CA (clean twin)",
        "ASR",
        "FRR",
        "FAR, successful attacks",
        "where it shows",
        "FAR, all",
    )
    rows = []
    for report in reports:
        found, paper = report.evaluation, report.at_paper_rate
        rows.append(
            [
                report.name,
                f"{report.plan.architecture} x{report.plan.width}",
                _accuracies(report),
                percent(found.attack_success_rate),
                percent(found.frr),
                percent(found.far_successful),
                percent(report.far_where_it_shows),
                percent(found.far),
                "" if found.auroc is None else f"{found.auroc.value:.4f} [{found.auroc.low:.4f}, {found.auroc.high:.4f}]",
                f"{paper.asked:.1%}: {percent(paper.frr)}, {percent(paper.far)}",
                f"{report.mean_passes:.1f}",
            ]
        )
    return markdown([*header, "AUROC", "at CoDefend's FRR: FRR, FAR", "passes"], rows)


def short_table(reports: Sequence[Report]) -> str:
    """Markdown, for the README."""
    rows = []
    for report in reports:
        found = report.evaluation
        success = "" if found.attack_success_rate is None else f"{found.attack_success_rate.value:.2%}"
        area = "" if found.auroc is None else f"{found.auroc.value:.4f}"
        rows.append([report.name, _accuracies(report), success, percent(found.frr), percent(found.far_successful), area])
    return markdown(["victim", "CA (clean twin)", "ASR", "FRR", "FAR", "AUROC"], rows)


def _accuracies(report: Report) -> str:
    return f"{report.accuracy:.2%} ({report.twin_accuracy:.2%})"


def main() -> int:
    """Run from the command line."""
    return run("strip", __doc__, REPORTED, Report, measure, table)


if __name__ == "__main__":
    enter(main)
