"""Options that several subcommands share, and how their text becomes values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.extras import needs
from guard.errors import InputError
from guard.images import Container, DType, Layout
from guard.predictors import OutputKind

if TYPE_CHECKING:
    from calibration import Hints

MODEL_PANEL = "What the model takes and returns"

ProfileArgument = Annotated[Path, typer.Argument(help="Folder that guard calibrate wrote.", metavar="PROFILE")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A .onnx, .pt2 or TorchScript .pt file, package.module:factory, or what repair wrote."
    ),
]
CleanOption = Annotated[
    Path, typer.Option(metavar="CLEAN", help="Clean images: a folder with a sub-folder per class, or an .npz.")
]
WeightsOption = Annotated[Path | None, typer.Option(help=".safetensors for the module that a factory makes.")]
SkipOption = Annotated[bool, typer.Option("--skip-unreadable", help="Leave out files that are no images, and list them.")]
MeanOption = Annotated[str | None, typer.Option(metavar="R,G,B", help="Of images in [0, 1].", rich_help_panel=MODEL_PANEL)]
StdOption = Annotated[str | None, typer.Option(metavar="R,G,B", help="Of images in [0, 1].", rich_help_panel=MODEL_PANEL)]
OutputOption = Annotated[
    OutputKind | None, typer.Option(help="What it returns.", show_default="found out", rich_help_panel=MODEL_PANEL)
]
LayoutOption = Annotated[
    Layout | None, typer.Option(help="Axis order it takes.", show_default="found out", rich_help_panel=MODEL_PANEL)
]
DTypeOption = Annotated[
    DType | None, typer.Option(help="0..255 or 0..1.", show_default="found out", rich_help_panel=MODEL_PANEL)
]
ContainerOption = Annotated[
    Container | None, typer.Option(help="Array library it takes.", show_default="found out", rich_help_panel=MODEL_PANEL)
]
ShapeOption = Annotated[
    str | None, typer.Option(metavar="C,H,W", help="Bring images of a folder to this.", rich_help_panel=MODEL_PANEL)
]
ResizeOption = Annotated[
    bool, typer.Option("--resize", help="Serve images of other sizes, resized.", rich_help_panel=MODEL_PANEL)
]


def given(context: typer.Context) -> set[str]:
    """Names of the options, like `--epochs`, that were given on the command line."""
    found = set[str]()
    for item in context.command.params:
        source = context.get_parameter_source(item.name or "")
        if source is not None and source.name == "COMMANDLINE":
            found.update(item.opts)
    return found


def again(values: Mapping[str, object]) -> list[str]:
    """Options and their values, as a further command is told them; those that are None were not given."""
    return [part for name, value in values.items() if value is not None for part in (name, str(value))]


def hints(
    mean: str | None,
    std: str | None,
    output: OutputKind | None,
    layout: Layout | None,
    dtype: DType | None,
    container: Container | None,
    resize: bool = False,
) -> Hints:
    """What the user says about the model.

    Raises:
        InputError: Numbers that are none, or one of mean and std alone.
    """
    with needs("calibration"):
        from calibration import Hints

    means, stds = floats(mean, "--mean"), floats(std, "--std")
    if (mean is None) != (std is None):
        given, other = ("--mean", "--std") if std is None else ("--std", "--mean")
        raise InputError(f"expected {other} with {given}, got {given} alone: add {other}, or drop both")
    return Hints(
        mean=means,
        std=stds,
        output=output,
        layout=layout,
        dtype=dtype,
        container=container,
        resize=resize,
    )


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
