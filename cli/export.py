"""`guard export`."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import typer

from cli import options
from cli.extras import needs
from guard.errors import ExportError


def export(
    profile: options.ProfileArgument,
    kind: Annotated[
        Literal["mar", "onnx"], typer.Option("--format", help="mar: a TorchServe archive with model, profile and handler.")
    ] = "mar",
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the result.")] = Path("model-store"),
    name: Annotated[str | None, typer.Option(help="Of the model.", show_default="the profile folder's name")] = None,
    version: Annotated[str, typer.Option(help="Of the archive.")] = "1.0",
) -> None:
    """Make a TorchServe archive or an ONNX file; what comes out is compared with the original first.

    Example: guard export profile --format mar --out model-store --name signs
    """
    name = name or profile.absolute().name
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) is None:
        raise ExportError(f"expected a model name of letters, digits, '.', '_' and '-', got {name!r}: pass another --name")
    if kind == "onnx":
        with needs("onnx"):
            from export import export_onnx

        typer.echo(str(export_onnx(profile, out / f"{name}.onnx")))
        return
    from export import export_mar

    typer.echo(str(export_mar(profile, out, name, version)))


def export_to_scratch(profile: Path, name: str, model_config: dict[str, object]) -> tempfile.TemporaryDirectory[str]:
    """An archive in a folder of its own, for a server started from a profile; the caller removes it."""
    from export import export_mar

    store = tempfile.TemporaryDirectory(prefix="guard-store-")
    try:
        export_mar(profile, Path(store.name), name, model_config=model_config)
    except BaseException:
        store.cleanup()
        raise
    return store
