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
from cli.red_team import show_red_team
from cli.repairing import Repairing, check_repair, repair_first
from cli.threads import settle_threads
from guard.errors import CalibrationError, InputError
from guard.predictors import Backend
from guard.profile import check_target

if TYPE_CHECKING:
    from calibration import BlendChoice, Calibration, Hints, ImageSet, RedTeam, Settings
    from calibration.data import Progress

_RATES = "Setting the threshold"
_REPAIR = "Repairing first"
_Blend = Literal["logit", "logit+demeaned", "add", "mix", "demeaned", "max"]  # calibration.BlendChoice, which needs an extra


def calibrate_command(
    model: options.ModelArgument,
    data: options.CleanOption,
    out: Annotated[Path, typer.Option(metavar="PROFILE", help="Folder to write; a profile that is there is replaced.")],
    weights: options.WeightsOption = None,
    frr: Annotated[float, typer.Option(help="Share of clean inputs that may be rejected.", rich_help_panel=_RATES)] = 0.01,
    overlays: Annotated[int, typer.Option(help="Clean images that STRIP superimposes.", rich_help_panel=_RATES)] = 100,
    blend: Annotated[
        _Blend | None,
        typer.Option(
            help="How they are superimposed. logit shifts mid-tones and hardly touches black and white; add brightens; "
            "max keeps the brighter pixel; mix is the weighted mean; demeaned brightens and darkens. logit+demeaned rejects "
            "what either of the two finds, each with half the rate and half the overlays.",
            show_default="logit",
            rich_help_panel=_RATES,
        ),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            help="Their weight, with a single blend.",
            show_default="3.5; 1.5 for demeaned, 0.5 for mix, 1 for add and max",
            rich_help_panel=_RATES,
        ),
    ] = None,
    red_team: Annotated[
        bool,
        typer.Option("--red-team", help="Choose blend and alpha on triggers planted in copies.", rich_help_panel=_RATES),
    ] = False,
    method: Annotated[
        Literal["conformal", "normal"], typer.Option(help="Of setting the threshold.", rich_help_panel=_RATES)
    ] = "conformal",
    confidence: Annotated[
        float | None, typer.Option(help="Make the rate hold with this probability, e.g. 0.95.", rich_help_panel=_RATES)
    ] = None,
    preprocess: Annotated[
        Literal["none", "gym", "gym-intensive", "shrink-pad", "flip"] | None,
        typer.Option(
            help="Before the model answers; gym is for models tuned for it.",
            show_default="none, or what a repaired model was tuned for",
        ),
    ] = None,
    tripwire: Annotated[
        str | None,
        typer.Option(
            metavar="ORIGINAL",
            help="With a repaired MODEL: the model that it was made of. It goes on detecting, the repaired one answers.",
            rich_help_panel=_REPAIR,
        ),
    ] = None,
    tripwire_weights: Annotated[
        Path | None,
        typer.Option(help=".safetensors for the module that ORIGINAL's factory makes.", rich_help_panel=_REPAIR),
    ] = None,
    max_accuracy_drop: Annotated[
        float | None,
        typer.Option(
            help="Points of clean accuracy that the preprocessor, or the repair, may cost.",
            show_default="3; 12 to repair by gym",
        ),
    ] = None,
    mean: options.MeanOption = None,
    std: options.StdOption = None,
    output: options.OutputOption = None,
    layout: options.LayoutOption = None,
    dtype: options.DTypeOption = None,
    container: options.ContainerOption = None,
    shape: options.ShapeOption = None,
    resize: options.ResizeOption = False,
    skip_unreadable: options.SkipOption = False,
    repair: Annotated[
        Literal["gym", "codefend"] | None,
        typer.Option(
            help="Repair the model first, with half of the clean images (see guard repair). The repaired model answers, the "
            "original goes on detecting.",
            rich_help_panel=_REPAIR,
        ),
    ] = None,
    quarantine: Annotated[
        Path | None, typer.Option(metavar="DIR", help="What the guard rejected, for --repair.", rich_help_panel=_REPAIR)
    ] = None,
    allow_missing_classes: Annotated[
        bool, typer.Option("--allow-missing-classes", help="Go on when a class has no clean image.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the choice of overlays, and of the red team.")] = 0,
    as_json: options.JsonOption = False,
) -> None:
    """Set the threshold from clean images alone, and write a profile with a report.

    Example: guard calibrate model.onnx --data clean/ --out profile

    With --red-team, a part of the clean images first chooses how to superimpose (see guard red-team), and the others set
    the threshold.
    """
    with needs("calibration"):
        from calibration import Settings, calibrate, load_images
        from calibration.discovery import declared_shape, discover
        from calibration.fine_tuning import trainable
        from calibration.red_team_report import red_team_sections
        from calibration.report import calibration_report
        from calibration.settings import check_settings
        from calibration.sources import open_model, open_tripwire

    if red_team and (blend is not None or alpha is not None):
        given = " and ".join(name for name, value in (("--blend", blend), ("--alpha", alpha)) if value is not None)
        raise InputError(f"expected --red-team or {given}, got both: --red-team chooses them, so drop one")
    if repair is not None and (red_team or tripwire is not None or preprocess is not None):
        raise InputError(
            "expected --repair without --red-team, --tripwire and --preprocess: it brings the last two along itself"
        )
    check_repair(repair, quarantine)
    settings = Settings(
        frr=frr,
        overlays=overlays,
        blend=blend or "logit",
        alpha=alpha,
        preprocess=preprocess or "none",
        max_accuracy_drop=3.0 if max_accuracy_drop is None else max_accuracy_drop,
        method=method,
        confidence=confidence,
        allow_missing_classes=allow_missing_classes,
        seed=seed,
    )
    hints = options.hints(mean, std, output, layout, dtype, container, resize)
    check_target(out)
    found, extra, sections = None, {}, []
    with tempfile.TemporaryDirectory(prefix="guard-") as scratch, progress_bars() as progress:
        source = open_model(model, weights, Path(scratch))
        hints = source.hints(hints)
        watched = None if tripwire is None else open_tripwire(tripwire, tripwire_weights, Path(scratch), hints, source)
        size = options.shape(shape) or (declared_shape(source.backend) if data.is_dir() else None)
        clean = load_images(data, size, skip_unreadable=skip_unreadable, progress=progress)
        skipped = clean.skipped
        if red_team:
            trainable(source.backend)
        check_settings(settings, len(clean))
        if red_team:
            clean, settings, found = _red_team(source.backend, clean, settings, hints, progress)
            extra, sections = {"red_team.json": msgspec.json.encode(found)}, red_team_sections(found)
        elif repair is not None:
            first = Repairing(repair, quarantine, max_accuracy_drop, seed % 2**31, skip_unreadable)
            watched = open_tripwire(model, weights, Path(scratch), hints)
            source, clean, extra = repair_first(first, source, clean, settings, hints, out, Path(scratch), progress)
            hints = source.hints(hints)
        else:
            settle_threads(discover(source.backend, clean, hints))
        calibration = calibrate(
            source.backend,
            clean,
            settings,
            hints=hints,
            record=source.record,
            preprocessor=source.preprocessor if preprocess is None else None,
            tripwire=None if watched is None else watched[0],
            progress=progress,
        )
        pages = {"report.html": calibration_report(calibration, sections), **extra}
        calibration.save(out, source.file, pages, None if watched is None else watched[1])
    _show(calibration, skipped, found, out, as_json)


