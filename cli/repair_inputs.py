"""What `guard repair` works on: which method takes what, and the images, read."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, final

from cli.extras import needs
from guard.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from calibration.data import ImageSet, Progress
    from calibration.discovery import Hints
    from calibration.sources import ModelSource
    from guard import Predictor

RepairMethod = Literal["auto", "gym", "codefend", "unlearn", "prune", "gdm", "fine-prune", "fine-tune", "nad", "mcr", "dhbe"]

METHODS = "\n\n".join(
    (
        "auto: scan, choose one of the others, repair, and verify.",
        "gym: by clean images and a preprocessor that breaks triggers.",
        "codefend: by the trigger that --quarantine shows.",
        "unlearn, prune, gdm: by triggers that a scan recovers; gdm models all that resemble them.",
        "fine-prune, fine-tune, nad, mcr: by clean images alone.",
        "dhbe: without any image; it needs --shape where the model's file does not tell.",
    )
)
"""Of `--method`: a line for each group."""


_USED_BY: dict[str, tuple[RepairMethod, ...]] = {
    "--recipe": ("gym", "dhbe"),
    "--views": ("gym",),
    "--rounds": ("unlearn",),
    "--gan-epochs": ("codefend",),
    "--epochs": ("gym", "codefend", "unlearn", "gdm", "fine-prune", "fine-tune", "nad", "mcr", "dhbe"),
}
"""Options that some methods alone look at; auto may choose any of these."""


def looks_at(method: RepairMethod, option: str) -> bool:
    """Whether a method looks at an option, like `--epochs`; auto may choose one that does."""
    return method == "auto" or method in _USED_BY.get(option, (method,))


def check_options(method: RepairMethod, given: Collection[str]) -> None:
    """Refuse an option that the method would not look at.

    Args:
        method: Of the repair.
        given: Names of options, those of `_USED_BY` and others.

    Raises:
        InputError: It names the methods that do.
    """
    for name, methods in _USED_BY.items():
        if name in given and not looks_at(method, name):
            by = methods[0] if len(methods) == 1 else f"{', '.join(methods[:-1])} or {methods[-1]}"
            raise InputError(f"expected {name} with --method {by}, got {method}, which does not look at it: drop it")


def check_choice(method: RepairMethod, data: Path | None, quarantine: Path | None, scan: Path | None, again: bool) -> None:
    """Refuse, before any work, a method without what it needs, or with what it does not look at.

    Args:
        method: Of the repair.
        data: Clean images.
        quarantine: What the guard rejected.
        scan: Folder of a scan.
        again: Whether an edge server has what was sent before.

    Raises:
        InputError: It says what to add or to drop.
    """
    if data is None and method not in ("dhbe", "auto"):
        raise InputError(
            f"expected --data CLEAN with --method {method}, which learns from clean images, got none: add it, or repair with "
            "--method dhbe, which needs none"
        )
    if method == "codefend" and quarantine is None and not again:
        raise InputError("expected --quarantine DIR with --method codefend, which learns the trigger from it, got none")
    if scan is not None and data is None:
        raise InputError(
            "expected --data CLEAN with --scan, whose triggers are put on clean images, got none: add it or drop --scan"
        )


@final
@dataclass(frozen=True)
class RepairInputs:
    """The model and the images.

    Attributes:
        predictor: The model.
        clean: Clean images, if there are any.
        suspects: Quarantined ones, if there are any.
    """

    predictor: Predictor
    clean: ImageSet | None
    suspects: ImageSet | None

    @property
    def rejected(self) -> Tensor | None:
        """(N, C, H, W), in [0, 1]: what was quarantined."""
        return None if self.suspects is None else self.suspects.images(slice(None))

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """Images that could not be read, each with the reason."""
        return [item for images in (self.clean, self.suspects) if images is not None for item in images.skipped]


def read_inputs(
    source: ModelSource,
    data: Path | None,
    quarantine: Path | None,
    shape: tuple[int, int, int] | None,
    given: Hints,
    skip_unreadable: bool,
    progress: Progress,
) -> RepairInputs:
    """Read the images, and find out what the model takes.

    Args:
        source: Of the model.
        data: Clean images; None where the method needs none.
        quarantine: What the guard rejected.
        shape: (C, H, W), as the user says.
        given: What else the user says of the model.
        skip_unreadable: Leave out what can't be read.
        progress: Told about each image.

    Raises:
        InputError: The images don't fit the model, or neither images nor anything else tells their shape.
        RepairError: There are too few.
    """
    with needs("repair"):
        from calibration.data import load_images
        from calibration.discovery import discover, discover_without_images
        from calibration.repair.cases import check_enough, load_quarantined

    hints, clean = source.hints(given), None
    if data is None:
        shape = shape or source.image_shape
        if shape is None:
            raise InputError(
                "expected --shape C,H,W without --data, as the model does not say what images it takes, got none: add it, like "
                "--shape 3,32,32"
            )
        predictor = discover_without_images(source.backend, shape, hints)
    else:
        shape = shape or (source.image_shape if data.is_dir() else None)
        clean = load_images(data, shape, skip_unreadable=skip_unreadable, progress=progress)
        check_enough(clean, None)
        predictor = discover(source.backend, clean, hints)
    suspects = None
    if quarantine is not None:
        suspects = load_quarantined(quarantine, predictor.spec.shape, skip_unreadable=skip_unreadable, progress=progress)
        check_enough(clean, suspects)
    return RepairInputs(predictor, clean, suspects)
