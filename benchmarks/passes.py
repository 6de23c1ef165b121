"""How many forward passes STRIP takes, exact, by votes and sequential, and what that changes: for every victim, by one blend.

    python -m benchmarks.passes measure --name gtsrb-b
    python -m benchmarks.passes measure --all
    python -m benchmarks.passes table

Thresholds, the order of the overlays and boundaries come from the same images of the defender's part as in `benchmarks.strip`;
every figure is of the evaluation part. Numbers in `calibration.boundaries` were chosen on the development victims. Requests are
judged 32 together; `alone` is a request on its own, whose passes are rounded up to what fills a call.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch

from benchmarks.datasets import Parts
from benchmarks.entry import enter
from benchmarks.plans import Plan
from benchmarks.reports import load_results, markdown, percent, run, versions
from benchmarks.roster import REPORTED
from benchmarks.strip import as_onnx, evaluation_images, shuffled
from benchmarks.victims import CACHE, bars, victim
from calibration import Calibration, ImageSet, PassesChoice, Settings, calibrate
from calibration.statistics import Estimate, proportion
from guard import Predictor
from guard.detectors.strip import STAGE_ROWS

_DEFENDER, _CLEAN, _TRIGGERED, _BATCH = 5_000, 2_000, 500, 32
_CHOICES: tuple[PassesChoice, ...] = ("exact", "votes", "sequential")


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """One way to stop.

    Attributes:
        passes: Which.
        threshold_bits: Entropy threshold.
        threshold_images: That set it.
        frr: Of clean images, rejected.
        far: Of triggered images that get the answer that the attack wants, accepted.
        clean_passes: Mean, of clean images.
        triggered_passes: Mean, of those triggered images.
        clean_passes_alone: Of clean images on their own, as calibration measured it.
        clean_per_second: Clean images inspected, in batches, on one thread.
    """

    passes: PassesChoice
    threshold_bits: float
    threshold_images: int
    frr: Estimate
    far: Estimate | None
    clean_passes: float
    triggered_passes: float | None
    clean_passes_alone: float
    clean_per_second: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One victim.

    Attributes:
        name: Of the victim in `REPORTED`.
        command: That made this.
        plan: What was trained.
        figures: Of each way.
        seconds: Of the measurement.
        libraries: Versions.
    """

    name: str
    command: str
    plan: Plan
    figures: list[Figures]
    seconds: float
    libraries: dict[str, str]


def measure(name: str, parts: Parts, cache: Path = CACHE) -> Report:
    """Measure one victim."""
    started = time.monotonic()
    plan = REPORTED[name]
    with bars() as progress:
        found = victim(plan, parts, cache, progress)
        defender = shuffled(parts.defender, 0).select(torch.arange(_DEFENDER))
        probe = evaluation_images(found, parts, _CLEAN, _TRIGGERED)
        backend = as_onnx(found, parts, cache)
        figures = []
        for passes in _CHOICES:
            made = calibrate(backend, defender, Settings(passes=passes, stage_rows=STAGE_ROWS), progress=progress)
            success = _answers(made.predictor, probe.triggered) == probe.targets
            figures.append(_figures(passes, made, probe.clean, probe.triggered.select(torch.nonzero(success).squeeze(1))))
    return Report(
        name=name,
        command=f"python -m benchmarks.passes measure --name {name}",
        plan=plan,
        figures=figures,
        seconds=time.monotonic() - started,
        libraries=versions(),
    )


def _answers(predictor: Predictor, images: ImageSet) -> torch.Tensor:
    return torch.cat([predictor(images.images(rows)).argmax(dim=1) for rows in torch.arange(len(images)).split(_BATCH)])


def _figures(passes: PassesChoice, made: Calibration, clean: ImageSet, triggered: ImageSet) -> Figures:
    started = time.monotonic()
    rejected, clean_passes = _inspected(made, clean)
    seconds = time.monotonic() - started
    caught, triggered_passes = _inspected(made, triggered) if len(triggered) else (0, None)
    return Figures(
        passes=passes,
        threshold_bits=-made.thresholds[0].value,
        threshold_images=made.thresholds[0].images,
        frr=proportion(rejected, len(clean)),
        far=proportion(len(triggered) - caught, len(triggered)) if len(triggered) else None,
        clean_passes=clean_passes or 0.0,
        triggered_passes=triggered_passes,
        clean_passes_alone=made.mean_passes,
        clean_per_second=len(clean) / seconds,
    )


def _inspected(made: Calibration, images: ImageSet) -> tuple[int, float]:
    """How many are rejected, and the mean number of passes."""
    rejected, passes = 0, 0
    for rows in torch.arange(len(images)).split(_BATCH):
        found = made.strips[0].inspect(images.images(rows), made.thresholds[0].value)
        rejected += int(found.exceeds.sum())
        passes += int(found.passes.sum())
    return rejected, passes / len(images)


def load_reports() -> list[Report]:
    """The committed results, in the order of `REPORTED`."""
    return load_results("passes", list(REPORTED), Report)


def table(reports: Sequence[Report]) -> str:
    """Markdown: the ways side by side; empty where one has not been measured."""
    header = ["victim"]
    for figure in ("FRR", "FAR", "passes, clean", "passes, triggered"):
        header += [f"{figure}: {_CHOICES[0]}", *_CHOICES[1:]]
    rows = []
    for report in reports:
        found = {item.passes: item for item in report.figures}
        every = [found.get(choice) for choice in _CHOICES]
        rows.append(
            [
                report.name,
                *("" if item is None else percent(item.frr) for item in every),
                *("" if item is None else percent(item.far) for item in every),
                *("" if item is None else f"{item.clean_passes:.1f} ({item.clean_passes_alone:.1f})" for item in every),
                *("" if item is None or item.triggered_passes is None else f"{item.triggered_passes:.1f}" for item in every),
            ]
        )
    return markdown(header, rows)


def main() -> int:
    """Run from the command line."""
    return run("passes", __doc__, REPORTED, Report, measure, table)


if __name__ == "__main__":
    enter(main)
