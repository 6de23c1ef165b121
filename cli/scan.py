"""`guard scan`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from cli import options
from cli.display import progress_bars, show_rows
from cli.extras import needs
from cli.threads import settle_threads

if TYPE_CHECKING:
    from calibration.inspection.record import ScanRecord

_HOW = "How it is inspected"


def scan_command(
    model: options.ModelArgument,
    data: options.CleanOption,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write; a scan that is there is replaced.")],
    weights: options.WeightsOption = None,
    pairs: Annotated[
        bool,
        typer.Option(
            "--pairs",
            help="Also look for triggers from each label to each other one, to find backdoors for some source labels alone.",
            rich_help_panel=_HOW,
        ),
    ] = False,
    steps: Annotated[
        int, typer.Option(min=16, help="Of the search for a label's trigger, at most.", rich_help_panel=_HOW)
    ] = 1008,
    plain: Annotated[
        bool,
        typer.Option("--plain", help="All steps for every label, as published; 4 times the work.", rich_help_panel=_HOW),
    ] = False,
    mean: options.MeanOption = None,
    std: options.StdOption = None,
    output: options.OutputOption = None,
    layout: options.LayoutOption = None,
    dtype: options.DTypeOption = None,
    container: options.ContainerOption = None,
    shape: options.ShapeOption = None,
    skip_unreadable: options.SkipOption = False,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Of the cut into parts and of all draws.")] = 0,
    as_json: options.JsonOption = False,
) -> int:
    """Find out whether the model is backdoored, for which labels, and with which triggers.

    For each label, the smallest trigger is looked for that sends clean images
    there (Neural Cleanse). A backdoor needs a far smaller one than other labels
    do. Labels that stand out get a second opinion: does the trigger work on
    other images, and would a clean model of the same task, trained here from
    this one's answers, need as small a trigger for that label?

    The exit code is 0 if the model seems clean, 1 if it is infected, and 2 if
    something went wrong. DIR then holds scan.json, the triggers and report.html.
    A few hundred clean images of all classes do; labels are optional. The model
    must be one that PyTorch can train: .pt2, TorchScript .pt or
    package.module:factory, not .onnx.

    Example: guard scan model.pt2 --data clean/ --out scanned

    Ctrl-C leaves DIR as it was; the same command goes on from there.
    """
    with needs("repair"):
        from calibration import load_images
        from calibration.discovery import declared_shape, discover
        from calibration.engine import Engine
        from calibration.fine_tuning import trainable
        from calibration.inspection.neural_cleanse import Search
        from calibration.inspection.record import KIND
        from calibration.inspection.scan import ScanSettings
        from calibration.inspection.work import scan_into
        from calibration.sources import open_model

    search = Search(steps=steps)
    settings = ScanSettings(search=search.plain() if plain else search, pairs=pairs, seed=seed)
    KIND.check_target(out)
    given = options.hints(mean, std, output, layout, dtype, container)
    with tempfile.TemporaryDirectory(prefix="guard-") as scratch, progress_bars() as progress:
        source = open_model(model, weights, Path(scratch))
        trainable(source.backend)
        size = options.shape(shape) or (declared_shape(source.backend) if data.is_dir() else None)
        clean = load_images(data, size, skip_unreadable=skip_unreadable, progress=progress)
        predictor = discover(source.backend, clean, source.hints(given))
        settle_threads(predictor)
        try:
            record = scan_into(out, predictor, clean, settings, Engine(), progress)
        except KeyboardInterrupt:
            typer.echo("interrupted: the same command goes on from there", err=True)
            raise
    for name, reason in clean.skipped:
        typer.echo(f"skipped {name}: {reason}", err=True)
    if as_json:
        typer.echo(msgspec.json.encode({**msgspec.to_builtins(record), "out": str(out)}).decode())
    else:
        _show(record, out)
    return 1 if record.infected else 0


def _show(record: ScanRecord, out: Path) -> None:
    from calibration.inspection.figures import candidate_table, figure_rows, remarks, verdict

    show_rows(f"Scan {out}", [*figure_rows(record), ("report", str(out / "report.html"))])
    for findings in (record.labels, record.pairs):
        if findings:
            header, rows = candidate_table(findings)
            typer.echo()
            show_rows("The smallest triggers", rows, header)
    typer.echo()
    typer.echo(verdict(record))
    for text in remarks(record):
        typer.echo(text, err=True)
