"""A page to look at: what was calibrated or measured, and the entropy distributions behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from calibration.calibrate import Calibration
from calibration.evaluation import Evaluation, Judged
from calibration.page import Section, png, render
from calibration.repair.figures import preprocessor_words
from calibration.statistics import Estimate
from calibration.thresholds import joint_rate
from guard import Guard

_CLEAN, _TRIGGERED, _LINE = "#3b6ea8", "#c8553d", "#222222"


@final
@dataclass(frozen=True)
class Entropies:
    """What one detector saw.

    Attributes:
        detector: Its name.
        threshold: Bits.
        clean: (n,), bits, of clean images, all passes.
        triggered: (m,), of triggered images.
    """

    detector: str
    threshold: float
    clean: NDArray[np.float32]
    triggered: NDArray[np.float32] | None = None


FIGURES = {
    "clean_accuracy": "Clean accuracy, detectors off",
    "guarded_clean_accuracy": "Clean accuracy, guarded",
    "attack_success_rate": "Attack success, detectors off",
    "guarded_attack_success_rate": "Attack success, guarded",
    "frr": "Clean inputs rejected (FRR)",
    "far": "Triggered inputs accepted (FAR)",
    "far_successful": "FAR among successful attacks",
    "auroc": "AUROC of the score",
}
"""The figures of an evaluation, and what they are called on a page."""


def calibration_report(calibration: Calibration, further: Sequence[Section] = ()) -> bytes:
    """The page that lies beside a profile, HTML in one file; `further` sections come after the pictures."""
    thresholds = calibration.thresholds
    pictured = [
        Entropies(strip.name, -threshold.value, clean)
        for strip, threshold, clean in zip(calibration.strips, thresholds, calibration.clean_entropies, strict=True)
    ]
    limits = " or ".join(
        f"under {len(strip.overlays)} clean images superimposed by {strip.blend} is at most {-threshold.value:.4f} bits"
        for strip, threshold in zip(calibration.strips, thresholds, strict=True)
    )
    lead = (
        f"Inputs whose mean entropy {limits} are rejected. That was set for a false rejection rate of "
        f"{joint_rate(thresholds).value:.2%} from {thresholds[0].images} clean images."
    )
    caption = f"{_left(pictured)}; a trigger pushes entropy towards 0."
    overlays = "The first overlays, in the order in which they are tried"
    if len(calibration.strips) > 1:
        overlays += f"; a row for each of {', '.join(strip.name for strip in calibration.strips)}"
    return render(
        "Calibration",
        lead,
        [
            Section("Entropy of clean images", picture=entropy_figure(pictured), caption=caption),
            Section(overlays, picture=_montage([strip.overlays for strip in calibration.strips])),
            *further,
            Section("Settings", rows=_settings_rows(calibration)),
            _threshold_section(calibration),
        ],
    )


def evaluation_report(evaluation: Evaluation, guard: Guard, clean: Judged, triggered: Judged | None) -> bytes:
    """The page of an evaluation, HTML in one file.

    Args:
        evaluation: The figures.
        guard: That was evaluated.
        clean: The clean images, as it judged them.
        triggered: The triggered images.
    """
    rows = [(FIGURES[name], _estimate(getattr(evaluation, name))) for name in FIGURES]
    success, guarded = evaluation.attack_success_rate, evaluation.guarded_attack_success_rate
    lead = f"{evaluation.frr.value:.2%} of clean inputs are rejected."
    if success is not None and guarded is not None:
        lead += (
            f" The attack succeeds on {success.value:.2%} of triggered inputs without the guard, {guarded.value:.2%} with it."
        )
    pictured = judged_entropies(guard, clean, triggered)
    caption = f"{_left(pictured)}."
    return render(
        "Evaluation",
        lead,
        [
            Section("Entropy of clean and triggered images", picture=entropy_figure(pictured), caption=caption),
            Section("Figures, with 95% intervals", rows=rows),
            Section("Entropy thresholds", rows=[(item.detector, f"{item.threshold:.6f} bits") for item in pictured]),
        ],
    )


def judged_entropies(guard: Guard, clean: Judged, triggered: Judged | None) -> list[Entropies]:
    """What each detector of a guard saw, in bits."""
    return [
        Entropies(
            item.detector.name,
            -item.threshold,
            -clean.by_detector[number],
            None if triggered is None else -triggered.by_detector[number],
        )
        for number, item in enumerate(guard.detectors)
    ]


def entropy_figure(entropies: Sequence[Entropies]) -> bytes:
    """Histograms of entropies with the threshold, one for each detector, as PNG."""
    figure = Figure(figsize=(8, 0.6 + 3.0 * len(entropies)), layout="constrained")
    for axes, item in zip(figure.subplots(len(entropies), 1, squeeze=False)[:, 0], entropies, strict=True):
        groups = [(item.clean, "clean", _CLEAN)]
        if item.triggered is not None:
            groups.append((item.triggered, "triggered", _TRIGGERED))
        widest = max([item.threshold, *(float(values.max()) for values, _, _ in groups if len(values))])
        bins = np.linspace(0.0, widest * 1.02 + 1e-6, 61)
        for values, name, colour in groups:
            weights = np.full(len(values), 100.0 / max(1, len(values)))
            axes.hist(values, bins=list(bins), weights=weights, alpha=0.7, color=colour, label=f"{name} ({len(values)})")
        axes.axvline(item.threshold, color=_LINE, linestyle="--", linewidth=1.2, label=f"threshold {item.threshold:.4f}")
        axes.set_ylabel("share of images (%)")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        if len(entropies) > 1:
            axes.set_title(item.detector, fontsize=10, loc="left")
    axes.set_xlabel("mean entropy under superimposed images (bits)")
    return png(figure)


def _left(entropies: Sequence[Entropies]) -> str:
    return f"Left of the line {'an input is rejected' if len(entropies) == 1 else 'of any detector an input is rejected'}"


def _montage(overlays: Sequence[Tensor]) -> bytes:
    """The first overlays: two rows of a lone detector's, a row of each of several."""
    rows = [overlays[0][:10], overlays[0][10:20]] if len(overlays) == 1 else [images[:10] for images in overlays]
    figure = Figure(figsize=(8, 0.95 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), 10, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for line, images in zip(grid, rows, strict=True):
        for axes, image in zip(line, images, strict=False):
            axes.imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
    return png(figure)


def _settings_rows(calibration: Calibration) -> list[tuple[str, str]]:
    profile, spec = calibration.profile, calibration.profile.input
    overlays = sum(len(strip.overlays) for strip in calibration.strips)
    rows = [
        ("Model", f"{profile.model.kind}, {profile.model.num_classes} classes, returns {profile.model.output}"),
        ("Input", f"{'x'.join(map(str, spec.shape))} (C, H, W), {spec.layout}, {spec.dtype}"),
        ("Blend", " or ".join(f"{strip.blend}, alpha {strip.alpha:g}" for strip in calibration.strips)),
        ("Overlays", str(overlays)),
        ("Preprocessor", preprocessor_words(profile.preprocessor)),
        ("Detectors look at", "the model" if profile.tripwire is None else "the original of the repaired model (tripwire)"),
        ("Seed", str(profile.seed)),
    ]
    if profile.clean_accuracy is not None:
        rows.append(("Clean accuracy of the model", f"{profile.clean_accuracy:.2%}"))
    passes = [record.mean_passes for record in profile.detectors if record.mean_passes is not None]
    rows.append(("Mean forward passes of a clean input", f"{sum(passes):.1f} of {overlays}"))
    return rows + [(f"Version of {name}", version) for name, version in profile.libraries.items()]


def _threshold_section(calibration: Calibration) -> Section:
    """A column per detector, and one for the guard as a whole where there are several."""
    records, several = calibration.thresholds, len(calibration.thresholds) > 1
    joint = joint_rate(records)
    rows: list[tuple[str, ...]] = [
        ("Entropy threshold", *(f"{-item.value:.6f} bits" for item in records), ""),
        ("Method", *(item.method if item.rank is None else f"{item.method}, rank {item.rank}" for item in records), ""),
        ("False rejection rate asked for", *(f"{item.frr:.2%}" for item in records), f"{joint.value:.2%}"),
        (
            "95% interval of the rate",
            *(f"{item.frr_low:.2%} to {item.frr_high:.2%}" for item in records),
            f"bounds {joint.low:.2%} to {joint.high:.2%}",
        ),
        ("Clean images that set it", *(str(item.images) for item in records), ""),
    ]
    sure = [item.confidence for item in records if item.confidence is not None]
    if sure:
        together = 1.0 - sum(1.0 - item for item in sure)
        rows.append(("Confidence asked for", *(f"{item:.4g}" for item in sure), f"{together:.4g}"))
    if several:
        header = ("", *(strip.name for strip in calibration.strips), "either of them")
        return Section("Thresholds", header=header, rows=rows)
    return Section("Threshold", rows=[row[:2] for row in rows])


def _estimate(estimate: Estimate | None) -> str:
    return "not measured" if estimate is None else f"{estimate.value:.4f}  [{estimate.low:.4f}, {estimate.high:.4f}]"
