"""What is shown of a repaired model, wherever it was repaired."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from cli.display import show_rows
from guard.files import as_text

if TYPE_CHECKING:
    from calibration.repair.record import RepairRecord


def show_repaired(record: RepairRecord, title: str, *more: tuple[str, str]) -> None:
    """Print the figures, and what must be said with them.

    Args:
        record: What is known of it.
        title: Of the table.
        more: Further rows.
    """
    from calibration.repair.figures import figure_rows, remarks

    show_rows(title, [*figure_rows(record), *more])
    for text in remarks(record, record.preprocessor):
        typer.echo(text, err=True)


def calibrate_with_tripwire(
    out: Path, model: str, weights: Path | None, data: Path | None, skip_unreadable: bool = False
) -> str:
    """The command that makes a profile of a repaired model, whose original goes on detecting; that needs clean images."""
    original = ["--tripwire", model, *([] if weights is None else ["--tripwire-weights", str(weights)])]
    clean, profile = "CLEAN" if data is None else str(data), out.absolute().name + "-profile"
    images = ["--data", clean, *(["--skip-unreadable"] if skip_unreadable else [])]
    return as_text(shlex.join(["guard", "calibrate", str(out), *original, *images, "--out", str(out.parent / profile)]))


def show_next(record: RepairRecord, command: str) -> None:
    """Name the next command, unless the figures speak against going on."""
    from calibration.repair.figures import is_reliable

    if is_reliable(record):
        typer.echo(f"next: {command}")


def exit_code(record: RepairRecord) -> int:
    """0, or 1 where the figures speak against relying on a repair."""
    from calibration.repair.figures import is_reliable

    return 0 if is_reliable(record) else 1
