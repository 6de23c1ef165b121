"""A page to look at: what an inspection found, its triggers as pictures, and the sizes of all labels' triggers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from calibration.inspection import patch_verdicts
from calibration.inspection.deep_inspect import DeepInspected
from calibration.inspection.deep_scan import DeepScan
from calibration.inspection.figures import (
    BEHIND_SILENT_UNITS,
    OF_LABELS,
    OF_PAIRS,
    candidate_table,
    factor_table,
    figure_rows,
    looks,
    median_l1,
    patch_table,
    remarks,
    smallest_table,
    title,
    verdict,
)
from calibration.inspection.record import LabelFinding, PatchFinding
from calibration.inspection.scan import Scan
from calibration.inspection.triggers import Triggers
from calibration.page import Section, montage, png, render

_USUAL, _INFECTED, _LINE, _NATURAL = "#3b6ea8", "#c8553d", "#222222", "#8a8a8a"
_SHOWN = 10  # triggers
_RECOVERED = 4  # images for each label
_BEST_PATCHES = 5
_NAMED = 50  # labels, at most, for each to have its name on the axis


_OPINIONS = (
    "L1 is the size in pixels, also as a share of the median of the others. Spread says how far the mask reaches, 1 as far as "
    "one over the whole image; it decides nothing."
)


def scan_report(scan: Scan, model: str = "") -> bytes:
    """HTML in one file; `model` is what it is called."""
    figures = scan.figures
    sections = [Section("What was found", remarks(figures), rows=figure_rows(figures, model))]
    triggers_of = {OF_LABELS: scan.triggers, OF_PAIRS: scan.pair_triggers, BEHIND_SILENT_UNITS: scan.silent_triggers}
    for where, findings in looks(figures).items():
        triggers = triggers_of[where]
        if triggers is None:
            continue
        header, rows = smallest_table(figures, findings)
        smallest = sorted(range(len(findings)), key=lambda row: findings[row].mask_l1)
        shown = [row for row in smallest if findings[row].candidate][:_SHOWN]
        sections += [
            Section(
                f"Sizes of the triggers {where}",
                picture=sizes_figure(findings),
                caption="L1 norm of the mask, and the median. Grey marks: the size that a clean reference needs for a label, "
                "scaled to that median.",
            ),
            Section(
                f"The smallest triggers {where}",
                picture=triggers_figure([findings[row] for row in shown], triggers.select(shown), scan.clean),
                caption="The mask, the pattern where the mask shows it, and a held-out image without and with it.",
            ),
            Section(f"Second opinions {where}", (_OPINIONS,), header=header, rows=rows),
        ]
    if scan.patch_triggers is not None:
        sections += _patches_sections(figures.patches, scan.patch_triggers, scan.clean)
    if scan.further_triggers is not None and figures.further:
        header, rows = candidate_table(figures.further)
        few = list(range(min(_SHOWN, len(figures.further))))
        sections.append(
            Section(
                "Further triggers of infected labels",
                ("Found in a copy that had unlearnt those before.",),
                picture=triggers_figure(figures.further[:_SHOWN], scan.further_triggers.select(few), scan.clean),
                caption="The mask, the pattern where the mask shows it, and a held-out image without and with it.",
                header=header,
                rows=rows,
            )
        )
    return render("Scan", verdict(figures), sections)


def _patches_sections(findings: Sequence[PatchFinding], triggers: Triggers, clean: Tensor) -> list[Section]:
    header, rows = patch_table(findings)
    best = sorted(range(len(findings)), key=lambda row: -findings[row].success)[:_BEST_PATCHES]
    return [
        Section(
            "How often patches work",
            (f"Every label's best patch of {findings[0].side}x{findings[0].side} pixels, of all places that were tried.",),
            picture=patches_figure(findings),
            caption="On images that the search has not seen; from the line on a label is suspect, if it also stands out.",
            header=header,
            rows=rows,
        ),
        Section(
            "The patches that work best",
            picture=triggers_figure([findings[row] for row in best], triggers.select(best), clean),
            caption="The place, the patch, and a held-out image without and with it. That of an infected label went on from "
            "there as a mask, if that works more often.",
        ),
    ]


def deep_scan_report(scan: DeepScan, model: str = "") -> bytes:
    """HTML in one file, of an inspection without data; `model` is what it is called."""
    figures, found = scan.figures, scan.found
    header, rows = factor_table(figures.labels)
    shown = sorted(figures.labels, key=lambda item: (not item.infected, item.mask_l1))[:_SHOWN]
    names = [f"{title(item)}\ninfected" if item.infected else title(item) for item in shown]
    labels = [item.label_index for item in shown]
    first = found.images[labels, :_RECOVERED].transpose(0, 1)
    sections = [
        Section("What was found", remarks(figures), rows=figure_rows(figures, model)),
        Section(
            "Size of each label's trigger",
            picture=sizes_figure(figures.labels, "what is added"),
            caption="L1 norm of what is added to an image, and the median. Red: infected.",
        ),
        Section(
            "The smallest triggers",
            picture=differences_figure(names, labels, found),
            caption="What is added to an image: grey changes nothing, and the strongest change is black or white, or a full "
            "colour. Below it, a recovered image of another label without and with it.",
            header=header,
            rows=rows,
        ),
        Section(
            "Recovered images",
            picture=montage([(str(number + 1), images) for number, images in enumerate(first)], names),
            caption="Of the same labels: faint on purpose, because what a model is very sure of is hard to move elsewhere.",
        ),
    ]
    return render("Scan without data", verdict(figures), sections)


def differences_figure(names: Sequence[str], labels: Sequence[int], found: DeepInspected) -> bytes:
    """Rows of pictures, as PNG; a column for each of these labels."""
    deltas = found.triggers[list(labels)]
    strongest = deltas.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(torch.finfo(deltas.dtype).tiny)
    others = found.images[[(label + 1) % len(found.images) for label in labels], 0]
    triggered = torch.cat([found.put_on(label, image.unsqueeze(0)) for label, image in zip(labels, others, strict=True)])
    return montage([("added", 0.5 + 0.5 * deltas / strongest), ("recovered", others), ("with it", triggered)], names)


def sizes_figure(findings: Sequence[LabelFinding], of_what: str = "the mask") -> bytes:
    """Sizes of all triggers, as PNG: a bar for each label, or, where there are many, the sorted sizes."""
    chosen = sorted(findings, key=lambda item: item.mask_l1) if len(findings) > _NAMED else findings
    median = median_l1(chosen)
    figure, axes = _bars(chosen, [item.mask_l1 for item in chosen], "by size")
    for place, item in enumerate(chosen):
        opinion = item.second_opinion
        if opinion is not None and opinion.reference_ratio is not None:
            axes.plot([place - 0.45, place + 0.45], [opinion.reference_ratio * median] * 2, color=_NATURAL, linewidth=2.5)
    axes.axhline(median, color=_LINE, linewidth=0.8)
    axes.set_ylabel(f"L1 of {of_what}, pixels")
    return png(figure)


def patches_figure(findings: Sequence[PatchFinding]) -> bytes:
    """How often each label's best patch works, as PNG; where there are many labels, sorted."""
    chosen = sorted(findings, key=lambda item: -item.success) if len(findings) > _NAMED else findings
    figure, axes = _bars(chosen, [100.0 * item.success for item in chosen], "by success")
    axes.axhline(100.0 * patch_verdicts.WORKS, color=_LINE, linewidth=0.8)
    axes.set_ylim(0.0, 100.0)
    axes.set_ylabel("works on, % of images")
    return png(figure)


