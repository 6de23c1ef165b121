"""Pictures of what each detector saw: entropies or scores of clean and triggered images, and the threshold."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from calibration.evaluation import Judged
from calibration.page import Section, png
from guard import Guard
from guard.readings import reading_of
from guard.verdict import method_of

_CLEAN, _TRIGGERED, _LINE = "#3b6ea8", "#c8553d", "#222222"


@final
@dataclass(frozen=True)
class _Words:
    """What a method's pictures are called.

    Attributes:
        heading: With a place for whose scores they are.
        axis: Under the picture.
        hint: What a trigger does.
    """

    heading: str
    axis: str
    hint: str


_WORDS = {
    "strip": _Words(
        "Entropy of {}", "entropy under superimposed images (bits)", "a trigger pushes entropy towards 0"
    ),
    "feature-squeezing": _Words(
        "Change of the answers to {} when they are squeezed",
        "largest L1 distance between the answers to an image and to it squeezed",
        "a trigger that survives squeezing, such as a patch, lies far on the left, and is not seen",
    ),
    "activation-filter": _Words(
        "Activation of the trigger's neurons by {}",
        "mean activation of the neurons that the trigger excites",
        "the trigger that the scan found excites these neurons",
    ),
}  # fmt: skip


@final
@dataclass(frozen=True)
class Seen:
    """What one detector saw.

    Attributes:
        detector: Its name.
        threshold: On its score.
        clean: (n,), scores of clean images, all passes.
        triggered: (m,), of triggered images.
    """

    detector: str
    threshold: float
    clean: NDArray[np.float32]
    triggered: NDArray[np.float32] | None = None


def judged_scores(guard: Guard, clean: Judged, triggered: Judged | None) -> list[Seen]:
    """What each detector of a guard saw."""
    return [
        Seen(
            item.detector.name,
            item.threshold,
            clean.by_detector[number],
            None if triggered is None else triggered.by_detector[number],
        )
        for number, item in enumerate(guard.detectors)
    ]


def histogram_sections(seen: Sequence[Seen], whose: str, hints: bool = False) -> list[Section]:
    """A section for each method, with a histogram for each of its detectors.

    Args:
        seen: What the detectors saw.
        whose: `clean images`, say.
        hints: Whether captions tell what a trigger does.
    """
    sections = []
    for method, group in itertools.groupby(seen, key=lambda item: method_of(item.detector)):
        items, words = list(group), _WORDS[method]
        side = "Left" if reading_of(method).sign < 0.0 else "Right"
        caption = f"{side} of the line {'' if len(items) == 1 else 'of any detector '}an input is rejected"
        caption += f"; {words.hint}." if hints else "."
        sections.append(Section(words.heading.format(whose), picture=histograms(items), caption=caption))
    return sections


def histograms(seen: Sequence[Seen]) -> bytes:
    """Histograms with their thresholds, one for each detector, as PNG."""
    figure = Figure(figsize=(8, 0.6 + 3.0 * len(seen)), layout="constrained")
    methods = [method_of(item.detector) for item in seen]
    for number, axes in enumerate(figure.subplots(len(seen), 1, squeeze=False)[:, 0]):
        _draw(axes, seen[number])
        if len(seen) > 1:
            axes.set_title(seen[number].detector, fontsize=10, loc="left")
        if methods[number] not in methods[number + 1 :]:
            axes.set_xlabel(_WORDS[methods[number]].axis)
    return png(figure)


def _draw(axes: Axes, item: Seen) -> None:
    reading = reading_of(item.detector)
    limit = reading.value(item.threshold)
    groups = [(item.clean, "clean", _CLEAN)]
    if item.triggered is not None:
        groups.append((item.triggered, "triggered", _TRIGGERED))
    shown = [(np.float32(reading.sign) * scores[np.isfinite(scores)], name, colour) for scores, name, colour in groups]
    everything = np.concatenate([[0.0, limit], *(values for values, _, _ in shown)])
    bins = np.linspace(everything.min(), everything.min() + np.ptp(everything) * 1.02 + 1e-6, 61)
    for values, name, colour in shown:
        weights = np.full(len(values), 100.0 / max(1, len(values)))
        axes.hist(values, bins=list(bins), weights=weights, alpha=0.7, color=colour, label=f"{name} ({len(values)})")
    axes.axvline(limit, color=_LINE, linestyle="--", linewidth=1.2, label=f"threshold {limit:.4f}")
    axes.set_ylabel("share of images (%)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
