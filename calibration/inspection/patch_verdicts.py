"""Verdicts on patches: squares of a few pixels, as large for every label, are judged by how often the best one works.

A label is infected if its best patch

1. works on at least 60% of images that the search has not seen,
2. works at least twice as often as other labels' best ones, by their median: any patch works on a model that is easily misled,
   and
3. works on less than 30% of them in a clean reference.

Infected ones are strengthened. The search itself is in `patches`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from calibration.inspection.judge import TRANSFERS, Judge
from calibration.inspection.patches import PatchSearch, recover_patches
from calibration.inspection.record import PatchFinding
from calibration.inspection.triggers import Goals, Triggers

WORKS = 0.6
"""Of images that the search has not seen: a label's best patch must."""

STANDS_OUT = 2.0
"""Times as often as the other labels', by their median, it must work."""


def judge_patches(
    judge: Judge, goals: Goals, search: PatchSearch, names: Sequence[str]
) -> tuple[Triggers, tuple[PatchFinding, ...]]:
    """The best patches, strengthened where a label is infected, and a verdict for each.

    Args:
        judge: Of the model.
        goals: Labels, two at least.
        search: How patches are looked for.
        names: Of the labels, as far as they are known.

    Raises:
        CalibrationError: There is no image to send somewhere.
        InspectionError: The clean reference knows too little of the task.
        ModelError: The model has no gradients.
    """
    found = recover_patches(
        judge.answers, judge.searched, goals, search, judge.seed, judge.engine, judge.checkpoints, "patches", judge.progress
    )
    places = [mask.nonzero()[0].tolist() for mask in found.masks]
    works = torch.tensor([judge.success(found, row) for row in range(len(found))], dtype=torch.float64)
    others = [float(torch.cat([works[:row], works[row + 1 :]]).quantile(0.5)) for row in range(len(works))]
    there = {
        row: judge.success_on_reference(found, row)
        for row, (own, usual) in enumerate(zip(works.tolist(), others, strict=True))
        if own >= WORKS and own >= STANDS_OUT * usual
    }
    infected = [row for row in there if not patch_acquittal(float(works[row]), others[row], there[row])]
    found = judge.strengthened(found, infected)
    return found, tuple(
        PatchFinding(
            label_index=label,
            label=names[label] if label < len(names) else None,
            side=search.side(*mask.shape),
            top=int(place[0]),
            left=int(place[1]),
            success=float(works[row]),
            others=others[row],
            reference_success=there.get(row),
            passes=int(found.passes[row]),
            infected=row in infected,
        )
        for row, (label, mask, place) in enumerate(zip(found.labels.tolist(), found.masks, places, strict=True))
    )


def patch_acquittal(success: float, others: float, reference_success: float | None) -> str:
    """Why a label is not infected though a patch leads there, in words; empty if it is.

    Args:
        success: Share of unseen images that its best patch sends there.
        others: The median of the other labels'.
        reference_success: Share of them that its patch sends there in a clean reference.
    """
    if success < WORKS:
        return f"works on fewer than {WORKS:.0%}"
    if success < STANDS_OUT * others:
        return "others' work nearly as often"
    if reference_success is None:
        return "no clean reference"
    return "works on a clean model, too" if reference_success >= TRANSFERS else ""
