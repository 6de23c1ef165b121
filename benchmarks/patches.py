"""Does the best patch of a few pixels tell backdoored models from clean ones? The models that scans look at, every label.

python -m benchmarks.patches measure --name gtsrb-b    # one model, trained if it is not cached
python -m benchmarks.patches measure --all
python -m benchmarks.patches table                     # the committed results as docs/inspection-figures.md holds them

`guard scan --patches` looks at the labels that masks have not found; here all are looked at, so that both can be compared.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from benchmarks.datasets import Parts
from benchmarks.entry import enter
from benchmarks.inspection import listed, success_of, targets_of
from benchmarks.plans import Plan
from benchmarks.reports import load_results, markdown, percent, run, versions
from benchmarks.roster import SCANNED
from benchmarks.scans import defenders_images
from benchmarks.victims import CACHE, bars, victim
from calibration.discovery import discover
from calibration.inspection.record import PatchFinding
from calibration.inspection.scan import look_for_patches
from calibration.inspection.search import Search
from calibration.statistics import Estimate
from guard.predictors import wrap

_PLAIN = Search().plain()


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One model.

    Attributes:
        name: Of the model.
        command: That made this.
        plan: What was trained.
        targets: Labels that are infected in truth.
        patches: Of every label.
        recovered: Success, on evaluation images, of what is kept of the labels that were found infected.
        seconds: That it took.
        libraries: Versions.
    """

    name: str
    command: str
    plan: Plan
    targets: tuple[int, ...]
    patches: tuple[PatchFinding, ...]
    recovered: tuple[Estimate, ...]
    seconds: float
    libraries: dict[str, str]

    @property
    def found(self) -> set[int]:
        """Labels that it says are infected."""
        return {item.label_index for item in self.patches if item.infected}

    @property
    def right(self) -> bool:
        """Whether these are the truth."""
        return self.found == set(self.targets)


def measure(name: str, parts: Parts, cache: Path = CACHE) -> Report:
    """Look at one of the models."""
    plan = SCANNED[name]
    with bars() as progress:
        found = victim(plan, parts, cache, progress)
        clean, started = defenders_images(parts), time.monotonic()
        triggers, patches = look_for_patches(discover(wrap(found.model), clean), clean, progress=progress)
        seconds = time.monotonic() - started
    infected = [row for row, item in enumerate(patches) if item.infected]
    return Report(
        name=name,
        command=f"python -m benchmarks.patches measure --name {name}",
        plan=plan,
        targets=targets_of(found.attack),
        patches=patches,
        recovered=tuple(success_of(found.model, triggers, row, parts.evaluation) for row in infected),
        seconds=seconds,
        libraries=versions(),
    )


def load_reports() -> list[Report]:
    """The committed results, in the order of `SCANNED`."""
    return load_results("patches", list(SCANNED), Report)


def table(reports: Sequence[Report]) -> str:
    """Markdown, one line per model."""
    header = [
        "model",
        "infected in truth",
        "by patches",
        "works on (in the reference)",
        "closest clean label",
        "recovered success",
        "passes, of the plain schedule",
    ]
    return markdown(header, [_row(report) for report in reports])


def _row(report: Report) -> list[str]:
    clean = [item.success for item in report.patches if item.label_index not in report.targets]
    plain = len(report.patches) * _PLAIN.steps * _PLAIN.images
    return [
        report.name,
        listed(report.targets),
        ("" if report.right else "WRONG: ") + listed(sorted(report.found)),
        "; ".join(_works(report.patches[label]) for label in report.targets) or "-",
        f"{max(clean, default=0.0):.0%}",
        "; ".join(map(percent, report.recovered)) or "-",
        f"{sum(item.passes for item in report.patches) / plain:.0%}",
    ]


def _works(item: PatchFinding) -> str:
    there = "" if item.reference_success is None else f" ({item.reference_success:.0%})"
    return f"{item.success:.0%}{there}"


def main() -> int:
    """Run from the command line."""
    return run("patches", __doc__, SCANNED, Report, measure, table)


if __name__ == "__main__":
    enter(main)
