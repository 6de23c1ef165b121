"""A page to look at: what a repair came to, and the trigger that it learnt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from calibration.inspection.figures import goal_name
from calibration.inspection.report import named_triggers_figure
from calibration.page import Section, montage, render
from calibration.repair.codefend import Learnt
from calibration.repair.figures import figure_rows, next_steps, remarks
from calibration.repair.recovered import Recovered
from calibration.repair.repair import Repaired
from guard.preprocessors import Preprocessor

_SHOWN = 8  # triggers
_ROWS = ("clean", "trigger put on", "change", "quarantined", "trigger taken off", "change")


def repair_report(repaired: Repaired) -> bytes:
    """HTML in one file."""
    figures, method = repaired.figures, repaired.settings.method
    clean = dict(repaired.examples).get("clean", torch.empty(0))
    sections = [Section("What it came to", remarks(figures, repaired.preprocessor), rows=figure_rows(figures))]
    if repaired.recovered is not None and len(clean):
        sections.append(_recovered_section(repaired.recovered, clean, repaired.predictor.spec.class_names))
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
    if repaired.preprocessor is not None:
        sections.append(
            Section(
                "What the model sees",
                ("Each image goes through the preprocessor before the model answers it; one draw of it is shown.",),
                picture=seen_figure(repaired.preprocessor, repaired.examples, repaired.settings.seed),
                caption="Held-out images, and what is left of them.",
            )
        )
    sections += [
        Section(item.heading, item.texts, picture=montage(item.rows), caption=item.caption) for item in repaired.exhibits
    ]
    sections.append(Section("What comes next", next_steps(figures)))
    if not figures.measured:
        return render(f"Repaired by {method}", "Without any clean image; what that leaves open is said below.", sections)
    change = round(-figures.drop, 1)
    lost = f"{change:+.1f} points of" if change else "No change of"
    return render(f"Repaired by {method}", f"{lost} clean accuracy on held-out images.", sections)


def _recovered_section(recovered: Recovered, clean: Tensor, classes: Sequence[str]) -> Section:
    """What the repair made of each trigger that a scan had recovered."""
    triggers = recovered.triggers
    labels, sources = triggers.labels.tolist(), [None if source < 0 else source for source in triggers.sources.tolist()]
    names = [
        goal_name(label, classes[label] if label < len(classes) else None, source)
        for label, source in zip(labels, sources, strict=True)
    ]
    shares = zip(names, recovered.before, recovered.after, strict=True)
    few = names[:_SHOWN]
    return Section(
        "The triggers that a scan recovered",
        ("How often each sends held-out images to its label, of those that get another one without it.",),
        picture=named_triggers_figure(few, triggers.select(list(range(len(few)))), clean),
        caption="The mask, the pattern where the mask shows it, and a held-out image without and with it.",
        header=("trigger to", "works before", "after"),
        rows=[(name, _share(before), _share(after)) for name, before, after in shares],
    )


def _share(value: float | None) -> str:
    return "no image can tell" if value is None else f"{value:.2%}"


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
    return montage(list(zip(_ROWS, rows, strict=True)))


def seen_figure(preprocessor: Preprocessor, examples: Sequence[tuple[str, Tensor]], seed: int) -> bytes:
    """Rows of images, as PNG: for each kind the images, and what the preprocessor makes of them.

    Args:
        preprocessor: That the model was tuned for.
        examples: A name, and (N, C, H, W) in [0, 1], of each kind.
        seed: Of the draw.
    """
    rows = []
    for name, images in examples:
        generator = torch.Generator().manual_seed(seed)
        rows += [(name, images), ("preprocessed", preprocessor(images, generator))]
    return montage(rows)


def _change(before: Tensor, after: Tensor) -> Tensor:
    return (0.5 + (after - before) / 2.0).clamp(0.0, 1.0)
