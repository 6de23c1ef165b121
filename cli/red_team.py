"""`guard red-team`."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from cli import options
from cli.display import make_room, progress_bars, show_rows
from cli.extras import needs
from cli.inputs import tell_skipped
from cli.memory import keep_freed_memory
from cli.threads import settle_threads

if TYPE_CHECKING:
    from calibration import RedTeam


def red_team_command(
    model: options.ModelArgument,
    data: options.CleanOption,
    weights: options.WeightsOption = None,
    frr: Annotated[float, typer.Option(help="False rejection rate at which settings are compared.")] = 0.01,
    overlays: Annotated[int, typer.Option(help="Clean images that STRIP superimposes.")] = 100,
    report: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Write a page with a picture.")] = None,
    mean: options.MeanOption = None,
    std: options.StdOption = None,
    output: options.OutputOption = None,
    layout: options.LayoutOption = None,
    dtype: options.DTypeOption = None,
    container: options.ContainerOption = None,
    shape: options.ShapeOption = None,
    skip_unreadable: options.SkipOption = False,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of triggers, targets and batches.")] = 0,
    as_json: options.JsonOption = False,
) -> None:
    """Plant known triggers in copies of the model, and see which setting finds them.

    How many triggered inputs slip through (FAR) can't be measured from clean
    images. So this command fine-tunes copies of the model, each with a backdoor
    that we know, and tries every setting (blend, alpha, overlays) on them at the
    same false rejection rate. It recommends one, says how many triggered inputs
    to expect through it, and names the attacks to which the guard is blind. That
    is an estimate for the planted attacks, no guarantee for others. The model
    itself is not changed; it must be one that PyTorch can train: .pt2,
    TorchScript .pt or package.module:factory, not .onnx.

    Example: guard red-team model.pt2 --data clean/ --report red-team.html

    Then calibrate with that setting on other clean images, or let
    guard calibrate --red-team do both.
    """
    with needs("calibration"):
        from calibration import load_images, red_team
        from calibration.discovery import discover
        from calibration.fine_tuning import trainable
        from calibration.red_team import check_images
        from calibration.red_team_report import red_team_report
        from calibration.sources import open_model

    keep_freed_memory()
    hints = options.hints(mean, std, output, layout, dtype, container)
    if report is not None:
        make_room(report)
    with tempfile.TemporaryDirectory(prefix="guard-") as scratch, progress_bars() as progress:
        source = open_model(model, weights, Path(scratch))
        trainable(source.backend)
        size = options.shape(shape) or (source.image_shape if data.is_dir() else None)
        loaded = load_images(data, size, skip_unreadable=skip_unreadable, progress=progress)
        clean = loaded.distinct()
        check_images(len(clean), frr, overlays)
        predictor = discover(source.backend, clean, source.hints(hints))
        settle_threads(predictor)
        found = red_team(predictor, clean, frr, overlays, seed, progress=progress)
    tell_skipped(loaded.skipped)
    if len(clean) < len(loaded):
        typer.echo(f"{len(loaded) - len(clean)} of {len(loaded)} clean images equal others, and were left out", err=True)
    if as_json:
        typer.echo(msgspec.json.encode(found).decode())
    else:
        show_red_team(found)
        given: dict[str, object] = {"--weights": weights, "--mean": mean, "--std": std, "--output": output}
        given |= {"--layout": layout, "--dtype": dtype, "--container": container, "--shape": shape, "--frr": frr}
        same = [model, *options.again(given), *(["--skip-unreadable"] if skip_unreadable else [])]
        _show_next(found, same, data, len(clean), overlays)
    if report is not None:
        report.write_bytes(red_team_report(found))
        typer.echo(f"report: {report}", err=True)


def show_red_team(found: RedTeam) -> None:
    """Print the tables and what must be said with them."""
    from calibration.red_team_report import TITLE, far_table, plants_table, remarks

    header, rows = far_table(found)
    show_rows(TITLE, rows, header)
    typer.echo(f"* recommended: {found.chosen}\n")
    header, rows = plants_table(found)
    show_rows("The copies", rows, header)
    typer.echo()
    for text in remarks(found):
        typer.echo(text)


def _show_next(found: RedTeam, same: Sequence[str], data: Path, count: int, overlays: int) -> None:
    """The two commands that make use of it, with the arguments that were given here."""
    from calibration.red_team import needed_for

    base = ["guard", "calibrate", *same, "--out", "PROFILE"]
    weight = [] if found.chosen.alpha is None else ["--alpha", f"{found.chosen.alpha:g}"]
    setting = ["--blend", found.chosen.blend, *weight, "--overlays", str(found.chosen.overlays)]
    typer.echo(f"next: {shlex.join([*base, '--data', 'OTHER', *setting])}")
    typer.echo("      OTHER: clean images that were not red-teamed, else more clean inputs may be rejected than asked for")
    needed = 2 * needed_for(found.frr, overlays)
    clean = str(data) if count >= needed else "CLEAN"
    typer.echo(f"  or: {shlex.join([*base, '--data', clean, '--overlays', str(overlays), '--red-team'])}")
    which = "these images" if count >= needed else f"CLEAN, at least {needed} images,"
    typer.echo(f"      cuts {which} into a part that chooses and a part that sets the threshold")
