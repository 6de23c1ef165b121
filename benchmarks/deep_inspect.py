"""Does an inspection without any data tell backdoored models from clean ones? DeepInspect, on the models that scans look at.

python -m benchmarks.deep_inspect measure --name gtsrb-b    # one model, trained if it is not cached
python -m benchmarks.deep_inspect measure --all
python -m benchmarks.deep_inspect table                     # the committed results as docs/inspection-figures.md holds them

It sees no image, only their shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from benchmarks.datasets import Parts
from benchmarks.entry import enter
from benchmarks.inspection import listed, targets_of
from benchmarks.plans import Plan
from benchmarks.reports import load_results, markdown, run, versions
from benchmarks.roster import SCANNED
from benchmarks.victims import CACHE, bars, victim
from calibration.discovery import discover_without_images
from calibration.inspection.deep_scan import DeepScanSettings, deep_scan
from calibration.inspection.record import LabelFinding, ScanFigures
from guard.predictors import wrap


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One model.

    Attributes:
        name: Of the model.
        command: That made this.
        plan: What was trained.
        targets: Labels that are infected in truth.
        figures: Of the inspection.
        libraries: Versions.
    """

    name: str
    command: str
    plan: Plan
    targets: tuple[int, ...]
    figures: ScanFigures
    libraries: dict[str, str]

    @property
    def found(self) -> set[int]:
        """Labels that it says are infected."""
        return {item.label_index for item in self.figures.labels if item.infected}

    @property
    def right(self) -> bool:
        """Whether these are the truth."""
        return self.found == set(self.targets)


def measure(name: str, parts: Parts, cache: Path = CACHE) -> Report:
    """Inspect one of the models."""
    plan = SCANNED[name]
    with bars() as progress:
        found = victim(plan, parts, cache, progress)
        predictor = discover_without_images(wrap(found.model), parts.defender.shape)
        figures = deep_scan(predictor, DeepScanSettings(), progress=progress).figures
    return Report(
        name=name,
        command=f"python -m benchmarks.deep_inspect measure --name {name}",
        plan=plan,
        targets=targets_of(found.attack),
        figures=figures,
        libraries=versions(),
    )


def load_reports() -> list[Report]:
    """The committed results, in the order of `SCANNED`."""
    return load_results("deep_inspect", list(SCANNED), Report)


def table(reports: Sequence[Report]) -> str:
    """Markdown, one line per model."""
    header = (
        "model",
        "infected in truth",
        "verdict",
        "deviation factor, of the median",
        "closest clean label",
        "factor alone",
        "seconds",
    )
    rows = []
    for report in reports:
        labels, median = report.figures.labels, report.figures.median_l1

        def shown(item: LabelFinding, median: float = median) -> str:
            return f"{item.label_index}: {item.anomaly_index:.1f}, {item.mask_l1 / median:.0%}"

        clean = min((item for item in labels if item.label_index not in report.targets), key=lambda item: item.mask_l1)
        rows.append(
            [
                report.name,
                listed(report.targets),
                ("" if report.right else "WRONG: ") + listed(sorted(report.found)),
                "; ".join(shown(item) for item in labels if item.label_index in report.targets) or "-",
                shown(clean),
                listed([item.label_index for item in labels if item.infected_by_index]),
                f"{report.figures.seconds:.0f}",
            ]
        )
    return markdown(header, rows)


def main() -> int:
    """Run from the command line."""
    return run("deep_inspect", __doc__, SCANNED, Report, measure, table)


if __name__ == "__main__":
    enter(main)
