"""STRIP over a model that PyTorch runs: as it is, with channels last, and with that in bfloat16, at N = 100, sequential.

Against STRIP as others run it, all N passes over the same model as it is.

    python -m benchmarks.speed.precision measure --all    # on an idle machine
    python -m benchmarks.speed.precision table

The first two have one threshold, for they give the same answers but for rounding; bfloat16 has its own, as `guard calibrate
--precision bfloat16` sets it, and boundaries of its own. Timed in turn on clean images of the evaluation part, 32 at once, on
two threads; rates are of that part, too.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec
import torch

from benchmarks.datasets import Parts
from benchmarks.entry import enter
from benchmarks.plans import Plan
from benchmarks.reports import load_results, markdown, percent, run, versions
from benchmarks.roster import REPORTED
from benchmarks.speed.rivals import RIVALS, Pixels, Rival
from benchmarks.speed.timing import in_turn, median_ratio
from benchmarks.strip import evaluation_images, shuffled
from benchmarks.victims import CACHE, bars, victim
from calibration import Settings, calibrate
from calibration.statistics import Estimate, proportion
from guard.detectors import Strip
from guard.predictors import Execution
from guard.predictors.execution import ORDINARY

TIMED: Mapping[str, Plan] = {name: REPORTED[name] for name in ("mnist-a", "gtsrb-b", "cifar10-c")}
_LAST = Execution(memory_format="channels-last")
_SETTINGS = Settings(passes="sequential")
_DEFENDER, _CLEAN, _TRIGGERED = 2_500, 2_000, 600
_TIMED, _BATCH, _ROUNDS, _THREADS = 128, 32, 7, 2
_RIVALS: Mapping[str, Rival] = {name: RIVALS[name] for name in ("original notebook", "ART 1.20.1")}


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """One way to run the model.

    Attributes:
        execution: Which.
        per_second: Clean inputs inspected.
        faster: Than as it is, round by round.
        than_others: Times as fast as each of the others, round by round.
        frr: Of clean images.
        far: Of attacks that succeed unguarded.
        turned: Verdicts on the clean images that are not those of the same detector, at the same threshold, with the model as
            it is.
    """

    execution: Execution
    per_second: float
    faster: float
    than_others: dict[str, float]
    frr: Estimate
    far: Estimate
    turned: Estimate


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One victim.

    Attributes:
        name: Of the victim.
        command: That made this.
        plan: What was trained.
        speeds: As it is first.
        libraries: Versions.
    """

    name: str
    command: str
    plan: Plan
    speeds: list[Speed]
    libraries: dict[str, str]


def measure(name: str, parts: Parts, cache: Path = CACHE) -> Report:
    """Measure one victim."""
    torch.set_num_threads(_THREADS)
    plan = TIMED[name]
    with bars() as progress:
        found = victim(plan, parts, cache, progress)
        defender = shuffled(parts.defender, 0).select(torch.arange(_DEFENDER))
        probe = evaluation_images(found, parts, _CLEAN, _TRIGGERED)
        full = calibrate(found.model, defender, _SETTINGS, progress=progress)
        reduced = calibrate(found.model, defender, msgspec.structs.replace(_SETTINGS, precision="bfloat16"), progress=progress)
    ways = {execution: (_run(full.strips[0], execution), full.thresholds[0].value) for execution in (ORDINARY, _LAST)}
    ways[msgspec.structs.replace(_LAST, precision="bfloat16")] = (
        _run(reduced.strips[0], msgspec.structs.replace(_LAST, precision="bfloat16")),
        reduced.thresholds[0].value,
    )
    clean, triggered = probe.clean.images(slice(None)), probe.triggered.images(slice(None))
    triggered = triggered[full.predictor(triggered).argmax(dim=1) == probe.targets]
    timed: dict[str, Callable[[], object]] = {
        str(execution): partial(_rejected, *way, clean[:_TIMED]) for execution, way in ways.items()
    }
    predictor, overlays = replace(full.predictor, execution=ORDINARY), full.strips[0].overlays.numpy()

    def predict(batch: Pixels) -> Pixels:
        answers: Pixels = predictor(torch.from_numpy(batch)).numpy()
        return answers

    for rival, method in _RIVALS.items():
        timed[rival] = partial(method, predict, clean[:_TIMED].numpy(), overlays)
    seconds = in_turn(timed, _ROUNDS)
    speeds = []
    for execution, way in ways.items():
        own, rejected = seconds[str(execution)], _rejected(*way, clean)
        as_it_is = rejected if execution == ORDINARY else _rejected(_run(way[0], ORDINARY), way[1], clean)
        speeds.append(
            Speed(
                execution=execution,
                per_second=_TIMED / statistics.median(own),
                faster=median_ratio(seconds[str(ORDINARY)], own),
                than_others={rival: median_ratio(seconds[rival], own) for rival in _RIVALS},
                frr=proportion(int(rejected.sum()), len(clean)),
                far=proportion(int((~_rejected(*way, triggered)).sum()), len(triggered)),
                turned=proportion(int((rejected != as_it_is).sum()), len(clean)),
            )
        )
    return Report(
        name=name,
        command=f"python -m benchmarks.speed.precision measure --name {name}",
        plan=plan,
        speeds=speeds,
        libraries=versions(),
    )


def _run(strip: Strip, execution: Execution) -> Strip:
    return replace(strip, predictor=replace(strip.predictor, execution=execution))


def _rejected(strip: Strip, threshold: float, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([strip.inspect(part, threshold).exceeds for part in images.split(_BATCH)])


def load_reports() -> list[Report]:
    """The committed results, in the order of `TIMED`."""
    return load_results("speed_precision", list(TIMED), Report)


def table(reports: Sequence[Report]) -> str:
    """Markdown."""
    header = ("victim", "PyTorch runs it", "inputs/s", "as fast as it is", *_RIVALS, "FRR", "FAR", "verdicts turned")
    rows = []
    for report in reports:
        for number, item in enumerate(report.speeds):
            rates = [percent(item.frr), percent(item.far), percent(item.turned) if number else ""]
            rows.append(
                [
                    "" if number else report.name,
                    str(item.execution),
                    f"{item.per_second:.0f}",
                    f"{item.faster:.1f} times",
                    *(f"{item.than_others[rival]:.1f} times" for rival in _RIVALS),
                    *rates,
                ]
            )
    return markdown(header, rows)


def main() -> int:
    """Run from the command line."""
    return run("speed_precision", __doc__, TIMED, Report, measure, table)


if __name__ == "__main__":
    enter(main)
