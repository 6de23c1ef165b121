"""Does the red team choose well? Its setting against every fixed one, on real victims.

    python -m benchmarks.red_team measure --name gtsrb-b
    python -m benchmarks.red_team measure --all
    python -m benchmarks.red_team table

For each victim, the red team gets a part of the defender's images; thresholds are set on the rest; FAR is measured on
triggered images of the evaluation part. Every fixed setting is measured on the same images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch

from benchmarks.datasets import Parts
from benchmarks.entry import enter
from benchmarks.fixed import Fixed, measure_setting, settings
from benchmarks.plans import Plan
from benchmarks.reports import load_results, markdown, percent, run, versions
from benchmarks.roster import REPORTED
from benchmarks.strip import as_onnx, evaluation_images, shuffled
from benchmarks.victims import CACHE, bars, victim
from calibration.discovery import discover
from calibration.red_team import RedTeam, red_team, split
from calibration.settings import named
from guard.errors import InputError
from guard.predictors import wrap

VICTIMS = (
    "mnist-a",
    "mnist-conv-badnets",
    "mnist-blended",
    "gtsrb-b",
    "gtsrb-lenet8",
    "gtsrb-multi-target",
    "cifar10-c",
    "cifar10-d",
    "cifar10-two-triggers",
    "cifar10-trojan-sq",
)
"""Attacks that STRIP can see; on the others every setting is as blind."""

ALLOWED = 0.01
"""By how much the choice's FAR may be over the best fixed setting's."""

_COMPARED = 700  # overlays and threshold of each fixed setting
_TRIGGERED = 300
_CLEAN = 1_500


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The choice and the alternatives, on one victim.

    Attributes:
        name: Of the victim in `REPORTED`.
        command: That made this.
        plan: What was trained.
        found: What the red team said.
        fixed: Every candidate with N = 100, calibrated on a few images that the red team did not see.
        chosen: The choice, calibrated on the same few.
        calibrated: The choice, calibrated on all images that the red team did not see, on fresh clean images.
        libraries: Versions.
    """

    name: str
    command: str
    plan: Plan
    found: RedTeam
    fixed: list[Fixed]
    chosen: Fixed
    calibrated: Fixed
    libraries: dict[str, str]

    @property
    def best(self) -> Fixed:
        """The best fixed setting in hindsight."""
        return min(self.fixed, key=far)

    @property
    def within(self) -> bool:
        """Whether the choice does as well, give or take a point."""
        return far(self.chosen) <= far(self.best) + ALLOWED


def far(fixed: Fixed) -> float:
    """Among successful attacks."""
    rate = fixed.evaluation.far_successful
    if rate is None:
        raise InputError("expected attacks that succeed, got none: is the victim trained?")
    return rate.value


def measure(name: str, parts: Parts, cache: Path = CACHE) -> Report:
    """Red-team one victim and measure its choice."""
    plan = REPORTED[name]
    with bars() as progress:
        found = victim(plan, parts, cache, progress)
        ours, rest = split(shuffled(parts.defender, 1), 0)
        team = red_team(discover(wrap(found.model), ours), ours, progress=progress)
        backend = as_onnx(found, parts, cache)
        probe = evaluation_images(found, parts, _CLEAN, _TRIGGERED)
        quick = dataclasses.replace(probe, clean=probe.clean.select(torch.arange(1)))  # the FRR of these is not reported
        few = rest.select(torch.arange(_COMPARED))
        fixed = [measure_setting(backend, item, few, quick, progress) for item in settings()]
        same = [item for item in fixed if item.setting == team.chosen]
        chosen = same[0] if same else measure_setting(backend, team.chosen, few, quick, progress)
        calibrated = measure_setting(backend, team.chosen, rest, probe, progress)
    return Report(
        name=name,
        command=f"python -m benchmarks.red_team measure --name {name}",
        plan=plan,
        found=team,
        fixed=fixed,
        chosen=chosen,
        calibrated=calibrated,
        libraries=versions(),
    )


def load_reports() -> list[Report]:
    """The committed results, in the order of `VICTIMS`."""
    return load_results("red_team", VICTIMS, Report)


def table(reports: Sequence[Report]) -> str:
    """Markdown."""
    names = [named(item.blend, item.alpha) for item in settings()]
    rows = []
    for report in reports:
        estimated = [
            item.far.value
            for plant in report.found.planted
            if plant.say == "decides"
            for item in plant.figures
            if item.setting == report.found.chosen
        ]
        rows.append(
            [
                report.name,
                str(report.found.chosen),
                *(f"{far(item):.1%}" for item in report.fixed),
                percent(report.chosen.evaluation.far_successful),
                "yes" if report.within else "no",
                f"{min(estimated):.1%} to {max(estimated):.1%}",
                percent(report.calibrated.evaluation.frr),
                f"{report.found.seconds:.0f}",
            ]
        )
    return markdown(["victim", "choice", *names, "FAR of the choice", "within a point", "estimated", "FRR", "seconds"], rows)


def main() -> int:
    """Run from the command line."""
    return run("red_team", __doc__, {name: REPORTED[name] for name in VICTIMS}, Report, measure, table)


if __name__ == "__main__":
    enter(main)
