"""Every repair on the same victims: what it costs, what it leaves of the backdoor, once and pasted four and nine times.

    python -m benchmarks.repairs measure --name gtsrb-b.unlearn    # one victim and method, trained if it is not cached
    python -m benchmarks.repairs measure --all
    python -m benchmarks.repairs table                             # the committed results as docs/methods.md holds them

Repairs see 2,000 of the defender's images; codefend 500, and 500 that STRIP quarantined from a stream of the others.
Every figure is of the evaluation part. What `guard repair` would refuse, for it costs too much, is marked. Methods that work by
recovered triggers share one scan, whose minutes count for each.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from benchmarks.codefend import quarantined
from benchmarks.datasets import Parts
from benchmarks.entry import enter
from benchmarks.evaluated import Exam, Marks, examine
from benchmarks.plans import Plan
from benchmarks.reports import load_results, markdown, percent, run, versions
from benchmarks.roster import REPAIRED
from benchmarks.scans import reason_of, scanned
from benchmarks.strip import shuffled
from benchmarks.victims import CACHE, Victim, bars, victim
from calibration.attacks import Amplified, Attack, BadNets
from calibration.data import ImageSet, Progress
from calibration.discovery import discover
from calibration.inspection.record import read_scan
from calibration.inspection.triggers_file import read_infected
from calibration.repair.record import Method, RepairFigures
from calibration.repair.repair import repair
from calibration.repair.settings import NEEDS_TRIGGERS, RepairSettings
from calibration.statistics import Estimate
from guard import Predictor
from guard.errors import InputError, InspectionError, ModelError, RepairError
from guard.predictors import wrap
from guard.preprocessors import Preprocessor

METHODS: tuple[Method, ...] = ("gym", "codefend", "unlearn", "prune", "gdm", "fine-tune", "fine-prune", "nad", "mcr")
_IMAGES, _FEW = 2_000, 500
_DRAWS = 10


def plans_of(victims: Mapping[str, Plan]) -> dict[str, Plan]:
    """Of each victim and method, named `victim.method`."""
    return {f"{name}.{method}": plan for name, plan in victims.items() for method in METHODS}


class Exams(msgspec.Struct, frozen=True, kw_only=True):
    """How a model does.

    Attributes:
        marks: By the trigger as it was learnt.
        amplified: ASR of four and of nine copies; None for attacks without a patch.
        each: ASR of each trigger alone, where there are several.
    """

    marks: Marks
    amplified: tuple[Estimate, ...] | None
    each: tuple[Estimate, ...]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One method on one victim.

    Attributes:
        name: `victim.method`.
        command: That made this.
        plan: What was trained.
        method: Of the repair.
        images: Clean ones that it was given, held-out ones included.
        before: Of the victim.
        after: Of the repaired model, through the preprocessor that it was tuned for; None where the method gave up.
        figures: What a defender sees; likewise.
        gave_up: Why it did, or why `guard repair` would refuse what it came to; empty otherwise.
        scan_minutes: Of the search for triggers; 0 without one.
        minutes: Of the repair.
        libraries: Versions.
    """

    name: str
    command: str
    plan: Plan
    method: Method
    images: int
    before: Exams
    after: Exams | None
    figures: RepairFigures | None
    gave_up: str
    scan_minutes: float
    minutes: float
    libraries: dict[str, str]

    @property
    def victim(self) -> str:
        """Its name."""
        return self.name.split(".")[0]

    @property
    def drop(self) -> float | None:
        """Of clean accuracy, in points."""
        after = self.after
        return None if after is None else (self.before.marks.accuracy.value - after.marks.accuracy.value) * 100.0


