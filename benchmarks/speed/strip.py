"""Inputs inspected per second: STRIP here, exact, by votes and sequential, against STRIP as others run it, at N = 100.

    python -m benchmarks.speed.strip measure --all    # on an idle machine
    python -m benchmarks.speed.strip table

All of them run the same ONNX session with two threads, on the same clean images of the evaluation part, in turn, several times
over: figures are medians, and ratios are of one round each. FAR is at a false rejection rate of 1%, each with a threshold from
the same images of the defender's part, so that a fast one that sees less is told from one that is as good. "exact, add" adds,
as the notebook does, but stays within [0, 1].
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.datasets import Parts
from benchmarks.entry import enter
from benchmarks.plans import Plan
from benchmarks.reports import load_results, markdown, percent, run, versions
from benchmarks.roster import REPORTED
from benchmarks.speed.rivals import RIVALS, Pixels, Rival
from benchmarks.speed.timing import in_turn, median_ratio
from benchmarks.strip import Probe, as_onnx, evaluation_images, shuffled
from benchmarks.victims import CACHE, bars, name_of, victim
from calibration import Calibration, Settings, calibrate
from calibration.statistics import Estimate, proportion
from calibration.thresholds import set_threshold
from guard.predictors.onnx import OnnxBackend

TIMED: Mapping[str, Plan] = {name: REPORTED[name] for name in ("mnist-a", "gtsrb-b", "cifar10-c")}
OURS: Mapping[str, Settings] = {
    "exact": Settings(),
    "exact, add": Settings(blend="add"),
    "votes": Settings(passes="votes"),
    "sequential": Settings(passes="sequential"),
}
"""STRIP as this guard runs it; all but `exact, add` with the default blend."""

_OVERLAYS, _FRR, _BATCH, _THREADS = 100, 0.01, 32, 2
_ROUNDS = {"mnist": 25, "gtsrb": 5, "cifar10": 5}  # of MNIST's models one takes milliseconds
_DEFENDER, _SETTING = 2_500, 1_100  # clean images to calibrate ours, and, less the overlays, a rival's threshold
_TIMED, _TRIGGERED = 128, 600
_MIXED = 500  # clean and as many triggered, in random order


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """One way to run STRIP.

    Attributes:
        name: Which.
        per_second: Clean inputs inspected.
        of_bare: The time of the model's own answers to the same inputs that it takes beside them, as a multiple.
        passes: Mean, of clean inputs.
        frr: Of clean inputs.
        far: Of attacks that succeed unguarded, accepted.
        mixed_seconds: For 500 clean and 500 triggered images in random order; None for the others.
    """

    name: str
    per_second: float
    of_bare: float
    passes: float
    frr: Estimate
    far: Estimate
    mixed_seconds: float | None = None


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One victim.

    Attributes:
        name: Of the victim.
        command: That made this.
        plan: What was trained.
        speeds: Ours and the others'.
        libraries: Versions.
    """

    name: str
    command: str
    plan: Plan
    speeds: list[Speed]
    libraries: dict[str, str]


def measure(name: str, parts: Parts, cache: Path = CACHE) -> Report:
    """Measure one victim."""
    torch.set_num_threads(1)  # as commands settle it: PyTorch's own threads, blending, would get in the session's way
    plan = TIMED[name]
    with bars() as progress:
        found = victim(plan, parts, cache, progress)
        as_onnx(found, parts, cache)
        backend = OnnxBackend.load(cache / f"{name_of(plan)}.onnx", threads=_THREADS)
        defender = shuffled(parts.defender, 0).select(torch.arange(_DEFENDER))
        probe = evaluation_images(found, parts, _MIXED, _TRIGGERED)
        made = {name: calibrate(backend, defender, settings, progress=progress) for name, settings in OURS.items()}
    predictor = made["exact"].predictor

    def predict(batch: Pixels) -> Pixels:
        answers: Pixels = predictor(torch.from_numpy(batch)).numpy()
        return answers

    several, triggered = probe.clean.images(slice(None)), _successful(probe, predict)
    clean, mixed = several[:_TIMED], torch.cat([several, triggered[:_MIXED]])
    mixed = mixed[torch.randperm(len(mixed), generator=torch.Generator().manual_seed(0))]
    aside, setting = defender.images(slice(0, _OVERLAYS)).numpy(), defender.images(slice(_OVERLAYS, _SETTING)).numpy()
    ways: dict[str, Callable[[], object]] = {"the bare model": lambda: [predictor(part) for part in clean.split(_BATCH)]}
    for choice, calibration in made.items():
        ways[choice] = partial(_passes, calibration, clean)
    for rival, method in RIVALS.items():
        ways[rival] = partial(_in_batches, method, predict, clean.numpy(), aside)
    seconds = in_turn(ways, _ROUNDS[plan.images])
    whole = in_turn(
        {choice: partial(_passes, calibration, mixed) for choice, calibration in made.items()}, _ROUNDS[plan.images]
    )
    speeds = []
    for way, calibration in made.items():
        rates = _rates(_rejected(calibration, several), _rejected(calibration, triggered))
        speed = _speed(way, seconds, _passes(calibration, clean), *rates)
        speeds.append(msgspec.structs.replace(speed, mixed_seconds=statistics.median(whole[way])))
    for rival, method in RIVALS.items():
        limit = np.float32(set_threshold(-method(predict, setting, aside).astype(np.float32), _FRR).value)
        entropies_of = (_in_batches(method, predict, images.numpy(), aside) for images in (several, triggered))
        rates = _rates(*(torch.from_numpy(-entropies.astype(np.float32) >= limit) for entropies in entropies_of))
        speeds.append(_speed(rival, seconds, _OVERLAYS, *rates))
    return Report(
        name=name,
        command=f"python -m benchmarks.speed.strip measure --name {name}",
        plan=plan,
        speeds=speeds,
        libraries=versions(),
    )


