"""GYM's Tables 2 to 4 on our victims: stage by stage, with the paper's recipe and with ours, beside FLIP and ShrinkPad-4.

    python -m benchmarks.gym measure --name gtsrb-lenet8    # one victim, trained if it is not cached
    python -m benchmarks.gym measure --all
    python -m benchmarks.gym table                          # the committed results as docs/repair.md holds them

Models are tuned on the defender's images, 5,000 or 2,000 of them; every figure is of the evaluation part, which nothing here
has seen, and through a preprocessor that draws the mean over ten draws.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch

from benchmarks.datasets import Parts
from benchmarks.entry import enter
from benchmarks.evaluated import Exam, Marks, examine
from benchmarks.plans import Plan
from benchmarks.reports import load_results, markdown, run, versions
from benchmarks.roster import REPORTED
from benchmarks.strip import shuffled
from benchmarks.victims import CACHE, bars, victim
from calibration.data import ImageSet, Progress
from calibration.discovery import discover
from calibration.repair.gym import Recipe
from calibration.repair.record import RepairFigures
from calibration.repair.repair import repair
from calibration.repair.settings import RepairSettings
from guard import Predictor
from guard.errors import InputError
from guard.predictors import wrap
from guard.preprocessors import Flip, GymIntensive, ShrinkPad

VICTIMS = ("cifar10-trojan-wm", "cifar10-trojan-sq", "cifar10-all-to-all", "cifar10-l2", "cifar10-l0", "gtsrb-lenet8")


class Paper(msgspec.Struct, frozen=True):
    """What the paper reports, as shares."""

    accuracy: float
    attack_success: float
    accuracy_after: float
    attack_success_after: float


PAPER = {
    "cifar10-trojan-wm": Paper(0.830, 1.000, 0.785, 0.045),
    "cifar10-trojan-sq": Paper(0.880, 1.000, 0.780, 0.040),
    "cifar10-all-to-all": Paper(0.875, 0.670, 0.670, 0.030),
    "cifar10-l2": Paper(0.900, 0.985, 0.810, 0.180),
    "cifar10-l0": Paper(0.895, 0.990, 0.825, 0.080),
    "gtsrb-lenet8": Paper(0.960, 0.985, 0.905, 0.035),
}
"""Tables 2 to 4, tuned and with lightweight preprocessing."""

_FEW = 2_000
_DRAWS = 10
_VIEWS = 4


class Tuned(msgspec.Struct, frozen=True, kw_only=True):
    """A tuned model.

    Attributes:
        recipe: Whose.
        images: It was given, held-out ones included.
        kernel: Of the lightweight function's medians.
        figures: What a defender sees.
        intensive: Through the intensive function, which the paper's recipe tunes for; None for ours.
        lightweight: Through the lightweight one.
        averaged: Through it, the answers to four draws averaged; None for the paper's recipe.
        seconds: Of the repair.
    """

    recipe: Recipe
    images: int
    kernel: int
    figures: RepairFigures
    intensive: Marks | None
    lightweight: Marks
    averaged: Marks | None
    seconds: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One victim.

    Attributes:
        name: Of the victim.
        command: That made this.
        plan: What was trained.
        before: Of the victim.
        intensive: Of the victim, through the intensive function.
        flip: Of the victim, through FLIP.
        shrink_pad: Of the victim, through ShrinkPad-4.
        tuned: Both recipes, on all images and on few.
        libraries: Versions.
    """

    name: str
    command: str
    plan: Plan
    before: Marks
    intensive: Marks
    flip: Marks
    shrink_pad: Marks
    tuned: list[Tuned]
    libraries: dict[str, str]

    def of(self, recipe: Recipe, images: int) -> Tuned:
        """One of the tuned models."""
        return next(item for item in self.tuned if item.recipe == recipe and item.images == images)


def measure_plan(name: str, plan: Plan, parts: Parts, cache: Path = CACHE) -> Report:
    """Tune and examine."""
    with bars() as progress:
        found = victim(plan, parts, cache, progress)
        if found.attack is None:
            raise InputError(f"expected a victim, got the clean model {name}")
        images = shuffled(parts.defender, 0)
        predictor = discover(wrap(found.model), images)
        exam = Exam.of(found.attack, parts.evaluation)
        sizes = (len(images), _FEW)
        recipes: tuple[Recipe, ...] = ("paper", "distilled")
        return Report(
            name=name,
            command=f"python -m benchmarks.gym measure --name {name}",
            plan=plan,
            before=examine(predictor, exam),
            intensive=examine(predictor, exam, GymIntensive(), _DRAWS),
            flip=examine(predictor, exam, Flip()),
            shrink_pad=examine(predictor, exam, ShrinkPad(), _DRAWS),
            tuned=[
                tuned(predictor, images.select(torch.arange(size)), exam, recipe, progress)
                for size in sizes
                for recipe in recipes
            ],
            libraries=versions(),
        )


