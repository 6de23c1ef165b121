"""`guard calibrate`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
import typer

from cli import options
from cli.display import progress_bars, show_rows
from cli.extras import needs
from cli.threads import settle_threads
from guard.detectors import Blend
from guard.images import Container, DType, Layout
from guard.predictors import OutputKind

if TYPE_CHECKING:
    from calibration import Calibration, ImageSet

_RATES = "Setting the threshold"
_MODEL = "What the model takes and returns"


def calibrate_command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A .onnx, .pt2 or TorchScript .pt file, or package.module:factory.")
    ],
    data: Annotated[
        Path, typer.Option(metavar="CLEAN", help="Clean images: a folder with a sub-folder per class, or an .npz.")
    ],
    out: Annotated[Path, typer.Option(metavar="PROFILE", help="Folder to write; a profile that is there is replaced.")],
    weights: Annotated[Path | None, typer.Option(help=".safetensors for the module that a factory makes.")] = None,
    frr: Annotated[float, typer.Option(help="Share of clean inputs that may be rejected.", rich_help_panel=_RATES)] = 0.01,
    overlays: Annotated[int, typer.Option(help="Clean images that STRIP superimposes.", rich_help_panel=_RATES)] = 100,
    blend: Annotated[Blend, typer.Option(help="How they are superimposed.", rich_help_panel=_RATES)] = "add",
    alpha: Annotated[
        float | None, typer.Option(help="Their weight.", show_default="1, and 0.5 for mix", rich_help_panel=_RATES)
    ] = None,
    method: Annotated[
        Literal["conformal", "normal"], typer.Option(help="Of setting the threshold.", rich_help_panel=_RATES)
    ] = "conformal",
    confidence: Annotated[
        float | None, typer.Option(help="Make the rate hold with this probability, e.g. 0.95.", rich_help_panel=_RATES)
    ] = None,
    preprocess: Annotated[
        Literal["none", "gym"], typer.Option(help="Before the model answers; gym is for models tuned for it.")
    ] = "none",
    max_accuracy_drop: Annotated[float, typer.Option(help="Points of clean accuracy that the preprocessor may cost.")] = 3.0,
    mean: Annotated[str | None, typer.Option(metavar="R,G,B", help="Of images in [0, 1].", rich_help_panel=_MODEL)] = None,
    std: Annotated[str | None, typer.Option(metavar="R,G,B", help="Of images in [0, 1].", rich_help_panel=_MODEL)] = None,
    output: Annotated[
        OutputKind | None, typer.Option(help="What it returns.", show_default="found out", rich_help_panel=_MODEL)
    ] = None,
    layout: Annotated[
        Layout | None, typer.Option(help="Axis order it takes.", show_default="found out", rich_help_panel=_MODEL)
    ] = None,
    dtype: Annotated[
        DType | None, typer.Option(help="0..255 or 0..1.", show_default="found out", rich_help_panel=_MODEL)
    ] = None,
    container: Annotated[
        Container | None, typer.Option(help="Array library it takes.", show_default="found out", rich_help_panel=_MODEL)
    ] = None,
    shape: Annotated[
        str | None, typer.Option(metavar="C,H,W", help="Bring images of a folder to this.", rich_help_panel=_MODEL)
    ] = None,
    resize: Annotated[
        bool, typer.Option("--resize", help="Serve images of other sizes, resized.", rich_help_panel=_MODEL)
    ] = False,
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="Leave out files that are no images, and list them.")
    ] = False,
    allow_missing_classes: Annotated[
        bool, typer.Option("--allow-missing-classes", help="Go on when a class has no clean image.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the choice of overlays.")] = 0,
    as_json: options.JsonOption = False,
) -> None:
    """Set the threshold from clean images alone, and write a profile with a report.

    Example: guard calibrate model.onnx --data clean/ --out profile
    """
    with needs("calibration"):
        from calibration import Hints, Settings, calibrate, load_images
        from calibration.calibrate import check_settings
        from calibration.discovery import declared_shape, discover
        from calibration.report import calibration_report
        from calibration.sources import open_model

    settings = Settings(
        frr=frr,
        overlays=overlays,
        blend=blend,
        alpha=alpha,
        preprocess=preprocess,
        max_accuracy_drop=max_accuracy_drop,
        method=method,
        confidence=confidence,
        allow_missing_classes=allow_missing_classes,
        seed=seed,
    )
    hints = Hints(
        mean=options.floats(mean, "--mean"),
        std=options.floats(std, "--std"),
        output=output,
        layout=layout,
        dtype=dtype,
        container=container,
        resize=resize,
    )
    with tempfile.TemporaryDirectory(prefix="guard-") as scratch, progress_bars() as progress:
        source = open_model(model, weights, Path(scratch))
        size = options.shape(shape) or (declared_shape(source.backend) if data.is_dir() else None)
        clean = load_images(data, size, skip_unreadable=skip_unreadable, progress=progress)
        check_settings(settings, len(clean))
        settle_threads(discover(source.backend, clean, hints))
        calibration = calibrate(source.backend, clean, settings, hints=hints, record=source.record, progress=progress)
        calibration.save(out, source.file, {"report.html": calibration_report(calibration)})
    _show(calibration, clean, out, as_json)


def _show(calibration: Calibration, clean: ImageSet, out: Path, as_json: bool) -> None:
    record = calibration.profile.detectors[0]
    threshold = record.threshold
    if as_json:
        summary = {
            "profile": str(out),
            "entropy_threshold": -threshold.value,
            "frr": threshold.frr,
            "frr_low": threshold.frr_low,
            "frr_high": threshold.frr_high,
            "images": threshold.images,
            "overlays": len(calibration.strip.overlays),
            "mean_passes": record.mean_passes,
            "clean_accuracy": calibration.profile.clean_accuracy,
            "skipped": [{"file": name, "reason": reason} for name, reason in clean.skipped],
        }
        typer.echo(msgspec.json.encode(summary).decode())
        return
    for name, reason in clean.skipped:
        typer.echo(f"skipped {name}: {reason}", err=True)
    spec, model = calibration.profile.input, calibration.profile.model
    accuracy = calibration.profile.clean_accuracy
    rows = [
        (
            "model",
            f"{model.kind}, {model.num_classes} classes, takes {spec.container} {spec.layout} {spec.dtype}, {model.output}",
        ),
        ("clean accuracy", "unknown, no labels" if accuracy is None else f"{accuracy:.2%}"),
        ("entropy threshold", f"{-threshold.value:.4f} bits ({threshold.method}, {threshold.images} clean images)"),
        (
            "false rejections",
            f"{threshold.frr:.2%} asked for; 95% interval {threshold.frr_low:.2%} to {threshold.frr_high:.2%}",
        ),
        ("passes, clean input", f"{record.mean_passes:.1f} of {len(calibration.strip.overlays)} on average"),
        ("report", str(out / "report.html")),
    ]
    show_rows(f"Profile {out}", rows)
    if model.output == "labels":
        typer.echo("warning: the model returns labels only, which tells triggers less well apart than probabilities", err=True)
    if accuracy is not None and accuracy < 2.0 / model.num_classes:
        typer.echo("warning: clean accuracy is near chance: check --weights, --mean, --std and the order of labels", err=True)
        return
    typer.echo(f"next: guard check {out} IMAGE, guard serve {out}")
