"""What STRIP takes beyond its forward passes: superimposing, entropies and bookkeeping, at batch 32 and N = 100.

    python -m benchmarks.speed.overhead measure --all    # on an idle machine
    python -m benchmarks.speed.overhead table

The very batches that STRIP gave to the model are kept and given to it once more, in turn with STRIP: what STRIP takes longer is
its own. On one thread, in PyTorch as it runs fastest and by ONNX Runtime, exact and sequential, and with all passes.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import final

import msgspec
import torch
from torch import Tensor

from benchmarks.datasets import Parts
from benchmarks.entry import enter
from benchmarks.plans import Plan
from benchmarks.reports import load_results, markdown, run, versions
from benchmarks.roster import REPORTED
from benchmarks.speed.timing import in_turn, median_ratio
from benchmarks.strip import as_onnx, shuffled
from benchmarks.victims import CACHE, bars, victim
from calibration import PassesChoice, Settings, calibrate
from guard.detectors import Strip
from guard.images import Array
from guard.predictors import Backend, BackendKind

TIMED: Mapping[str, Plan] = {name: REPORTED[name] for name in ("mnist-a", "gtsrb-b")}
_CHOICES: tuple[PassesChoice, ...] = ("exact", "sequential")
_NEVER = -1e9
_DEFENDER, _BATCH, _ROUNDS = 1_500, 32, 15


class Overhead(msgspec.Struct, frozen=True, kw_only=True):
    """One way to run a batch; medians.

    Attributes:
        runs: What runs the model.
        passes: Spent on an input: `exact`, `sequential`, or `all`.
        mean_passes: Of the batch.
        forward_ms: Of the forward passes.
        over: What STRIP takes beyond them, of their time, round by round.
    """

    runs: str
    passes: str
    mean_passes: float
    forward_ms: float
    over: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One victim.

    Attributes:
        name: Of the victim.
        command: That made this.
        plan: What was trained.
        overheads: Of each way.
        libraries: Versions.
    """

    name: str
    command: str
    plan: Plan
    overheads: list[Overhead]
    libraries: dict[str, str]


@final
@dataclass(frozen=True)
class Keeping:
    """A backend that keeps a copy of what it is given."""

    inner: Backend
    batches: list[Array] = field(default_factory=list)

    @property
    def kind(self) -> BackendKind:
        """The inner one's."""
        return self.inner.kind

    @property
    def batch_size(self) -> int | None:
        """The inner one's."""
        return self.inner.batch_size

    def __call__(self, batch: Array) -> object:
        """Run it."""
        self.batches.append(batch.clone() if isinstance(batch, Tensor) else batch.copy())
        return self.inner(batch)

    def fingerprint(self) -> str | None:
        """The inner one's."""
        return self.inner.fingerprint()


def measure(name: str, parts: Parts, cache: Path = CACHE) -> Report:
    """Measure one victim."""
    torch.set_num_threads(1)
    plan = TIMED[name]
    images = shuffled(parts.evaluation, 0).images(slice(0, _BATCH))
    overheads = []
    with bars() as progress:
        found = victim(plan, parts, cache, progress)
        defender = shuffled(parts.defender, 0).select(torch.arange(_DEFENDER))
        for runs, model in (("PyTorch", found.model), ("ONNX Runtime", as_onnx(found, parts, cache))):
            for passes in _CHOICES:
                made = calibrate(model, defender, Settings(passes=passes), progress=progress)
                overheads.append(_overhead(runs, passes, made.strips[0], made.thresholds[0].value, images))
                if passes == "exact":
                    overheads.append(_overhead(runs, "all", made.strips[0], _NEVER, images))
    return Report(
        name=name,
        command=f"python -m benchmarks.speed.overhead measure --name {name}",
        plan=plan,
        overheads=overheads,
        libraries=versions(),
    )


def _overhead(runs: str, passes: str, strip: Strip, threshold: float, images: Tensor) -> Overhead:
    predictor = strip.predictor
    keeping = Keeping(predictor.backend)
    spent = replace(strip, predictor=replace(predictor, backend=keeping)).inspect(images, threshold).passes
    seconds = in_turn(
        {"strip": partial(strip.inspect, images, threshold), "forward": partial(_run, predictor.backend, keeping.batches)},
        _ROUNDS,
    )
    return Overhead(
        runs=runs if runs != "PyTorch" else f"PyTorch, {predictor.execution}",
        passes=passes,
        mean_passes=float(spent.float().mean()),
        forward_ms=1_000.0 * statistics.median(seconds["forward"]),
        over=median_ratio(seconds["strip"], seconds["forward"]) - 1.0,
    )


def _run(backend: Backend, batches: Sequence[Array]) -> None:
    with torch.inference_mode():
        for batch in batches:
            backend(batch)


def load_reports() -> list[Report]:
    """The committed results, in the order of `TIMED`."""
    return load_results("speed_overhead", list(TIMED), Report)


def table(reports: Sequence[Report]) -> str:
    """Markdown."""
    header = ("victim", "runs in", "passes", "of an input", "forward passes, ms", "STRIP's own, of that")
    rows = [
        [
            "" if number else report.name,
            item.runs,
            item.passes,
            f"{item.mean_passes:.1f}",
            f"{item.forward_ms:.1f}",
            f"{item.over:.1%}",
        ]
        for report in reports
        for number, item in enumerate(report.overheads)
    ]
    return markdown(header, rows)


def main() -> int:
    """Run from the command line."""
    return run("speed_overhead", __doc__, TIMED, Report, measure, table)


if __name__ == "__main__":
    enter(main)
