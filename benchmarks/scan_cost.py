"""What labels that leave the batch save: the search for triggers with the schedule of a scan, and with the published one.

    python -m benchmarks.scan_cost measure --name gtsrb-b    # on an idle machine
    python -m benchmarks.scan_cost table                     # the committed results as docs/inspection-figures.md holds them

The published schedule is timed with all labels in one batch, and for some labels one at a time, as its authors ran it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import torch

from benchmarks.datasets import Parts
from benchmarks.entry import enter
from benchmarks.plans import Plan
from benchmarks.reports import load_results, markdown, run, versions
from benchmarks.roster import SCANNED
from benchmarks.scans import defenders_images
from benchmarks.victims import CACHE, bars, victim
from calibration.data import Progress
from calibration.discovery import discover
from calibration.engine import Engine
from calibration.frozen import frozen
from calibration.inspection.neural_cleanse import recover_triggers
from calibration.inspection.search import Search
from calibration.inspection.triggers import Goals
from guard import Predictor
from guard.predictors import wrap

PLANS: Mapping[str, Plan] = {name: SCANNED[name] for name in ("gtsrb-b", "gtsrb-clean")}
_IMAGES, _ALONE = 1000, 4


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """Of one schedule.

    Attributes:
        passes: Images that went through the model.
        seconds: On the clock.
        processor_seconds: Of all threads.
    """

    passes: int
    seconds: float
    processor_seconds: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One model.

    Attributes:
        name: Of the model.
        command: That made this.
        plan: What was trained.
        labels: How many there are.
        threads: Of torch.
        scan: Of the schedule of a scan.
        plain: Of the published one, all labels in a batch.
        alone: Of the published one, four labels one at a time.
        libraries: Versions.
    """

    name: str
    command: str
    plan: Plan
    labels: int
    threads: int
    scan: Cost
    plain: Cost
    alone: Cost
    libraries: dict[str, str]


def measure(name: str, parts: Parts, cache: Path = CACHE) -> Report:
    """Time the searches, one after the other."""
    with bars() as progress:
        found = victim(PLANS[name], parts, cache, progress)
        predictor = discover(wrap(found.model), defenders_images(parts))
        images = defenders_images(parts).images(slice(0, _IMAGES))
        everything, search = Goals.all_labels(predictor.num_classes), Search()
        single = [Goals.of(torch.tensor([label])) for label in range(_ALONE)]
        return Report(
            name=name,
            command=f"python -m benchmarks.scan_cost measure --name {name}",
            plan=PLANS[name],
            labels=predictor.num_classes,
            threads=torch.get_num_threads(),
            scan=_cost(predictor, images, [everything], search, progress),
            plain=_cost(predictor, images, [everything], search.plain(), progress),
            alone=_cost(predictor, images, single, search.plain(), progress),
            libraries=versions(),
        )


def _cost(predictor: Predictor, images: torch.Tensor, goals: Sequence[Goals], search: Search, progress: Progress) -> Cost:
    engine, answers, passes = Engine(), frozen(predictor, images[:2]), 0
    clock, processor = time.monotonic(), time.process_time()
    for some in goals:
        found = recover_triggers(answers, images, some, search, 0, engine, progress=progress)
        passes += int(found.passes.sum())
    return Cost(passes=passes, seconds=time.monotonic() - clock, processor_seconds=time.process_time() - processor)


def load_reports() -> list[Report]:
    """The committed results, in the order of `PLANS`."""
    return load_results("scan_cost", list(PLANS), Report)


def table(reports: Sequence[Report]) -> str:
    """Markdown, one line per model and schedule."""
    header = ("model", "schedule", "passes", "seconds", "passes, of the published", "seconds, of the published")
    rows = []
    for report in reports:
        share = report.labels / _ALONE
        alone = Cost(
            passes=round(report.alone.passes * share),
            seconds=report.alone.seconds * share,
            processor_seconds=report.alone.processor_seconds * share,
        )
        for what, cost in (
            ("a scan's", report.scan),
            ("published, all labels in a batch", report.plain),
            (f"published, one label at a time (from {_ALONE} labels)", alone),
        ):
            rows.append(
                [
                    report.name,
                    what,
                    f"{cost.passes:,}",
                    f"{cost.seconds:.0f}",
                    f"{cost.passes / report.plain.passes:.0%}",
                    f"{cost.seconds / report.plain.seconds:.0%}",
                ]
            )
    return markdown(header, rows)


def main() -> int:
    """Run from the command line."""
    return run("scan_cost", __doc__, PLANS, Report, measure, table)


if __name__ == "__main__":
    enter(main)
