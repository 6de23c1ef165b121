"""An inspection in words, for tables and pages."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence

from calibration.inspection import patch_verdicts
from calibration.inspection.mask_verdicts import SMALL, SMALL_PAIR, acquittal
from calibration.inspection.patch_verdicts import patch_acquittal
from calibration.inspection.record import LabelFinding, PatchFinding, ScanFigures, SecondOpinion

_LIMITS_WITHOUT_DATA = (
    "The triggers were looked for on images that were recovered from the model: they "
    "say which labels are easy to reach, and need not work on real images. Triggers that cover the image or change with it, "
    "backdoors that move every label to the next, and those that work for a few source labels alone leave no label whose "
    "trigger is unusually small. With clean images, --method neural-cleanse sees more."
)

OF_LABELS, OF_PAIRS, BEHIND_SILENT_UNITS = "of labels", "of pairs", "of labels, behind silent units"
_SMALLEST = 3  # labels that are shown though they don't stand out


def limits(figures: ScanFigures) -> str:
    """What an inspection with clean images can't see, of what it did not look for."""
    unseen = ["triggers that cover the image or change with it", "backdoors that move every label to the next"]
    if not figures.pairs:
        unseen.append("those that work for a few source labels alone (--pairs looks for them)")
    if not figures.silent_units:
        unseen.append("those behind a module that is silent without nearly the whole trigger (--silent-units looks there)")
    if not figures.patches or _undecided(figures.patches):
        unseen.append("patches of which no smaller part works (--patches looks for squares)")
    what = f"{', '.join(unseen[:-1])}, and {unseen[-1]}"
    return f"{_proof(figures)}. A scan like this one does not see {what}."


def _proof(figures: ScanFigures) -> str:
    return "This need not be all" if figures.all_infected else "This is no proof that a model is clean"


def verdict(figures: ScanFigures) -> str:
    """In a sentence."""
    if not figures.all_infected:
        return "No label needs a trigger so small that a backdoor must be behind it."
    return f"The model is backdoored: {titles(figures.all_infected)}."


def title(finding: LabelFinding | PatchFinding) -> str:
    """`3`, `3 (cat)`, or `5 to 3`."""
    return goal_name(finding.label_index, finding.label, finding.source_index)


def goal_name(label: int, name: str | None, source: int | None = None) -> str:
    """`3`, `3 (cat)`, or `5 to 3`.

    Args:
        label: Where a trigger sends images.
        name: Of that label, if it has any.
        source: The label that these images have; None for any.
    """
    number = str(label)
    named = number if name in (None, number) else f"{number} ({name})"
    return named if source is None else f"{source} to {named}"


def label_names(labels: Sequence[int], classes: Sequence[str]) -> list[str]:
    """Each as `3`, or `3 (cat)`, by the names of all classes, as far as they are known."""
    return [goal_name(label, classes[label] if label < len(classes) else None) for label in labels]


def titles(findings: Sequence[LabelFinding | PatchFinding]) -> str:
    """`label 3`, or `labels 3, 5 to 3`."""
    return f"label{'' if len(findings) == 1 else 's'} {', '.join(map(title, findings))}"


def looks(figures: ScanFigures) -> dict[str, tuple[LabelFinding, ...]]:
    """What was found, by where it was looked for, in words."""
    everything = {OF_LABELS: figures.labels, OF_PAIRS: figures.pairs, BEHIND_SILENT_UNITS: figures.silent_units}
    return {where: findings for where, findings in everything.items() if findings}


