"""STRIP on BadNets victims of MNIST and GTSRB: false rejections, false acceptances, and what curtailing saves.

    python -m benchmarks.main_path choose --set gtsrb    # settings compared on a development victim, defender's images only
    python -m benchmarks.main_path report --set gtsrb    # the chosen setting and the default, on another victim, fresh images
    python -m benchmarks.main_path table                 # the committed results as the README's table

`choose` never sees the evaluation part; `report` uses what is frozen in CHOSEN below.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import time
from pathlib import Path

import msgspec
import torch
from rich.console import Console

from benchmarks.datasets import DEFAULT_FOLDER, Parts, SetName, load_parts
from benchmarks.training import Recipe, victim
from calibration import Calibration, Estimate, Evaluation, ImageSet, Settings, calibrate
from calibration.evaluation import judge, summarise
from guard import GuardError
from guard.detectors import Blend

RESULTS = Path(__file__).parent / "results"

_MNIST = Recipe(images="mnist", target_label=2, ratio=0.1, side=3, bottom=24, right=24, seed=1, epochs=4)
_GTSRB = Recipe(
    images="gtsrb",
    target_label=40,
    ratio=0.15,
    side=6,
    bottom=2,
    right=17,
    seed=3,
    epochs=28,
    decay=5e-4,
    shift=0.05,
    rotation=10.0,
    zoom=0.1,
    brightness=0.2,
    contrast=0.3,
)
DEVELOPMENT: dict[SetName, Recipe] = {"mnist": _MNIST, "gtsrb": _GTSRB}
"""Victims on which settings are chosen: another trigger, target and seed than those reported on."""

REPORTED: dict[SetName, Recipe] = {
    "mnist": msgspec.structs.replace(_MNIST, target_label=7, side=4, bottom=1, right=1, seed=12),
    "gtsrb": msgspec.structs.replace(_GTSRB, target_label=33, right=9, seed=12),
}

CANDIDATES: tuple[tuple[Blend, float], ...] = (("add", 1.0), ("add", 0.7), ("max", 1.0), ("demeaned", 1.0))
CHOSEN: dict[SetName, tuple[Blend, float]] = {"mnist": ("add", 0.7), "gtsrb": ("max", 1.0)}
DEFAULT: tuple[Blend, float] = ("add", 1.0)

_DEVELOPMENT_IMAGES = (2_100, 800)  # overlays and threshold, then fresh clean ones
_REPORT_TRIGGERED = 3_000
_EXACT_INPUTS = 10_000
_COMPARED = 2_000
_BATCH = 32


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """One setting on one victim."""

    blend: Blend
    alpha: float
    threshold_bits: float
    threshold_images: int
    evaluation: Evaluation
    mean_passes_clean: float
    mean_passes_triggered: float
    mean_passes_clean_one_at_a_time: float | None
    curtailed_inputs: int
    curtailed_verdicts_that_differ: int


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a results file holds."""

    command: str
    recipe: Recipe
    training_minutes: float
    measurements: list[Measurement]
    seconds: float
    libraries: dict[str, str]


def measure(calibration: Calibration, recipe: Recipe, clean: ImageSet, triggered: ImageSet, exact_inputs: int) -> Measurement:
    """All figures of one calibrated setting; curtailed verdicts are compared with full ones on `exact_inputs` inputs."""
    guard, strip, threshold = calibration.guard(), calibration.strip, calibration.threshold.value
    full_clean, full_triggered = judge(guard, clean, "clean"), judge(guard, triggered, "triggered")
    passes: dict[str, list[int]] = {"clean": [], "triggered": []}
    compared = differ = 0
    for kind, images, full in (("clean", clean, full_clean), ("triggered", triggered, full_triggered)):
        for rows in torch.arange(min(len(images), max(0, exact_inputs - compared))).split(_BATCH):
            found = strip.inspect(images.images(rows), threshold)
            passes[kind] += found.passes.tolist()
            differ += int((found.exceeds != torch.from_numpy(full.scores[rows.numpy()] >= threshold)).sum())
        compared += len(passes[kind])
    return Measurement(
        blend=strip.blend,
        alpha=strip.alpha,
        threshold_bits=-threshold,
        threshold_images=calibration.threshold.images,
        evaluation=summarise(full_clean, clean.labels, full_triggered, triggered.labels, recipe.target_label),
        mean_passes_clean=sum(passes["clean"]) / max(1, len(passes["clean"])),
        mean_passes_triggered=sum(passes["triggered"]) / max(1, len(passes["triggered"])),
        mean_passes_clean_one_at_a_time=calibration.profile.detectors[0].mean_passes,
        curtailed_inputs=compared,
        curtailed_verdicts_that_differ=differ,
    )


def stamped(recipe: Recipe, images: ImageSet, count: int) -> ImageSet:
    """The first images of other classes than the target, with the trigger and their true labels."""
    others = images.select(torch.nonzero(images.known_labels != recipe.target_label).squeeze(1)[:count])
    return ImageSet((recipe.attack.trigger(others.images(slice(None))) * 255.0).round().to(torch.uint8), others.labels)


def shuffled(images: ImageSet, seed: int) -> ImageSet:
    """The same images in a random order: files are often sorted by class."""
    return images.select(torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)))


