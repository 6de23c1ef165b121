"""CoDefend's Table 4: victims with patch triggers, 500 clean images, 500 that our own STRIP quarantined.

    python -m benchmarks.codefend measure --name gtsrb-b    # one victim, trained if it is not cached
    python -m benchmarks.codefend measure --all
    python -m benchmarks.codefend table                     # the committed results as docs/repair.md holds them

STRIP is calibrated on the 500 clean images and judges a stream of the defender's other images, half of them triggered, until
500 are quarantined: among them are false alarms, as many as there happen to be. Accuracy and attack success are of the
evaluation part, which nothing here has seen.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import msgspec
import torch
from torch import Tensor

from benchmarks.datasets import Parts
from benchmarks.entry import enter
from benchmarks.evaluated import Exam, Marks, examine
from benchmarks.plans import Plan
from benchmarks.reports import load_results, markdown, percent, run, versions
from benchmarks.roster import REPORTED
from benchmarks.strip import as_onnx, shuffled
from benchmarks.victims import CACHE, Victim, bars, triggered_images, victim
from calibration import Settings, calibrate
from calibration.data import ImageSet, Progress
from calibration.discovery import discover
from calibration.repair.record import RepairFigures
from calibration.repair.repair import Repaired, repair
from calibration.repair.report import learnt_figure
from calibration.repair.settings import RepairSettings
from guard.errors import InputError
from guard.predictors import wrap

VICTIMS = ("mnist-a", "gtsrb-b", "cifar10-c", "cifar10-d", "cifar10-two-triggers")
PAPER = {
    "mnist-a": "98.70%, 100% to 98.62%, 1.97%",
    "gtsrb-b": "95.80%, 100% to 95.26%, 2.06%",
    "cifar10-c": "88.27%, 100% to 87.18%, 2.53%",
    "cifar10-d": "88.19%, 100% to 87.21%, 1.66%",
    "cifar10-two-triggers": "86.2%, 100% to under 5%",
}
HIGHEST_SUCCESS = {"mnist-a": 0.0197, "gtsrb-b": 0.0206, "cifar10-c": 0.0253, "cifar10-d": 0.0253, "cifar10-two-triggers": 0.05}
"""Attack success after the repair, of the paper."""

_CLEAN, _QUARANTINED = 500, 500
_BATCH = 64


class Stream(msgspec.Struct, frozen=True, kw_only=True):
    """What STRIP made of the stream.

    Attributes:
        looked_at: Images that it judged.
        triggered: Of which had a trigger.
        quarantined: That it rejected.
        false_alarms: Of which had none.
    """

    looked_at: int
    triggered: int
    quarantined: int
    false_alarms: int


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One victim.

    Attributes:
        name: Of the victim.
        command: That made this.
        plan: What was trained.
        stream: What was quarantined, and how.
        figures: What a defender sees.
        before: Of the victim.
        after: Of the repaired model.
        seconds: Of the repair.
        libraries: Versions.
    """

    name: str
    command: str
    plan: Plan
    stream: Stream
    figures: RepairFigures
    before: Marks
    after: Marks
    seconds: float
    libraries: dict[str, str]

    @property
    def drop(self) -> float:
        """Of clean accuracy, in points."""
        return (self.before.accuracy.value - self.after.accuracy.value) * 100.0


@final
@dataclass(frozen=True)
class Measured:
    """A repair with its report."""

    report: Report
    repaired: Repaired