def tuned(predictor: Predictor, clean: ImageSet, exam: Exam, recipe: Recipe, progress: Progress) -> Tuned:
    """Tune by a recipe, and examine."""
    started = time.monotonic()
    settings = RepairSettings(method="gym", recipe=recipe, allow_missing_classes=True)
    made = repair(predictor, clean, settings, progress=lambda what, *rest: progress(f"{what}, {recipe}, {len(clean)}", *rest))
    seconds = time.monotonic() - started
    if made.preprocessor is None:
        raise InputError("expected a preprocessor with GYM, got none")
    theirs, averaged = recipe == "paper", msgspec.structs.replace(made.preprocessor, views=_VIEWS)
    return Tuned(
        recipe=recipe,
        images=len(clean),
        kernel=made.preprocessor.kernel,
        figures=made.figures,
        intensive=examine(made.predictor, exam, GymIntensive(), _DRAWS) if theirs else None,
        lightweight=examine(made.predictor, exam, made.preprocessor, _DRAWS),
        averaged=None if theirs else examine(made.predictor, exam, averaged, _DRAWS // 2),
        seconds=seconds,
    )


def measure(name: str, parts: Parts, cache: Path = CACHE) -> Report:
    """One of the victims that the table reports."""
    return measure_plan(name, REPORTED[name], parts, cache)


def load_reports() -> list[Report]:
    """The committed results, in the order of `VICTIMS`."""
    return load_results("gym", VICTIMS, Report)


def table(reports: Sequence[Report]) -> str:
    """Markdown: GYM as the paper does it, and ours, on all images."""
    header = [
        "victim",
        "before",
        "inference (I)",
        "paper's recipe: tuned + I",
        "tuned + L",
        "ours: tuned + L",
        f"{_VIEWS} draws averaged",
        "the paper",
    ]
    rows = []
    for report in reports:
        most = max(item.images for item in report.tuned)
        theirs, ours, paper = report.of("paper", most), report.of("distilled", most), PAPER.get(report.name)
        rows.append(
            [
                report.name,
                _cell(report.before),
                _cell(report.intensive),
                _cell(theirs.intensive),
                _cell(theirs.lightweight, report.before),
                _cell(ours.lightweight, report.before),
                _cell(ours.averaged, report.before),
                ""
                if paper is None
                else f"{paper.accuracy:.3f} / {paper.attack_success:.3f} to {paper.accuracy_after:.3f} "
                f"({paper.accuracy_after - paper.accuracy:+.3f}) / {paper.attack_success_after:.3f}",
            ]
        )
    return markdown(header, rows)


def few_table(reports: Sequence[Report]) -> str:
    """Markdown: with 2,000 clean images, and the rivals that need none."""
    header = [
        "victim",
        "FLIP",
        "ShrinkPad-4",
        f"paper's recipe, {_FEW:,} images",
        f"ours, {_FEW:,} images",
        f"{_VIEWS} draws averaged",
        "a clean input so answered",
    ]
    return markdown(
        header,
        [
            [
                report.name,
                _cell(report.flip, report.before),
                _cell(report.shrink_pad, report.before),
                _cell(report.of("paper", _FEW).lightweight, report.before),
                _cell(report.of("distilled", _FEW).lightweight, report.before),
                _cell(report.of("distilled", _FEW).averaged, report.before),
                f"{report.before.target_share.value:.3f}",
            ]
            for report in reports
        ],
    )


def _cell(marks: Marks | None, before: Marks | None = None) -> str:
    """ACC with its interval, what it lost, and ASR."""
    if marks is None:
        return ""
    accuracy, success = marks.accuracy, marks.attack_success
    lost = "" if before is None else f" ({accuracy.value - before.accuracy.value:+.3f})"
    return f"{accuracy.value:.3f} [{accuracy.low:.3f}, {accuracy.high:.3f}]{lost} / {success.value:.3f}"


def main() -> int:
    """Run from the command line."""
    return run("gym", __doc__, {name: REPORTED[name] for name in VICTIMS}, Report, measure, table)


if __name__ == "__main__":
    enter(main)