def _red_team(
    backend: Backend, clean: ImageSet, settings: Settings, hints: Hints, progress: Progress
) -> tuple[ImageSet, Settings, RedTeam]:
    """Let one part of the clean images choose the setting; returns the other part, which no choice has seen."""
    from calibration import red_team, split
    from calibration.calibrate import accuracies, chosen_preprocessor, divide
    from calibration.discovery import discover
    from calibration.red_team import CANDIDATES, check_images
    from calibration.settings import check_settings

    first, rest = split(clean, settings.seed, settings.frr, settings.overlays)
    try:
        check_images(len(first), settings.frr, settings.overlays)
        check_settings(settings, len(rest))
    except CalibrationError as error:
        shares = f"{len(first)} of {len(clean)} clean images for itself and leaves {len(rest)}"
        raise CalibrationError(f"--red-team takes {shares}, which is too few: {error}") from error
    predictor = discover(backend, first, hints)
    divide(rest, predictor, settings)  # what would stop calibration stops here, before the long work
    before = chosen_preprocessor(settings)
    if before is not None:
        accuracies(predictor, rest, settings, progress, before)
    settle_threads(predictor)
    able = [item for item in CANDIDATES if _can_calibrate(_with(settings, *item), len(rest))]
    found = red_team(predictor, first, settings.frr, settings.overlays, settings.seed, candidates=able, progress=progress)
    left_out = tuple(item for item in CANDIDATES if item not in able) + found.left_out
    found, chosen = msgspec.structs.replace(found, left_out=left_out), found.chosen
    return rest, _with(settings, chosen.blend, chosen.alpha, chosen.overlays), found


def _with(settings: Settings, blend: BlendChoice, alpha: float | None, overlays: int | None = None) -> Settings:
    return msgspec.structs.replace(settings, blend=blend, alpha=alpha, overlays=overlays or settings.overlays)


