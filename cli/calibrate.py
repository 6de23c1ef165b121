"""`guard calibrate`."""

from __future__ import annotations

import shutil
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
import torch
import typer

from cli import options
from cli.calibrated import Calibrated, show_calibrated
from cli.display import progress_bars
from cli.extras import needs
from cli.inputs import tell_resized
from cli.repairing import Repairing, check_repair, repair_first
from cli.threads import settle_threads
from guard.errors import CalibrationError, InputError
from guard.predictors import Backend
from guard.profile import check_target

if TYPE_CHECKING:
    from calibration import BlendChoice, Hints, ImageSet, RedTeam, Settings
    from calibration.data import Progress
    from calibration.sources import ModelSource

_RATES = "Setting the threshold"
_REPAIR = "Repairing first"
_DETECT = "Detectors"
_Blend = Literal["logit", "logit+demeaned", "add", "mix", "demeaned", "max"]  # calibration.BlendChoice, which needs an extra


class _Detector(StrEnum):
    """`calibration.DetectorChoice`, likewise; repeatable options take no literals."""

    STRIP = "strip"
    FEATURE_SQUEEZING = "feature-squeezing"


def calibrate_command(
    model: options.ModelArgument,
    data: options.CleanOption,
    out: Annotated[Path, typer.Option(metavar="PROFILE", help="Folder to write; a profile that is there is replaced.")],
    weights: options.WeightsOption = None,
    detector: Annotated[
        list[_Detector] | None,
        typer.Option(
            help="Online test; repeatable, any of them may reject, and they share --frr. strip superimposes clean images. "
            "feature-squeezing looks whether fewer colours or smoothing change the answer: made for adversarial "
            "perturbations, it is blind to patches, which survive that and score lower than clean images do.",
            show_default="strip",
            rich_help_panel=_DETECT,
        ),
    ] = None,
    scan: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="What guard scan wrote of the model, or of ORIGINAL: adds a filter for the neurons that the trigger of each "
            "infected label excites. Needs a .pt2 file or a factory.",
            rich_help_panel=_DETECT,
        ),
    ] = None,
    frr: Annotated[float, typer.Option(help="Share of clean inputs that may be rejected.", rich_help_panel=_RATES)] = 0.01,
    overlays: Annotated[
        int,
        typer.Option(
            help="Clean images that STRIP superimposes, and that choose the neurons for --scan.", rich_help_panel=_RATES
        ),
    ] = 100,
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
    passes: Annotated[
        Literal["exact", "votes", "sequential"] | None,
        typer.Option(
            help="When STRIP stops before it has superimposed all overlays. exact: when no further one can turn the verdict of "
            "their mean entropy. votes: by the default blend sooner, once the entropy under a twentieth of them, 3 at least, "
            "is over the threshold. sequential: sooner still, and at triggered inputs, too, by boundaries on such votes that "
            "keep to the same share of false rejections; needs 300 to 600 clean images more.",
            show_default="exact",
            rich_help_panel=_RATES,
        ),
    ] = None,
    precision: Annotated[
        Literal["float32", "bfloat16", "auto"] | None,
        typer.Option(
            help="Of detectors' forward passes in PyTorch on a CPU; answers stay in float32. auto takes bfloat16 where it is "
            "clearly faster on this machine and turns at most 0.5% of the verdicts on clean images.",
            show_default="float32",
            rich_help_panel=_DETECT,
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
        from calibration import DetectorChoice, Settings, calibrate, load_images
        from calibration.discovery import discover
        from calibration.division import without
        from calibration.filters import infected_triggers
        from calibration.fine_tuning import trainable
        from calibration.red_team_report import red_team_sections
        from calibration.report import calibration_report
        from calibration.settings import check_settings
        from calibration.sources import open_model, open_tripwire

    detectors = msgspec.convert([item.value for item in detector or [_Detector.STRIP]], tuple[DetectorChoice, ...])
    of_strip = [name for name, value in (("--blend", blend), ("--alpha", alpha), ("--passes", passes)) if value is not None]
    if "strip" not in detectors and of_strip:
        named = " and ".join(of_strip)
        raise InputError(f"expected {named} with --detector strip, got it without: add that detector, or drop {named}")
    if red_team and (scan is not None or detectors != ("strip",)):
        raise InputError("expected --red-team with STRIP alone, whose setting it chooses, got other detectors: drop one")
    if red_team and (blend is not None or alpha is not None):
        given = " and ".join(name for name, value in (("--blend", blend), ("--alpha", alpha)) if value is not None)
        raise InputError(f"expected --red-team or {given}, got both: --red-team chooses them, so drop one")
    if repair is not None and (red_team or tripwire is not None or preprocess is not None):
        raise InputError(
            "expected --repair without --red-team, --tripwire and --preprocess: it brings the last two along itself"
        )
    check_repair(repair, quarantine)
    if tripwire_weights is not None and tripwire is None:
        raise InputError("expected --tripwire with --tripwire-weights, got it without: name the original, or drop the weights")
    if max_accuracy_drop is not None and repair is None and preprocess in (None, "none"):
        raise InputError("expected --preprocess or --repair with --max-accuracy-drop, got neither: drop it, or name one")
    settings = Settings(
        detectors=detectors,
        frr=frr,
        overlays=overlays,
        blend=blend or "logit",
        alpha=alpha,
        passes=passes or "exact",
        precision=precision or "float32",
        preprocess=preprocess or "none",
        max_accuracy_drop=3.0 if max_accuracy_drop is None else max_accuracy_drop,
        method=method,
        confidence=confidence,
        allow_missing_classes=allow_missing_classes,
        seed=seed,
    )
    hints = options.hints(mean, std, output, layout, dtype, container, resize)
    check_target(out)
    found, extra, sections, first, left_out = None, {}, [], None, 0
    with tempfile.TemporaryDirectory(prefix="guard-") as scratch, progress_bars() as progress:
        source = open_model(model, weights, Path(scratch))
        hints = source.hints(hints)
        watched = None if tripwire is None else open_tripwire(tripwire, tripwire_weights, Path(scratch), hints, source)
        looked_at = source.backend if watched is None else watched[0].backend
        triggers = () if scan is None else infected_triggers(scan, looked_at)
        settings = msgspec.structs.replace(settings, triggers=len(triggers))
        size = options.shape(shape) or (source.image_shape if data.is_dir() else None)
        loaded = load_images(data, size, skip_unreadable=skip_unreadable, progress=progress)
        clean = loaded.distinct()
        equal = len(loaded) - len(clean)
        skipped = clean.skipped
        if red_team:
            trainable(looked_at)
            before = len(clean)
            clean = clean if watched is not None else without(clean, source.learnt, settings)
            left_out = before - len(clean)
        check_settings(settings, len(clean))
        if red_team:
            known = hints if watched is None else watched[0].hints
            clean, settings, found = _red_team((looked_at, known), (source, hints), clean, settings, progress)
            extra, sections = {"red_team.json": msgspec.json.encode(found)}, red_team_sections(found)
        elif repair is not None:
            asked = Repairing(repair, quarantine, max_accuracy_drop, seed % 2**31, skip_unreadable)
            watched = open_tripwire(model, weights, Path(scratch), hints)
            first = repair_first(asked, source, clean, settings, hints, out, Path(scratch), progress)
            source, clean, extra = first.source, first.rest, first.pages
            skipped, hints = skipped + first.skipped, source.hints(hints)
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
            learnt=source.learnt,
            triggers=triggers,
            progress=progress,
        )
        pages = {"report.html": calibration_report(calibration, sections), **extra}
        calibration.save(out, source.file, pages, None if watched is None else watched[1])
    if equal:
        typer.echo(f"{equal} of {len(loaded)} clean images equal others, and were left out", err=True)
    tell_resized(loaded.resized, len(loaded), calibration.profile.input)
    if first is not None:
        shutil.rmtree(first.work, ignore_errors=True)
    show_calibrated(
        Calibrated(calibration, out, skipped, source.repair, first is not None, calibration.learnt + left_out, found), as_json
    )


def _red_team(
    watched: tuple[Backend, Hints],
    answering: tuple[ModelSource, Hints],
    clean: ImageSet,
    settings: Settings,
    progress: Progress,
) -> tuple[ImageSet, Settings, RedTeam]:
    """Let one part of the clean images choose the setting; returns the other part, which no choice has seen.

    Args:
        watched: What the detectors look at, and what is known of its input.
        answering: What answers, likewise: the same but for a tripwire.
        clean: See `calibrate`.
        settings: Likewise.
        progress: Likewise.
    """
    from calibration import red_team, split
    from calibration.accuracy import accuracies, check_drop
    from calibration.calibrate import chosen_preprocessor
    from calibration.discovery import discover
    from calibration.division import divide
    from calibration.red_team import CANDIDATES, check_images
    from calibration.settings import check_settings

    first, rest = split(clean, settings.seed, settings.frr, settings.overlays)
    try:
        check_images(len(first), settings.frr, settings.overlays)
        check_settings(settings, len(rest))
    except CalibrationError as error:
        shares = f"{len(first)} of {len(clean)} clean images for itself and leaves {len(rest)}"
        raise CalibrationError(f"--red-team takes {shares}, which is too few: {error}") from error
    predictor = discover(watched[0], first, watched[1])
    divide(rest, predictor, settings)  # what would stop calibration stops here, before the long work
    before = chosen_preprocessor(settings)
    if before is not None:
        source, known = answering
        answers = discover(source.backend, first, known)
        unseen = rest.select(torch.nonzero(~rest.among(source.learnt)).flatten())
        if len(unseen):  # else calibration says what is missing
            check_drop(*accuracies(answers, unseen, settings.seed, progress, before), settings.max_accuracy_drop)
    settle_threads(predictor)
    able = [item for item in CANDIDATES if _can_calibrate(_with(settings, *item), len(rest))]
    asked = (settings.frr, settings.overlays, settings.seed)
    found = red_team(predictor, first, *asked, candidates=able, passes=settings.passes, progress=progress)
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