def measure_plan(name: str, plan: Plan, parts: Parts, cache: Path = CACHE) -> Report:
    """Repair and examine."""
    method = next(method for method in METHODS if name.endswith(f".{method}"))
    with bars() as progress:
        found = victim(plan, parts, cache, progress)
        if found.attack is None:
            raise InputError(f"expected a victim, got the clean model {name}")
        images = shuffled(parts.defender, 0)
        clean = images.select(torch.arange(_FEW if method == "codefend" else _IMAGES))
        predictor = discover(wrap(found.model), clean)
        before = exams(predictor, found.attack, parts.evaluation)
        after, figures, gave_up, scan_minutes = None, None, "", 0.0
        started = time.monotonic()
        try:
            triggers = suspects = None
            if method in NEEDS_TRIGGERS:
                folder = scanned(found, parts, cache, progress)
                triggers = read_infected(folder, predictor.backend, pairs=True, spec=predictor.spec)
                scan_minutes = read_scan(folder).seconds / 60.0
            if method == "codefend":
                suspects = _suspects(found, parts, clean, images, cache, progress)
            started = time.monotonic()
            repaired = repair(
                predictor,
                clean,
                RepairSettings(method=method, allow_missing_classes=True),
                suspects,
                triggers=triggers,
                progress=progress,
            )
            minutes = (time.monotonic() - started) / 60.0
            figures = repaired.figures
            after = exams(repaired.predictor, found.attack, parts.evaluation, repaired.preprocessor)
            repaired.check()
        except (RepairError, InspectionError, ModelError) as reason:
            gave_up, minutes = reason_of(reason, cache), (time.monotonic() - started) / 60.0
    return Report(
        name=name,
        command=f"python -m benchmarks.repairs measure --name {name}",
        plan=plan,
        method=method,
        images=len(clean),
        before=before,
        after=after,
        figures=figures,
        gave_up=gave_up,
        scan_minutes=scan_minutes,
        minutes=minutes,
        libraries=versions(),
    )


def exams(predictor: Predictor, attack: Attack, images: ImageSet, preprocessor: Preprocessor | None = None) -> Exams:
    """By the trigger, by copies of it, and by each alone."""
    draws = 1 if preprocessor is None else _DRAWS

    def success(of: Attack) -> Estimate:
        return examine(predictor, Exam.of(of, images), preprocessor, draws).attack_success

    marks = examine(predictor, Exam.of(attack, images), preprocessor, draws)
    if not isinstance(attack, BadNets):
        return Exams(marks=marks, amplified=None, each=())
    return Exams(
        marks=marks,
        amplified=tuple(success(Amplified(attack, copies)) for copies in (4, 9)),
        each=tuple(success(replace(attack, patches=(patch,))) for patch in attack.patches if len(attack.patches) > 1),
    )


def _suspects(found: Victim, parts: Parts, clean: ImageSet, images: ImageSet, cache: Path, progress: Progress) -> Tensor:
    others = images.select(torch.arange(len(clean), len(images)))
    return quarantined(found, parts, clean, others, cache, progress)[1]


def measure(name: str, parts: Parts, cache: Path = CACHE) -> Report:
    """One that the table reports."""
    return measure_plan(name, plans_of(REPAIRED)[name], parts, cache)


def load_reports() -> list[Report]:
    """The committed results, victim by victim."""
    return load_results("repairs", list(plans_of(REPAIRED)), Report)


def table(reports: Sequence[Report]) -> str:
    """Markdown, one line per victim and method, below what its victim was; trained again on another machine, that differs."""
    header = ("victim", "repair", "CA", "ASR", "ASR, 4 copies", "ASR, 9 copies", "clean images", "minutes, of which scan")
    by_model: dict[tuple[str, Exams], list[Report]] = {}
    for victim_name, own in groupby(reports, key=lambda report: report.victim):
        for report in own:
            by_model.setdefault((victim_name, report.before), []).append(report)
    rows, last = [], ""
    for (victim_name, before), repaired in by_model.items():
        rows.append([f"**{victim_name}**{', trained again' if victim_name == last else ''}", "none", *_cells(before), "", ""])
        rows.extend(_row(report) for report in repaired)
        last = victim_name
    return markdown(header, rows)


def _row(report: Report) -> list[str]:
    done = ["gave up: " + report.gave_up.split(":")[0], "", "", ""] if report.after is None else _cells(report.after)
    minutes = f"{report.minutes + report.scan_minutes:.1f}" + (f", {report.scan_minutes:.1f}" if report.scan_minutes else "")
    refused = ", refused" if report.after is not None and report.gave_up else ""
    return ["", report.method + refused, *done, f"{report.images:,}", minutes]


def _cells(found: Exams) -> list[str]:
    several = "" if not found.each else f"; each alone at most {max(item.value for item in found.each):.1%}"
    amplified = ["", ""] if found.amplified is None else [f"{item.value:.2%}" for item in found.amplified]
    return [percent(found.marks.accuracy), percent(found.marks.attack_success) + several, *amplified]


def main() -> int:
    """Run from the command line."""
    return run("repairs", __doc__, plans_of(REPAIRED), Report, measure, table)


if __name__ == "__main__":
    enter(main)
