"""Neural Cleanse as it was published, on the models that `benchmarks.inspection` scans.

    python -m benchmarks.neural_cleanse measure --name gtsrb-b    # one model, trained if it is not cached
    python -m benchmarks.neural_cleanse measure --all
    python -m benchmarks.neural_cleanse table     # the committed results as docs/inspection-figures.md holds them

The plain schedule, 1,000 steps for every label, and the verdict by the anomaly index alone, for three seeds; all labels of a
model are optimised together. What an interrupted run has done is kept beside the victims, and gone on from.
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
from benchmarks.scans import defenders_images
from benchmarks.victims import CACHE, bars, victim
from calibration.checkpoints import Checkpoints
from calibration.data import ImageSet, Progress
from calibration.discovery import discover
from calibration.engine import Engine
from calibration.frozen import frozen
from calibration.inspection.anomaly import anomaly_indices
from calibration.inspection.mask_verdicts import INDEX
from calibration.inspection.neural_cleanse import recover_triggers
from calibration.inspection.search import Search
from calibration.inspection.triggers import Goals
from guard import Predictor
from guard.predictors import wrap

_SEEDS = (0, 1, 2)
_PLAIN = Search(steps=1008).plain()


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One seed's.

    Attributes:
        seed: Of the draws.
        indices: Of each label, positive below the median.
        sizes: L1, in pixels, of each label.
        passes: Images that went through the model.
    """

    seed: int
    indices: tuple[float, ...]
    sizes: tuple[float, ...]
    passes: int

    @property
    def accused(self) -> list[int]:
        """Labels whose index is over 2."""
        return [label for label, index in enumerate(self.indices) if index > INDEX]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One model.

    Attributes:
        name: Of the model.
        command: That made this.
        plan: What was trained.
        targets: Labels that are infected in truth.
        runs: One for each seed.
        libraries: Versions.
    """

    name: str
    command: str
    plan: Plan
    targets: tuple[int, ...]
    runs: tuple[Run, ...]
    libraries: dict[str, str]


def measure(name: str, parts: Parts, cache: Path = CACHE) -> Report:
    """Run it on one of the models."""
    plan = SCANNED[name]
    with bars() as progress:
        found = victim(plan, parts, cache, progress)
        clean = defenders_images(parts)
        predictor = discover(wrap(found.model), clean)
        checkpoints = Checkpoints(cache.parent / "neural_cleanse" / name, [name, predictor.backend.fingerprint()])
        runs = [_run(predictor, clean, seed, checkpoints.within(f"seed-{seed}"), progress) for seed in _SEEDS]
        checkpoints.remove()
    return Report(
        name=name,
        command=f"python -m benchmarks.neural_cleanse measure --name {name}",
        plan=plan,
        targets=targets_of(found.attack),
        runs=tuple(runs),
        libraries=versions(),
    )


def _run(predictor: Predictor, clean: ImageSet, seed: int, checkpoints: Checkpoints, progress: Progress) -> Run:
    engine, images = Engine(), clean.images(slice(0, 1000))
    answers = frozen(predictor, images[:2])
    goals = Goals.all_labels(predictor.num_classes)
    found = recover_triggers(answers, images, goals, _PLAIN, seed, engine, checkpoints, progress=progress)
    return Run(
        seed=seed,
        indices=tuple(anomaly_indices(found.sizes).tolist()),
        sizes=tuple(found.sizes.tolist()),
        passes=int(found.passes.sum()),
    )


def load_reports() -> list[Report]:
    """The committed results, in the order of `SCANNED`."""
    return load_results("neural_cleanse", list(SCANNED), Report)


def table(reports: Sequence[Report]) -> str:
    """Markdown, one line per model and seed."""
    header = ("model", "infected in truth", "seed", "index over 2: missed, false alarms", "index of each label, from 0")
    rows = []
    for report in reports:
        for own in report.runs:
            missed = sorted(set(report.targets) - set(own.accused))
            wrong = sorted(set(own.accused) - set(report.targets))
            errors = [f"missed {listed(missed)}"] * bool(missed) + [f"false alarm {listed(wrong)}"] * bool(wrong)
            shown = " ".join(
                f"**{value:.1f}**" if label in report.targets else f"{value:.1f}" for label, value in enumerate(own.indices)
            )
            rows.append([report.name, listed(report.targets), str(own.seed), "; ".join(errors) or "right", shown])
    return markdown(header, rows)


def main() -> int:
    """Run from the command line."""
    return run("neural_cleanse", __doc__, SCANNED, Report, measure, table)


if __name__ == "__main__":
    enter(main)