def _bars(findings: Sequence[LabelFinding | PatchFinding], heights: Sequence[float], order: str) -> tuple[Figure, Axes]:
    """One for each label, red where it is infected; the order is told where there are too many to name."""
    many = len(findings) > _NAMED
    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    axes = figure.subplots()
    colours = [_INFECTED if item.infected else _USUAL for item in findings]
    axes.bar(range(len(heights)), heights, width=1.0 if many else 0.7, color=colours)
    if many:
        axes.set_xlabel(f"{len(heights)} labels, {order}")
        axes.set_xticks([])
    else:
        names = [title(item) for item in findings]
        axes.set_xticks(range(len(heights)), names, rotation=90 if max(map(len, names)) > 3 else 0, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def triggers_figure(findings: Sequence[LabelFinding | PatchFinding], triggers: Triggers, clean: Tensor) -> bytes:
    """Rows of pictures, as PNG; a column for each trigger."""
    return named_triggers_figure([title(item) for item in findings], triggers, clean)


def named_triggers_figure(names: Sequence[str], triggers: Triggers, clean: Tensor) -> bytes:
    """The same, with these names."""
    count = len(names)
    images = clean[[number % len(clean) for number in range(count)]]
    masks = triggers.masks.unsqueeze(1)
    on_image = torch.stack([triggers.put_on(row, images[row : row + 1])[0] for row in range(count)])
    return montage([("mask", masks), ("pattern", masks * triggers.patterns), ("clean", images), ("with it", on_image)], names)