def _can_calibrate(settings: Settings, images: int) -> bool:
    """A pair of blends needs twice the images of one."""
    from calibration.settings import check_settings

    try:
        check_settings(settings, images)
    except CalibrationError:
        return False
    return True


def _show(
    calibration: Calibration, skipped: tuple[tuple[str, str], ...], found: RedTeam | None, out: Path, as_json: bool
) -> None:
    from calibration.calibrate import NEAR_CHANCE, near_chance
    from calibration.thresholds import joint_rate

    if as_json:
        summary = _calibrated(calibration, skipped, out)
        if found is not None:
            summary["red_team"] = _summary(found)
        typer.echo(msgspec.json.encode(summary).decode())
        return
    for name, reason in skipped:
        typer.echo(f"skipped {name}: {reason}", err=True)
    spec, model, records = calibration.profile.input, calibration.profile.model, calibration.profile.detectors
    rate = joint_rate(calibration.thresholds)
    interval = "95% interval" if len(records) == 1 else "bounds"
    accuracy = calibration.profile.clean_accuracy
    rows = [
        (
            "model",
            f"{model.kind}, {model.num_classes} classes, takes {spec.container} {spec.layout} {spec.dtype}, {model.output}",
        ),
        ("clean accuracy", "unknown, no labels" if accuracy is None else f"{accuracy:.2%}"),
        *(
            (
                "entropy threshold" if len(records) == 1 else f"entropy threshold, {record.blend}",
                f"{-record.threshold.value:.4f} bits ({record.threshold.method}, {record.threshold.images} clean images)",
            )
            for record in records
        ),
        ("false rejections", f"{rate.value:.2%} asked for; {interval} {rate.low:.2%} to {rate.high:.2%}"),
        ("passes, clean input", f"{_mean_passes(calibration):.1f} of {_overlays(calibration)} on average"),
        ("report", str(out / "report.html")),
    ]
    if found is not None:
        rows.insert(2, ("setting", f"{found.chosen}, chosen by the red team"))
    show_rows(f"Profile {out}", rows)
    if found is not None:
        show_red_team(found)
    if model.output == "labels":
        typer.echo("warning: the model returns labels only, which tells triggers less well apart than probabilities", err=True)
    if accuracy is not None and near_chance(accuracy, model.num_classes):
        typer.echo(f"warning: clean accuracy is near chance: {NEAR_CHANCE}", err=True)
        return
    typer.echo(f"next: guard check {out} IMAGE, guard serve {out}")


def _calibrated(calibration: Calibration, skipped: tuple[tuple[str, str], ...], out: Path) -> dict[str, object]:
    """What `--json` prints.

    `entropy_threshold` is the first detector's, `detectors` has each one's. `frr`, `overlays` and `mean_passes` are of all
    together; `frr_low` and `frr_high` are the 95% interval for one detector, and bounds for several, see `joint_rate`.
    """
    from calibration.thresholds import joint_rate

    rate = joint_rate(calibration.thresholds)
    return {
        "profile": str(out),
        "entropy_threshold": -calibration.thresholds[0].value,
        "detectors": [
            {
                "name": strip.name,
                "blend": strip.blend,
                "alpha": strip.alpha,
                "entropy_threshold": -threshold.value,
                "overlays": len(strip.overlays),
                "frr": threshold.frr,
                "frr_low": threshold.frr_low,
                "frr_high": threshold.frr_high,
            }
            for strip, threshold in zip(calibration.strips, calibration.thresholds, strict=True)
        ],
        "frr": rate.value,
        "frr_low": rate.low,
        "frr_high": rate.high,
        "images": calibration.thresholds[0].images,
        "overlays": _overlays(calibration),
        "mean_passes": _mean_passes(calibration),
        "clean_accuracy": calibration.profile.clean_accuracy,
        "skipped": [{"file": name, "reason": reason} for name, reason in skipped],
    }


def _overlays(calibration: Calibration) -> int:
    return sum(len(strip.overlays) for strip in calibration.strips)


def _mean_passes(calibration: Calibration) -> float:
    return sum(record.mean_passes or 0.0 for record in calibration.profile.detectors)


def _summary(found: RedTeam) -> dict[str, object]:
    """The chosen setting, and what to expect of it on each planted trigger; null where the copy did not learn it."""
    planted: list[dict[str, object]] = []
    for plant in found.planted:
        far = next((item.far for item in plant.figures if item.setting == found.chosen), None)
        low, high = (None, None) if far is None else (far.low, far.high)
        planted.append({"name": plant.name, "far": far and far.value, "far_low": low, "far_high": high})
    chosen = found.chosen
    return {"blend": chosen.blend, "alpha": chosen.alpha, "overlays": chosen.overlays, "planted": planted}