def choose(parts: Parts, recipe: Recipe) -> tuple[float, list[Measurement]]:
    """Compare candidates on a development victim, with the defender's images alone."""
    model, minutes = victim(recipe, parts.attacker)
    defender = shuffled(parts.defender, recipe.seed)
    set_aside, fresh = _DEVELOPMENT_IMAGES
    clean = defender.select(torch.arange(set_aside, set_aside + fresh))
    attacked = stamped(recipe, defender.select(torch.arange(set_aside + fresh, len(defender))), fresh)
    measurements = []
    for blend, alpha in CANDIDATES:
        settings = Settings(blend=blend, alpha=alpha, allow_missing_classes=True)
        calibration = calibrate(model, defender.select(torch.arange(set_aside)), settings)
        measurements.append(show(measure(calibration, recipe, clean, attacked, 2 * fresh)))
    return minutes, measurements


def report(parts: Parts, recipe: Recipe) -> tuple[float, list[Measurement]]:
    """The chosen setting and the default, on a victim that no choice has seen, on fresh images."""
    model, minutes = victim(recipe, parts.attacker)
    defender = shuffled(parts.defender, 0).select(torch.arange(5_000))
    evaluation = shuffled(parts.evaluation, 0)
    attacked = stamped(recipe, evaluation, _REPORT_TRIGGERED)
    measurements = []
    for setting in dict.fromkeys((CHOSEN[recipe.images], DEFAULT)):
        blend, alpha = setting
        calibration = calibrate(model, defender, Settings(blend=blend, alpha=alpha))
        if setting == CHOSEN[recipe.images]:
            found = measure(calibration, recipe, evaluation, attacked, _EXACT_INPUTS)
        else:  # for comparison, on fewer images
            some = torch.arange(_COMPARED)
            found = measure(calibration, recipe, evaluation.select(some), attacked.select(some), 2 * _COMPARED)
        measurements.append(show(found))
    return minutes, measurements


def show(measurement: Measurement) -> Measurement:
    """Print one line of figures."""
    figures = measurement.evaluation
    named = {
        "CA": figures.clean_accuracy,
        "ASR": figures.attack_success_rate,
        "FRR": figures.frr,
        "FAR": figures.far_successful,
        "FAR all": figures.far,
        "AUROC": figures.auroc,
    }
    text = "  ".join(f"{name} {estimate.value:.4f}" for name, estimate in named.items() if estimate is not None)
    Console().print(
        f"{measurement.blend} {measurement.alpha:g}: {text}  passes {measurement.mean_passes_clean:.1f}  "
        f"differ {measurement.curtailed_verdicts_that_differ} of {measurement.curtailed_inputs}"
    )
    return measurement


def load_report(step: str, name: SetName) -> Report:
    """A committed result."""
    return msgspec.json.decode((RESULTS / f"main_path_{step}_{name}.json").read_bytes(), type=Report)


def table() -> str:
    """The committed reports as a Markdown table."""
    lines = [
        "| victim | blend | CA | ASR unguarded | FRR | FAR, successful attacks | FAR, all | AUROC | passes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    names: tuple[SetName, ...] = ("mnist", "gtsrb")
    for name in names:
        report = load_report("report", name)
        victim_name = f"{name.upper()}, label {report.recipe.target_label}"
        for measured in report.measurements:
            found = measured.evaluation
            default = ", the default" if (measured.blend, measured.alpha) == DEFAULT else ""
            cells = [
                victim_name,
                f"`{measured.blend}` {measured.alpha:g}{default}",
                _percent(found.clean_accuracy),
                _percent(found.attack_success_rate),
                _percent(found.frr),
                _percent(found.far_successful),
                _percent(found.far),
                "" if found.auroc is None else f"{found.auroc.value:.4f}",
                f"{measured.mean_passes_clean:.1f}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _percent(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    return f"{estimate.value:.2%} [{estimate.low * 100:.2f}, {estimate.high * 100:.2f}]"


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["choose", "report", "table"])
    parser.add_argument("--set", choices=["mnist", "gtsrb"], dest="name", help="for choose and report")
    parser.add_argument("--data", type=Path, default=DEFAULT_FOLDER, help="folder with mnist.npz and gtsrb.webp.npz")
    arguments = parser.parse_args()
    if arguments.step == "table":
        Console(width=300).print(table(), markup=False, highlight=False)
        return
    if arguments.name is None:
        parser.error("expected --set mnist or --set gtsrb")
    started = time.monotonic()
    recipe = (DEVELOPMENT if arguments.step == "choose" else REPORTED)[arguments.name]
    step = choose if arguments.step == "choose" else report
    minutes, measurements = step(load_parts(arguments.name, arguments.data), recipe)
    RESULTS.mkdir(exist_ok=True)
    result = Report(
        command=f"python -m benchmarks.main_path {arguments.step} --set {arguments.name}",
        recipe=recipe,
        training_minutes=minutes,
        measurements=measurements,
        seconds=time.monotonic() - started,
        libraries={name: importlib.metadata.version(name) for name in ("torch", "numpy", "scipy", "scikit-learn")},
    )
    path = RESULTS / f"main_path_{arguments.step}_{arguments.name}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")


if __name__ == "__main__":
    try:
        main()
    except GuardError as problem:
        raise SystemExit(str(problem)) from None
