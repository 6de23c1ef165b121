"""A page to look at: what an inspection found, its triggers as pictures, and the sizes of all labels' triggers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from calibration.inspection.figures import candidate_table, figure_rows, remarks, title, verdict
from calibration.inspection.neural_cleanse import Triggers
from calibration.inspection.record import LabelFinding
from calibration.inspection.scan import Scan
from calibration.page import Section, montage, png, render

_USUAL, _INFECTED, _LINE, _NATURAL = "#3b6ea8", "#c8553d", "#222222", "#8a8a8a"
_SHOWN = 10  # triggers
_NAMED = 50  # labels, at most, for each to have its name on the axis


def scan_report(scan: Scan) -> bytes:
    """HTML in one file."""
    figures = scan.figures
    sections = [Section("What was found", remarks(figures), rows=figure_rows(figures))]
    for what, findings, triggers in (("label", figures.labels, scan.triggers), ("pair", figures.pairs, scan.pair_triggers)):
        if triggers is None or not findings:
            continue
        header, rows = candidate_table(findings)
        smallest = sorted(range(len(findings)), key=lambda row: findings[row].mask_l1)
        shown = [row for row in smallest if findings[row].candidate][:_SHOWN]
        sections += [
            Section(
                f"Size of each {what}'s trigger",
                picture=sizes_figure(findings),
                caption="L1 norm of the mask, and the median. Grey marks: the size that a clean reference needs for a label, "
                "scaled to that median.",
            ),
            Section(
                "The smallest triggers",
                picture=triggers_figure([findings[row] for row in shown], triggers.select(shown), scan.clean),
                caption="The mask, the pattern where the mask shows it, and a held-out image without and with it.",
            ),
            Section("Second opinions", header=header, rows=rows),
        ]
    return render("Scan", verdict(figures), sections)


def sizes_figure(findings: Sequence[LabelFinding]) -> bytes:
    """Sizes of all triggers, as PNG: a bar for each label, or, where there are many, the sorted sizes."""
    many = len(findings) > _NAMED
    order = sorted(range(len(findings)), key=lambda row: findings[row].mask_l1) if many else list(range(len(findings)))
    chosen = [findings[row] for row in order]
    sizes = [item.mask_l1 for item in chosen]
    median = float(torch.tensor(sizes).double().quantile(0.5))
    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    axes = figure.subplots()
    colours = [_INFECTED if item.infected else _USUAL for item in chosen]
    axes.bar(range(len(sizes)), sizes, width=1.0 if many else 0.7, color=colours)
    for place, item in enumerate(chosen):
        opinion = item.second_opinion
        if opinion is not None and opinion.reference_ratio is not None:
            axes.plot([place - 0.45, place + 0.45], [opinion.reference_ratio * median] * 2, color=_NATURAL, linewidth=2.5)
    axes.axhline(median, color=_LINE, linewidth=0.8)
    axes.set_ylabel("L1 of the mask, pixels")
    if many:
        axes.set_xlabel(f"{len(sizes)} labels, by size")
        axes.set_xticks([])
    else:
        names = [title(item) for item in chosen]
        axes.set_xticks(range(len(sizes)), names, rotation=90 if max(map(len, names)) > 3 else 0, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return png(figure)


def triggers_figure(findings: Sequence[LabelFinding], triggers: Triggers, clean: Tensor) -> bytes:
    """Rows of pictures, as PNG; a column for each trigger."""
    count = len(findings)
    images = clean[[number % len(clean) for number in range(count)]]
    masks = triggers.masks.unsqueeze(1)
    on_image = torch.stack([triggers.put_on(row, images[row : row + 1])[0] for row in range(count)])
    return montage(
        [("mask", masks), ("pattern", masks * triggers.patterns), ("clean", images), ("with it", on_image)],
        [title(item) for item in findings],
    )
