"""What a repair has worked with, to be shown in its report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from calibration.repair.dhbe_game import DhbeOutcome
from calibration.repair.gdm import Gdm, GdmOutcome

_COLUMNS = 8


@final
@dataclass(frozen=True)
class Exhibit:
    """Pictures of one kind.

    Attributes:
        heading: What they are.
        texts: To be said of them.
        rows: Names, and (N, C, H, W) in [0, 1].
        caption: Under them.
    """

    heading: str
    texts: tuple[str, ...]
    rows: Sequence[tuple[str, Tensor]]
    caption: str


def generated(outcome: DhbeOutcome) -> Exhibit:
    """What DHBE's generators drew in the end."""
    patches = (0.5 + outcome.triggers / 2.0).clamp(0.0, 1.0)
    return Exhibit(
        "What the generators drew in the end",
        (
            "Samples need not look like the model's images: they are what the copy and the original were compared on, and "
            "sought where the two differ. Patches were added to them, and the copy learnt not to mind.",
        ),
        [*_rows("samples", outcome.samples), *_rows("patches", patches)],
        "Above: samples. Below: patches, enlarged, around mid-grey, which adds nothing.",
    )


def drawn(outcome: DhbeOutcome) -> Exhibit:
    """What the copy was taught with."""
    return Exhibit(
        "Drawings instead of images",
        ("The copy learnt to answer drawings like the original, and drawings with a patch like those without.",),
        [*_rows("drawings", outcome.samples), *_rows("with patches", outcome.triggers)],
        "Below: others, with patches that move the original to a label, where they do so most.",
    )


def modelled(outcome: GdmOutcome, settings: Gdm) -> Exhibit:
    """Triggers of one backdoor, of each level of success."""
    top, left, height, width = outcome.backdoor.place
    levels = zip(settings.mesa.levels, outcome.triggers, strict=True)
    return Exhibit(
        f"The triggers that were modelled, label {outcome.backdoor.target_label}",
        (f"Each fills the {height}x{width} pixels from row {top}, column {left}, and is to send images to the label.",),
        [(f"level {level:g}", triggers) for level, triggers in levels],
        "A few of each generator; its level is the success that it was to reach.",
    )


def _rows(name: str, images: Tensor) -> list[tuple[str, Tensor]]:
    """Of pictures; the first one is named."""
    return [(name if number == 0 else "", part) for number, part in enumerate(images.split(_COLUMNS))]