def candidate_table(
    findings: Sequence[LabelFinding], elsewhere: Collection[int] = ()
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header, and a row for each label that got a second opinion, the smallest trigger first.

    Args:
        findings: Of labels, or of pairs.
        elsewhere: Labels that were found infected by another look.
    """
    header = (
        "label",
        "L1",
        "index",
        "of the others' median",
        "spread",
        "works on others",
        "L1 in a clean reference",
        "works there",
        "verdict",
    )
    rows: list[tuple[str, ...]] = []
    for item in sorted(findings, key=lambda item: item.mask_l1):
        opinion = item.second_opinion
        if opinion is None:
            continue
        natural = (
            "-" if opinion.reference_l1 is None else f"{opinion.reference_l1:.1f} ({opinion.reference_ratio:.0%} of its median)"
        )
        rows.append(
            (
                title(item),
                f"{item.mask_l1:.1f}",
                "-" if item.anomaly_index is None else f"{item.anomaly_index:.2f}",
                f"{opinion.size_ratio:.0%}",
                f"{opinion.spread:.2f}",
                f"{opinion.success:.1%}",
                natural,
                "-" if opinion.reference_success is None else f"{opinion.reference_success:.0%}",
                _verdict(item, opinion, item.source_index is None and item.label_index in elsewhere),
            )
        )
    return header, rows


def _undecided(findings: Sequence[PatchFinding]) -> list[PatchFinding]:
    """Labels that patches lead to, of which the reference was not asked."""
    return [item for item in findings if item.success >= patch_verdicts.WORKS and item.reference_success is None]


def patch_table(findings: Sequence[PatchFinding]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header, and a row for each label whose patch works too often, and for the three that work most often."""
    header = (
        "label",
        "first row, column",
        "works on others",
        "other labels', by the median",
        "works in a clean reference",
        "verdict",
    )
    rows: list[tuple[str, ...]] = []
    undecided = _undecided(findings)
    for place, item in enumerate(sorted(findings, key=lambda item: -item.success)):
        if place >= _SMALLEST and item.success < patch_verdicts.WORKS:
            continue
        why = patch_acquittal(item.success, item.others, item.reference_success)
        rows.append(
            (
                title(item),
                f"{item.top}, {item.left}",
                f"{item.success:.1%}",
                f"{item.others:.0%}",
                "-" if item.reference_success is None else f"{item.reference_success:.0%}",
                f"{'undecided' if item in undecided else 'clean'}: {why}" if why else "infected",
            )
        )
    return header, rows


def _verdict(item: LabelFinding, opinion: SecondOpinion, elsewhere: bool) -> str:
    limit = SMALL if item.source_index is None else SMALL_PAIR
    if item.infected:
        return "infected"
    return f"{'infected, though not by this' if elsewhere else 'clean'}: {acquittal(opinion, limit)}"


def factor_table(findings: Sequence[LabelFinding]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Of DeepInspect: header, and a row for each label that stands out and for the three smallest, by size."""
    header = ("label", "L1", "deviation factor", "of the median", "works on recovered images", "verdict")
    median = median_l1(findings)
    return header, [
        (
            title(item),
            f"{item.mask_l1:.1f}",
            "-" if item.anomaly_index is None else f"{item.anomaly_index:.2f}",
            f"{item.mask_l1 / median:.0%}" if median > 0.0 else "-",
            f"{item.success:.1%}",
            "infected" if item.infected else "clean",
        )
        for place, item in enumerate(sorted(findings, key=lambda item: item.mask_l1))
        if item.candidate or place < _SMALLEST
    ]


def smallest_table(figures: ScanFigures, findings: Sequence[LabelFinding]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """What was made of the smallest triggers, by whichever method."""
    if figures.method == "deep-inspect":
        return factor_table(findings)
    return candidate_table(findings, [item.label_index for item in figures.all_infected])


def median_l1(findings: Sequence[LabelFinding]) -> float:
    """Of the triggers' sizes."""
    return statistics.median(item.mask_l1 for item in findings)


def remarks(figures: ScanFigures) -> list[str]:
    """What must be said with them."""
    said = list(figures.said)
    by_index = [item for item in (*figures.labels, *figures.pairs) if item.infected_by_index and not item.infected]
    missed = [item for item in (*figures.labels, *figures.pairs) if item.infected and not item.infected_by_index]
    if figures.method == "deep-inspect":
        if by_index:
            said.append(f"The deviation factor alone would accuse {titles(by_index)}; beside the median, the size does not.")
        if missed:
            said.append(f"The deviation factor alone would miss {titles(missed)}.")
        return [*said, f"{_proof(figures)}. {_LIMITS_WITHOUT_DATA}"]
    if by_index:
        said.append(f"The anomaly index alone would accuse {titles(by_index)}; the second opinion does not.")
    if missed:
        said.append(f"The anomaly index alone would miss {titles(missed)}.")
    infected = {item.label_index for part in (figures.labels, figures.patches) for item in part if item.infected}
    if any(item.label_index in infected for item in figures.pairs):
        said.append("Pairs that lead to an infected label are no further backdoors: its trigger works from every label.")
    silent = [item for item in figures.silent_units if item.infected]
    if silent:
        said.append(
            f"The triggers of {titles(silent)} lie behind units that are silent without them: a module that was put there on "
            "purpose, as TrojanNet's is. Unlearning and pruning can't be expected to reach it."
        )
    patches = [item for item in figures.patches if item.infected]
    if patches:
        side = patches[0].side
        said.append(f"A patch of {side}x{side} pixels leads to {titles(patches)}; the size of the smallest mask did not tell.")
    undecided = _undecided(figures.patches)
    if undecided:
        said.append(
            f"Patches lead to {titles(undecided)}, too, but so often to other labels that they decide nothing there: the model "
            "is easily misled."
        )
    if figures.reference_agreement is not None:
        said.append(
            f"The clean reference answers {figures.reference_agreement:.1%} of {figures.held_out} held-out images as the model "
            "does."
        )
    return [*said, limits(figures)]


def figure_rows(figures: ScanFigures, model: str = "") -> list[tuple[str, ...]]:
    """What was measured, and of which model, where that has a name; names and values."""
    recovered = figures.recovered_agreement
    seen = (
        ("clean images searched with, held out", f"{figures.clean_images}, {figures.held_out}")
        if recovered is None
        else ("recovered images, with the label they are for", f"{figures.recovered_images}, {recovered:.0%}")
    )
    return [
        *([("model", model)] if model else []),
        ("labels", str(len(figures.labels))),
        *([("pairs of labels", str(len(figures.pairs)))] if figures.pairs else []),
        *([("labels, through silent units", str(len(figures.silent_units)))] if figures.silent_units else []),
        *([("labels, by patches", str(len(figures.patches)))] if figures.patches else []),
        *([("further triggers of infected labels", str(len(figures.further)))] if figures.further else []),
        ("median L1 of the triggers, in pixels", f"{figures.median_l1:.1f}"),
        seen,
        ("images that went through the model", f"{figures.passes:,}"),
        ("seconds", f"{figures.seconds:.0f}"),
    ]