def _successful(probe: Probe, predict: Callable[[Pixels], Pixels]) -> torch.Tensor:
    images = probe.triggered.images(slice(None))
    answers = torch.from_numpy(predict(images.numpy())).argmax(dim=1)
    return images[answers == probe.targets]


def _rates(clean: torch.Tensor, triggered: torch.Tensor) -> tuple[Estimate, Estimate]:
    """False rejections and false acceptances, from what is rejected."""
    return proportion(int(clean.sum()), len(clean)), proportion(int((~triggered).sum()), len(triggered))


def _speed(name: str, seconds: Mapping[str, list[float]], passes: float, frr: Estimate, far: Estimate) -> Speed:
    return Speed(
        name=name,
        per_second=_TIMED / statistics.median(seconds[name]),
        of_bare=median_ratio(seconds[name], seconds["the bare model"]),
        passes=passes,
        frr=frr,
        far=far,
    )


def _passes(made: Calibration, images: torch.Tensor) -> float:
    strip, threshold = made.strips[0], made.thresholds[0].value
    return sum(int(strip.inspect(part, threshold).passes.sum()) for part in images.split(_BATCH)) / len(images)


def _rejected(made: Calibration, images: torch.Tensor) -> torch.Tensor:
    strip, threshold = made.strips[0], made.thresholds[0].value
    return torch.cat([strip.inspect(part, threshold).exceeds for part in images.split(_BATCH)])


def _in_batches(
    method: Rival,
    predict: Callable[[Pixels], Pixels],
    images: Pixels,
    overlays: Pixels,
) -> NDArray[np.float64]:
    return np.concatenate(
        [method(predict, images[start : start + _BATCH], overlays) for start in range(0, len(images), _BATCH)]
    )


def load_reports() -> list[Report]:
    """The committed results, in the order of `TIMED`."""
    return load_results("speed_strip", list(TIMED), Report)


def table(reports: Sequence[Report]) -> str:
    """Markdown: how many times as many inputs a second as each of the others."""
    header = (
        "victim",
        "STRIP",
        "inputs/s",
        "of the bare model's time",
        "passes",
        "FRR",
        "FAR",
        "500 + 500, s",
        *(f"{name}: faster" for name in OURS),
    )  # empty where a way of ours has not been measured
    rows = []
    for report in reports:
        ours = {item.name: item.per_second for item in report.speeds if item.name in OURS}
        for number, item in enumerate(report.speeds):
            rows.append(
                [
                    report.name if number == 0 else "",
                    item.name,
                    f"{item.per_second:.0f}",
                    f"{item.of_bare:.1f}",
                    f"{item.passes:.1f}",
                    percent(item.frr),
                    percent(item.far),
                    "" if item.mixed_seconds is None else f"{item.mixed_seconds:.2f}",
                    *(f"{ours[way] / item.per_second:.1f} times" if way in ours else "" for way in OURS),
                ]
            )
    return markdown(header, rows)


def main() -> int:
    """Run from the command line."""
    return run("speed_strip", __doc__, TIMED, Report, measure, table)


if __name__ == "__main__":
    enter(main)
