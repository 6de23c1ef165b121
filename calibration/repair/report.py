"""A page to look at: what a repair came to, and the trigger that it learnt."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from calibration.page import Section, png, render
from calibration.repair.codefend import Learnt
from calibration.repair.repair import Repaired

_ROWS = ("clean", "trigger put on", "change", "quarantined", "trigger taken off", "change")


def repair_report(repaired: Repaired) -> bytes:
    """HTML in one file."""
    figures, method = repaired.figures, repaired.settings.method
    sections = [Section("What it came to", remarks(repaired), rows=figure_rows(repaired))]
    for number, learnt in enumerate(repaired.learnt, start=1):
        which = "" if len(repaired.learnt) == 1 else f", round {number}"
        sections.append(
            Section(
                f"The trigger that was learnt{which}",
                ("The changes are shown around mid-grey.",),
                picture=learnt_figure(learnt),
                caption="Above: held-out clean images, the trigger put on. Below: quarantined images, the trigger taken off.",
            )
        )
    drop = f"{figures.drop:+.1f}".replace("+", "-") if figures.drop > 0 else f"{-figures.drop:+.1f}"
    return render(f"Repaired by {method}", f"{drop} points of clean accuracy on held-out images.", sections)


def figure_rows(repaired: Repaired) -> list[tuple[str, ...]]:
    """The figures, in words."""
    figures = repaired.figures
    rows: list[tuple[str, ...]] = []
    if figures.clean_accuracy_before is not None and figures.clean_accuracy_after is not None:
        rows.append(("clean accuracy before", f"{figures.clean_accuracy_before:.2%}"))
        rows.append(("clean accuracy after", f"{figures.clean_accuracy_after:.2%}"))
    rows.append(("agreement with the original", f"{figures.agreement:.2%}"))
    if figures.attack_success_seen_after is not None:
        rows.append(("quarantined images that keep their old answer", f"{figures.attack_success_seen_after:.2%}"))
    if figures.generated_triggers_work is not None:
        rows.append(("learnt trigger works on the original", f"{figures.generated_triggers_work:.2%}"))
    rows.append(("clean images, of which held out", f"{figures.clean_images}, {figures.held_out_clean}"))
    if figures.quarantined_images:
        rows.append(("quarantined, of which held out", f"{figures.quarantined_images}, {figures.held_out_quarantined}"))
    return [*rows, ("seconds", f"{figures.seconds:.0f}")]


def remarks(repaired: Repaired) -> list[str]:
    """What must be said with the figures."""
    figures, said = repaired.figures, []
    if repaired.preprocessor is not None:
        said.append(
            f"Accuracy after is through the preprocessor that the model was tuned for ({repaired.preprocessor}); profiles made "
            "of this folder use it."
        )
    if figures.clean_accuracy_before is None:
        said.append("The clean images have no labels: the original's own answers to them stood in for these.")
    if figures.attack_success_seen_after is None:
        said.append("Nothing was quarantined, so that what became of the attack was not measured.")
    else:
        said.append("False alarms among the quarantined images keep their old answer, and should.")
    if repaired.learnt and figures.generated_triggers_work is None:
        said.append(
            "The quarantined images got all of the model's labels, so that whether the learnt trigger works can't be told."
        )
    if figures.generated_triggers_work is not None and figures.generated_triggers_work < 0.5:
        said.append(
            "The trigger that was learnt hardly works on the original: either the quarantined images are mostly false alarms, "
            "or their trigger is one that was not learnt. Don't rely on this repair."
        )
    return said


def learnt_figure(learnt: Learnt) -> bytes:
    """Rows of images, as PNG: clean, through G, the change; quarantined, through F, the change."""
    rows = [
        learnt.clean,
        learnt.triggered,
        _change(learnt.clean, learnt.triggered),
        learnt.quarantined,
        learnt.cleaned,
        _change(learnt.quarantined, learnt.cleaned),
    ]
    columns = max(len(row) for row in rows)
    figure = Figure(figsize=(1.6 + 0.95 * columns, 0.95 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), columns, squeeze=False)
    for name, images, line in zip(_ROWS, rows, panels, strict=True):
        for number, axes in enumerate(line):
            axes.set_axis_off()
            if number < len(images):
                pixels = images[number].permute(1, 2, 0).numpy()
                axes.imshow(np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels[:, :, :3], vmin=0.0, vmax=1.0)
        line[0].text(-0.15, 0.5, name, transform=line[0].transAxes, ha="right", va="center", fontsize=9)
    return png(figure)


def _change(before: Tensor, after: Tensor) -> Tensor:
    return (0.5 + (after - before) / 2.0).clamp(0.0, 1.0)