def measure_plan(name: str, plan: Plan, parts: Parts, cache: Path = CACHE) -> Measured:
    """Quarantine, repair, examine."""
    with bars() as progress:
        found = victim(plan, parts, cache, progress)
        if found.attack is None:
            raise InputError(f"expected a victim, got the clean model {name}")
        images = shuffled(parts.defender, 0)
        clean = images.select(torch.arange(_CLEAN))
        stream, suspects = quarantined(found, parts, clean, images.select(torch.arange(_CLEAN, len(images))), cache, progress)
        predictor = discover(wrap(found.model), clean)
        started = time.monotonic()
        repaired = repair(
            predictor, clean, RepairSettings(method="codefend", allow_missing_classes=True), suspects, progress=progress
        )
        seconds = time.monotonic() - started
        exam = Exam.of(found.attack, parts.evaluation)
        report = Report(
            name=name,
            command=f"python -m benchmarks.codefend measure --name {name}",
            plan=plan,
            stream=stream,
            figures=repaired.figures,
            before=examine(predictor, exam),
            after=examine(repaired.predictor, exam),
            seconds=seconds,
            libraries=versions(),
        )
    return Measured(report, repaired)


def quarantined(
    found: Victim, parts: Parts, clean: ImageSet, others: ImageSet, cache: Path, progress: Progress
) -> tuple[Stream, Tensor]:
    """What STRIP, calibrated on the clean images, rejects of the others, half of which get the trigger."""
    if found.attack is None:
        raise InputError("expected a victim, got a clean model")
    guard = calibrate(as_onnx(found, parts, cache), clean, Settings(allow_missing_classes=True), progress=progress).guard()
    triggered = triggered_images(found.attack, others)
    wanted = found.attack.targets(others.images(slice(None)), others.known_labels) >= 0
    chosen = (torch.rand(len(others), generator=torch.Generator().manual_seed(1)) < 0.5) & wanted
    kept: list[Tensor] = []
    looked_at = false_alarms = 0
    for rows in torch.arange(len(others)).split(_BATCH):
        batch = torch.where(chosen[rows].view(-1, 1, 1, 1), triggered.images(rows), others.images(rows))
        for row, verdict in enumerate(guard(batch)):
            if len(kept) == _QUARANTINED:
                break
            looked_at += 1
            if verdict.suspicious:
                kept.append(batch[row])
                false_alarms += not bool(chosen[rows[row]])
        progress("filling the quarantine", len(kept), _QUARANTINED)
    stream = Stream(
        looked_at=looked_at,
        triggered=int(chosen[:looked_at].sum()),
        quarantined=len(kept),
        false_alarms=false_alarms,
    )
    return stream, torch.stack(kept)


def measure(name: str, parts: Parts, cache: Path = CACHE) -> Report:
    """One of the victims that the table reports; its picture goes to the documents."""
    measured = measure_plan(name, REPORTED[name], parts, cache)
    folder = Path(__file__).parent.parent / "docs" / "repair"
    folder.mkdir(parents=True, exist_ok=True)
    for number, learnt in enumerate(measured.repaired.learnt, start=1):
        more = "" if number == 1 else f"-{number}"
        (folder / f"{name}{more}.png").write_bytes(learnt_figure(learnt))
    return measured.report


def load_reports() -> list[Report]:
    """The committed results, in the order of `VICTIMS`."""
    return load_results("codefend", VICTIMS, Report)


def table(reports: Sequence[Report]) -> str:
    """Markdown."""
    header = [
        "victim",
        "quarantined (false alarms)",
        "CA before",
        "ASR before",
        "CA after",
        "ASR after",
        "a clean input so answered",
    ]
    rows = [
        [
            report.name,
            f"{report.stream.quarantined} ({report.stream.false_alarms}) of {report.stream.looked_at}",
            f"{report.before.accuracy.value:.2%}",
            f"{report.before.attack_success.value:.2%}",
            f"{report.after.accuracy.value:.2%} ({-report.drop:+.2f})",
            percent(report.after.attack_success),
            f"{report.after.target_share.value:.2%}",
            PAPER.get(report.name, ""),
            f"{report.seconds / 60.0:.1f}",
        ]
        for report in reports
    ]
    return markdown([*header, "the paper: CA, ASR before and after", "minutes"], rows)


def main() -> int:
    """Run from the command line."""
    return run("codefend", __doc__, {name: REPORTED[name] for name in VICTIMS}, Report, measure, table)


if __name__ == "__main__":
    enter(main)
