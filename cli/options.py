"""Options that several subcommands share, and how their text becomes values."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from guard.errors import InputError

ProfileArgument = Annotated[Path, typer.Argument(help="Folder that guard calibrate wrote.", metavar="PROFILE")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def floats(text: str | None, name: str) -> tuple[float, ...]:
    """`0.5,0.5,0.5` as numbers.

    Raises:
        InputError: Something else.
    """
    if text is None:
        return ()
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"expected {name} as numbers with commas between, like 0.5,0.5,0.5, got {text!r}") from error


def shape(text: str | None) -> tuple[int, int, int] | None:
    """`3,32,32` as (C, H, W).

    Raises:
        InputError: Something else.
    """
    if text is None:
        return None
    try:
        channels, height, width = (int(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"expected --shape as C,H,W, like 3,32,32, got {text!r}") from error
    if min(channels, height, width) < 1:
        raise InputError(f"expected --shape as positive C,H,W, got {text!r}")
    return channels, height, width
