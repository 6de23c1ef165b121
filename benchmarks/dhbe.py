"""How far DHBE gets without any data, step by step: accuracy and attack success along one long training.

    python -m benchmarks.dhbe measure --name cifar10-c    # the same command goes on from where it was
    python -m benchmarks.dhbe measure --all
    python -m benchmarks.dhbe table                       # the committed results as docs/repair.md holds them

By drawings, which is what `guard repair --method dhbe` does; settings were chosen on `cifar10-dev` and `gtsrb-dev`, the
weight and which patches are overlooked on `cifar10-dev` alone, figures on black on other victims of MNIST. The published game
was tried with batches of 64 instead of 256, which is what two cores allow: at its rate of 0.1 it wrecked the copy of
`cifar10-c` within 10 epochs, and at 0.03 copy and generators ran in circles. Every figure is of the evaluation part.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from benchmarks.datasets import Parts
from benchmarks.entry import enter
from benchmarks.plans import Plan
from benchmarks.repairs import Exams, exams
from benchmarks.reports import load_results, markdown, percent, run, versions
from benchmarks.roster import REPORTED
from benchmarks.victims import CACHE, bars, victim
from calibration.checkpoints import Checkpoints
from calibration.discovery import discover_without_images
from calibration.engine import Engine
from calibration.fine_tuning import TrainableCopy
from calibration.repair.drawn import Drawn, repair_by_drawings
from guard.errors import InputError
from guard.predictors import wrap

ERASED: Mapping[str, Plan] = {name: REPORTED[name] for name in ("cifar10-c", "gtsrb-b", "mnist-conv-badnets")}
_EVERY = 2  # epochs


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """Of the curve.

    Attributes:
        epochs: That are done.
        drawings: That the copy has seen.
        exams: How it does.
    """

    epochs: int
    drawings: int
    exams: Exams


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One victim.

    Attributes:
        name: Of the victim.
        command: That made this.
        plan: What was trained.
        settings: How.
        curve: From the victim as it was to the end.
        hours: That it took, with examining.
        libraries: Versions.
    """

    name: str
    command: str
    plan: Plan
    settings: Drawn
    curve: tuple[Point, ...]
    hours: float
    libraries: dict[str, str]


def measure(name: str, parts: Parts, cache: Path = CACHE) -> Report:
    """Erase, and look at the copy now and then."""
    plan, folder, started = ERASED[name], cache.parent / "dhbe" / name, time.monotonic()
    with bars() as progress:
        found = victim(plan, parts, cache, progress)
        attack = found.attack
        if attack is None:
            raise InputError(f"expected a victim, got the clean model {name}")
        predictor = discover_without_images(wrap(found.model), parts.defender.shape)
        copied = TrainableCopy.of(predictor)
        settings = Drawn.suited(predictor.spec)
        checkpoints = Checkpoints(folder, [msgspec.to_builtins(plan), msgspec.to_builtins(settings)])
        curve = _Curve(folder / "curve.json" if checkpoints.found() else None)
        curve.add(Point(epochs=0, drawings=0, exams=exams(predictor, attack, parts.evaluation)))

        def look(epochs: int) -> None:
            if epochs % _EVERY == 0:
                drawings = epochs * settings.iterations * settings.student_steps * settings.batch
                curve.add(Point(epochs=epochs, drawings=drawings, exams=exams(copied.predictor, attack, parts.evaluation)))
                curve.save(folder / "curve.json")

        repair_by_drawings(copied, predictor, settings, Engine(), 0, checkpoints, progress, look)
    report = Report(
        name=name,
        command=f"python -m benchmarks.dhbe measure --name {name}",
        plan=plan,
        settings=settings,
        curve=tuple(curve.points.values()),
        hours=max(checkpoints.seconds, time.monotonic() - started) / 3600.0,
        libraries=versions(),
    )
    checkpoints.remove()  # the next measurement may be of another code; a curve without checkpoints is not gone on with
    return report


class _Curve:
    """Points that survive an interruption, each epoch's once."""

    def __init__(self, file: Path | None) -> None:
        known = [] if file is None or not file.is_file() else msgspec.json.decode(file.read_bytes(), type=list[Point])
        self.points = {point.epochs: point for point in known}

    def add(self, point: Point) -> None:
        """Once more is the same."""
        self.points.setdefault(point.epochs, point)

    def save(self, file: Path) -> None:
        """All that there are."""
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(msgspec.json.encode(list(self.points.values())))


def load_reports() -> list[Report]:
    """The committed results, in the order of `ERASED`."""
    return load_results("dhbe", list(ERASED), Report)


def table(reports: Sequence[Report]) -> str:
    """Markdown, one line per point."""
    header = ("victim", "epochs", "drawings", "CA", "ASR", "so answered without it", "ASR, 4 copies", "ASR, 9 copies")
    rows = []
    for report in reports:
        for number, point in enumerate(report.curve):
            amplified = point.exams.amplified or (None, None)
            rows.append(
                [
                    f"{report.name}, {60.0 * report.hours:.0f} minutes" if number == 0 else "",
                    str(point.epochs),
                    f"{point.drawings:,}",
                    percent(point.exams.marks.accuracy),
                    percent(point.exams.marks.attack_success),
                    f"{point.exams.marks.target_share.value:.2%}",
                    *(percent(item) for item in amplified),
                ]
            )
    return markdown(header, rows)


def main() -> int:
    """Run from the command line."""
    return run("dhbe", __doc__, ERASED, Report, measure, table)


if __name__ == "__main__":
    enter(main)
