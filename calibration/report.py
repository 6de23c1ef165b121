"""A page to look at: what was calibrated or measured, and the entropy distributions behind it."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence

import jinja2
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from calibration.calibrate import Calibration
from calibration.evaluation import Evaluation
from calibration.statistics import Estimate
from guard.profile import ThresholdRecord

mpl.use("Agg", force=False)

_CLEAN, _TRIGGERED, _LINE = "#3b6ea8", "#c8553d", "#222222"

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title><style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } td, th { padding: .25rem 1rem .25rem 0; text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; } img { max-width: 100%; }
p.lead { font-size: 1.05rem; } .muted { color: #666; }
</style></head><body>
<h1>{{ title }}</h1>
<p class="lead">{{ lead }}</p>
{% for heading, picture, caption in pictures %}<h2>{{ heading }}</h2>
<img alt="{{ heading }}" src="data:image/png;base64,{{ picture }}"><p class="muted">{{ caption }}</p>{% endfor %}
{% for heading, rows in tables %}<h2>{{ heading }}</h2>
<table>{% for row in rows %}<tr>{% for cell in row %}<td{% if not loop.first %} class="number"{% endif %}>{{ cell }}</td>
{% endfor %}</tr>{% endfor %}</table>{% endfor %}
</body></html>
"""

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


def calibration_report(calibration: Calibration) -> bytes:
    """The page that lies beside a profile, HTML in one file."""
    record = calibration.profile.detectors[0]
    threshold = record.threshold
    picture = entropy_figure(calibration.clean_entropies, None, -threshold.value)
    lead = (
        f"Inputs whose mean entropy under {len(calibration.strip.overlays)} superimposed clean images is at most "
        f"{-threshold.value:.4f} bits are rejected. That was set for a false rejection rate of {threshold.frr:.2%} "
        f"from {threshold.images} clean images."
    )
    return _render(
        "Calibration",
        lead,
        [
            ("Entropy of clean images", picture, "Left of the line an input is rejected; a trigger pushes entropy towards 0."),
            ("The first overlays, in the order in which they are tried", _montage(calibration.strip.overlays[:20]), ""),
        ],
        [("Settings", _settings_rows(calibration)), ("Threshold", _threshold_rows(threshold))],
    )


def evaluation_report(
    evaluation: Evaluation, clean: NDArray[np.float32], triggered: NDArray[np.float32] | None, threshold: float
) -> bytes:
    """The page of an evaluation, HTML in one file.

    Args:
        evaluation: The figures.
        clean: Entropies of the clean images, bits, all passes.
        triggered: Entropies of the triggered images.
        threshold: In bits.
    """
    rows = [(FIGURES[name], _estimate(getattr(evaluation, name))) for name in FIGURES]
    success, guarded = evaluation.attack_success_rate, evaluation.guarded_attack_success_rate
    lead = f"{evaluation.frr.value:.2%} of clean inputs are rejected."
    if success is not None and guarded is not None:
        lead += (
            f" The attack succeeds on {success.value:.2%} of triggered inputs without the guard, {guarded.value:.2%} with it."
        )
    picture = entropy_figure(clean, triggered, threshold)
    return _render(
        "Evaluation",
        lead,
        [("Entropy of clean and triggered images", picture, "Left of the line an input is rejected.")],
        [("Figures, with 95% intervals", rows)],
    )


def entropy_figure(clean: NDArray[np.float32], triggered: NDArray[np.float32] | None, threshold: float) -> bytes:
    """Histograms of entropies with the threshold, as PNG."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    everything = np.concatenate([clean, triggered] if triggered is not None and len(triggered) else [clean])
    bins = np.linspace(0.0, max(float(everything.max()), threshold) * 1.02 + 1e-6, 61)
    groups = [(clean, "clean", _CLEAN)] + ([(triggered, "triggered", _TRIGGERED)] if triggered is not None else [])
    for values, name, colour in groups:
        weights = np.full(len(values), 100.0 / max(1, len(values)))
        axes.hist(values, bins=list(bins), weights=weights, alpha=0.7, color=colour, label=f"{name} ({len(values)})")
    axes.axvline(threshold, color=_LINE, linestyle="--", linewidth=1.2, label=f"threshold {threshold:.4f}")
    axes.set_xlabel("mean entropy under superimposed images (bits)")
    axes.set_ylabel("share of images (%)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return _png(figure)


def _montage(images: Tensor) -> bytes:
    figure = Figure(figsize=(8, 1.9), layout="constrained")
    grid = figure.subplots(2, 10, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, image in zip(grid.flat, images, strict=False):
        axes.imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
    return _png(figure)


def _settings_rows(calibration: Calibration) -> list[tuple[str, str]]:
    profile, record = calibration.profile, calibration.profile.detectors[0]
    spec = profile.input
    rows = [
        ("Model", f"{profile.model.kind}, {profile.model.num_classes} classes, returns {profile.model.output}"),
        ("Input", f"{'x'.join(map(str, spec.shape))} (C, H, W), {spec.layout}, {spec.dtype}"),
        ("Blend", f"{record.blend}, alpha {record.alpha:g}"),
        ("Overlays", str(len(calibration.strip.overlays))),
        ("Preprocessor", "none" if profile.preprocessor is None else "GYM lightweight"),
        ("Seed", str(profile.seed)),
    ]
    if profile.clean_accuracy is not None:
        rows.append(("Clean accuracy of the model", f"{profile.clean_accuracy:.2%}"))
    if record.mean_passes is not None:
        rows.append(("Mean forward passes of a clean input", f"{record.mean_passes:.1f} of {len(calibration.strip.overlays)}"))
    return rows + [(f"Version of {name}", version) for name, version in profile.libraries.items()]


def _threshold_rows(threshold: ThresholdRecord) -> list[tuple[str, str]]:
    rows = [
        ("Entropy threshold", f"{-threshold.value:.6f} bits"),
        ("Method", threshold.method if threshold.rank is None else f"{threshold.method}, rank {threshold.rank}"),
        ("False rejection rate asked for", f"{threshold.frr:.2%}"),
        ("95% interval of the rate", f"{threshold.frr_low:.2%} to {threshold.frr_high:.2%}"),
        ("Clean images that set it", str(threshold.images)),
    ]
    return rows if threshold.confidence is None else [*rows, ("Confidence asked for", f"{threshold.confidence:.0%}")]


def _estimate(estimate: Estimate | None) -> str:
    return "not measured" if estimate is None else f"{estimate.value:.4f}  [{estimate.low:.4f}, {estimate.high:.4f}]"


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _render(
    title: str, lead: str, pictures: Sequence[tuple[str, bytes, str]], tables: Sequence[tuple[str, Sequence[Sequence[str]]]]
) -> bytes:
    values: Mapping[str, object] = {
        "title": title,
        "lead": lead,
        "pictures": [(heading, base64.b64encode(data).decode(), caption) for heading, data, caption in pictures],
        "tables": tables,
    }
    return jinja2.Environment(autoescape=True).from_string(_PAGE).render(values).encode()
