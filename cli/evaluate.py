"""`guard evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from cli import options
from cli.display import make_room, progress_bars, show_rows
from cli.extras import needs
from cli.inputs import tell_resized, tell_skipped
from cli.threads import settle_threads
from guard import Guard
from guard.errors import InputError
from guard.files import as_text

if TYPE_CHECKING:
    from calibration import Evaluation

_MANY = 0.1  # of the triggered inputs, that are accepted


def evaluate_command(
    profile: options.ProfileArgument,
    data: Annotated[Path, typer.Option(metavar="CLEAN", help="Clean images with labels, other than calibration's.")],
    triggered: Annotated[Path | None, typer.Option(help="Images with the trigger, and their true labels.")] = None,
    target: Annotated[int | None, typer.Option(help="The label that the attack wants.")] = None,
    report: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Write a page with the distributions.")] = None,
    speed: Annotated[
        bool, typer.Option("--speed", help="Also time the guard against the model alone, on an idle machine.")
    ] = False,
    skip_unreadable: options.SkipOption = False,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of a preprocessor that draws.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: options.JsonOption = False,
) -> None:
    """Measure accuracy, attack success, false rejections and acceptances, with 95% intervals.

    Example: guard evaluate profile --data test.npz --triggered triggered.npz --target 7
    """
    with needs("calibration"):
        from calibration.data import load_images
        from calibration.evaluation import align_sets, judge, summarise
        from calibration.report import evaluation_report
        from calibration.speed import measure_speed

    if triggered is None and target is not None:
        raise InputError("expected --triggered with --target, got it without: add the triggered images, or drop --target")
    if report is not None:
        make_room(report)
    guard = Guard.load(profile, seed=seed, device=device)
    settle_threads(guard.predictor)
    with progress_bars() as progress:
        shape = guard.predictor.spec.shape
        clean = load_images(data, shape if data.is_dir() else None, skip_unreadable=skip_unreadable, progress=progress)
        attacked = None
        if triggered is not None:
            attacked = load_images(
                triggered, shape if triggered.is_dir() else None, skip_unreadable=skip_unreadable, progress=progress
            )
        sets = [clean] if attacked is None else [clean, attacked]
        clean, attacked = align_sets(guard, clean, attacked, target)
        clean_judged = judge(guard, clean, "clean images", progress)
        attacked_judged = None if attacked is None else judge(guard, attacked, "triggered images", progress)
        costs = measure_speed(guard, clean, progress) if speed else ()
    result = summarise(clean_judged, clean.labels, attacked_judged, None if attacked is None else attacked.labels, target)
    result = msgspec.structs.replace(result, speed=costs)
    tell_skipped(item for images in sets for item in images.skipped)
    tell_resized(sum(images.resized for images in sets), sum(map(len, sets)), guard.predictor.spec)
    if as_json:
        typer.echo(msgspec.json.encode(result).decode())
    else:
        _show(result, profile)
    if report is not None:
        report.write_bytes(evaluation_report(result, guard, clean_judged, attacked_judged))
        typer.echo(f"report: {report}", err=True)


def _show(result: Evaluation, profile: Path) -> None:
    from calibration.report import FIGURES, SPEED, speed_rows

    rows = []
    for name, title in FIGURES.items():
        estimate = getattr(result, name)
        if estimate is not None:
            rows.append((title, f"{estimate.value:.4f}", f"{estimate.low:.4f} to {estimate.high:.4f}"))
    show_rows(f"Guard {as_text(profile)}", rows, ("", "value", "95% interval"))
    if result.far is not None and result.far.value > _MANY:
        typer.echo(
            "Many triggered inputs pass. guard red-team looks for a better setting; calibrate --scan, after guard scan, adds a "
            "filter for the trigger that it finds.",
            err=True,
        )
    if result.speed:
        show_rows("Speed, on this machine", speed_rows(result), SPEED)
