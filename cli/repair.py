"""`guard repair`."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import typer

from cli import options
from cli.display import progress_bars
from cli.edge_repair import EdgeChoice, EdgeJobOption, EdgeOption, EdgeTokenOption, InsecureEdgeOption, repair_on_edge
from cli.extras import needs
from cli.inputs import tell_skipped
from cli.memory import keep_freed_memory
from cli.repair_inputs import METHODS, RepairMethod, check_choice, check_options, read_inputs
from cli.repaired import calibrate_with_tripwire, exit_code, show_next, show_repaired
from cli.threads import settle_threads
from cli.time_left import telling_time
from guard.errors import InputError
from handlers.edge_protocol import RepairOptions

_HOW = "How it is repaired"


def repair_command(
    context: typer.Context,
    model: options.ModelArgument,
    method: Annotated[RepairMethod, typer.Option(help=METHODS)],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write; a repaired model that is there is replaced.")],
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="CLEAN",
            help="Clean images: a folder with a sub-folder per class, or an .npz. dhbe needs none, and only measures itself "
            "by them.",
        ),
    ] = None,
    quarantine: Annotated[
        Path | None, typer.Option(metavar="DIR", help="What the guard rejected: a quarantine, images, or an .npz with x.")
    ] = None,
    scan: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="What guard scan wrote: triggers that unlearn, prune and gdm work by, which scan for themselves without, and "
            "by which the other methods are measured.",
        ),
    ] = None,
    weights: options.WeightsOption = None,
    max_accuracy_drop: Annotated[
        float | None,
        typer.Option(
            help="Points of clean accuracy that it may cost, through its preprocessor.",
            show_default="the method's own, 3 to 12",
            rich_help_panel=_HOW,
        ),
    ] = None,
    recipe: Annotated[
        Literal["distilled", "paper"],
        typer.Option(
            help="Of gym and dhbe: ours, or the paper's own, which costs more accuracy, of dhbe also hours on a CPU.",
            rich_help_panel=_HOW,
        ),
    ] = "distilled",
    views: Annotated[
        int,
        typer.Option(
            min=1,
            help="Of gym: random draws whose answers are averaged when serving; each costs a forward pass.",
            rich_help_panel=_HOW,
        ),
    ] = 1,
    rounds: Annotated[
        int,
        typer.Option(min=1, help="Of unlearn: times that the copy is scanned for what is left.", rich_help_panel=_HOW),
    ] = 3,
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Of fine-tuning, for unlearn in each of its turns; of dhbe in all: with fewer, its rate falls sooner.",
            show_default="the method's own",
            rich_help_panel=_HOW,
        ),
    ] = None,
    gan_epochs: Annotated[int, typer.Option(min=2, help="Of codefend's CycleGAN, at most.", rich_help_panel=_HOW)] = 200,
    devices: Annotated[
        int, typer.Option(min=1, help="GPUs to train on; without one, processes on the CPU.", rich_help_panel=_HOW)
    ] = 1,
    mean: options.MeanOption = None,
    std: options.StdOption = None,
    output: options.OutputOption = None,
    layout: options.LayoutOption = None,
    dtype: options.DTypeOption = None,
    container: options.ContainerOption = None,
    shape: Annotated[
        str | None,
        typer.Option(
            metavar="C,H,W",
            help="Bring images of a folder to this. Without --data: what the model takes.",
            rich_help_panel=options.MODEL_PANEL,
        ),
    ] = None,
    skip_unreadable: options.SkipOption = False,
    allow_missing_classes: Annotated[
        bool,
        typer.Option("--allow-missing-classes", help="Go on when a class has no clean image: the copy may forget it."),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Of the cut into parts and of all draws.")] = 0,
    as_json: options.JsonOption = False,
    edge: EdgeOption = None,
    edge_token_file: EdgeTokenOption = None,
    edge_job: EdgeJobOption = None,
    insecure_edge: InsecureEdgeOption = False,
) -> None:
    r"""Repair a copy of the model from clean images, from what the guard rejected, or from nothing but the model.

    A part of the images is held out and measures the repair. One that costs too
    much clean accuracy is not written. DIR then holds the model, in the kind
    that it came in, repair.json and report.html, and is accepted wherever MODEL
    is; it brings its preprocessor along. The model must be one that PyTorch can
    train: .pt2, TorchScript .pt or package.module:factory, not .onnx.

    Example: guard repair model.pt2 --method auto --data clean/ --out repaired

    That scans, chooses a method, repairs and verifies, in some minutes for small
    images. If a guard has quarantined triggered inputs:

    Example: guard repair model.pt2 --method codefend --data clean/ --quarantine rejected --out repaired

    Example without any image: guard repair model.pt2 --method dhbe --shape 3,32,32 --out repaired

    Give --mean and --std then, if the model does not normalise for itself:
    nothing else could tell. With --data, dhbe is measured by all of it.

    Ctrl-C leaves DIR as it was; the same command goes on from the last epoch.

    The exit code is 0, 1 if the repair was written, but its figures speak against
    relying on it, and 2 if something went wrong.

    With --edge, a guard edge serve elsewhere does the work, by --method gym or
    codefend and no other, and makes a profile too: this machine needs only
    pip install 'backdoor-guard\[device]'.
    """
    check_choice(method, data, quarantine, scan, edge_job is not None)
    given = options.given(context)
    check_options(method, given)
    if edge is None and (edge_job is not None or edge_token_file is not None or insecure_edge):
        raise InputError("expected --edge URL with --edge-job, --edge-token-file and --insecure-edge, got none: name it")
    if method == "auto" and devices > 1:
        raise InputError(f"expected --devices with a method of repair, got --method auto and --devices {devices}: name one")
    if edge is not None and devices > 1:
        raise InputError(f"expected --devices without --edge, whose server has its own, got --devices {devices}: drop it")
    hints = options.hints(mean, std, output, layout, dtype, container)
    if edge is not None:
        if data is None or (method != "gym" and method != "codefend"):
            raise InputError(f"expected --method gym or codefend with --edge, got {method}: repair here, without --edge")
        if scan is not None:
            raise InputError("expected --scan without --edge, to which no scan is sent, got both: drop one")
        repair_on_edge(
            EdgeChoice(edge, edge_token_file, edge_job, insecure_edge),
            model,
            data,
            out,
            RepairOptions(
                method=method,
                recipe=recipe,
                views=views,
                epochs=epochs,
                gan_epochs=gan_epochs,
                max_accuracy_drop=max_accuracy_drop,
                allow_missing_classes=allow_missing_classes,
                seed=seed,
                mean=hints.mean,
                std=hints.std,
                output=hints.output,
                layout=hints.layout,
                dtype=hints.dtype,
                container=hints.container,
            ),
            given=given,
            weights=weights,
            quarantine=quarantine,
            shape=shape,
            skip_unreadable=skip_unreadable,
            as_json=as_json,
        )
        return
    with needs("repair"):
        from calibration.engine import Engine
        from calibration.fine_tuning import trainable
        from calibration.inspection.triggers_file import read_infected
        from calibration.repair.cyclegan import Training
        from calibration.repair.epochs import ERASING
        from calibration.repair.record import KIND
        from calibration.repair.settings import RepairSettings
        from calibration.repair.work import repair_into
        from calibration.sources import open_model

    keep_freed_memory()
    settings = RepairSettings(
        method=method if method != "auto" else "dhbe" if data is None else "gym",
        max_accuracy_drop=max_accuracy_drop,
        recipe=recipe,
        views=views,
        epochs=epochs,
        gan=Training(epochs=gan_epochs),
        rounds=rounds,
        allow_missing_classes=allow_missing_classes,
        seed=seed,
    )
    KIND.check_target(out, model, weights)
    if method == "auto" and data is None:
        typer.echo(
            "no clean images: chose dhbe; how long it takes will be said after its first epoch",
            err=True,
        )
    with tempfile.TemporaryDirectory(prefix="guard-") as scratch:
        source = open_model(model, weights, Path(scratch))
        trainable(source.backend)
        with Engine(devices) as engine, _only_the_first_speaks(engine.leads), progress_bars() as progress:
            found = read_inputs(source, data, quarantine, options.shape(shape), hints, skip_unreadable, progress)
            predictor, clean = found.predictor, found.clean
            settle_threads(predictor)
            triggers = None if scan is None else read_infected(scan, predictor.backend, pairs=True, spec=predictor.spec)
            shown = telling_time(progress, ERASING, "a GPU is faster; fewer --epochs are done sooner and erase less")
            try:
                record = repair_into(
                    out,
                    source,
                    predictor,
                    clean,
                    settings,
                    found.rejected,
                    engine,
                    shown,
                    triggers=triggers,
                    automatic=method == "auto",
                )
            except KeyboardInterrupt:
                typer.echo("interrupted: the same command goes on after the last whole epoch", err=True)
                raise
        if record is None:
            return
    tell_skipped(found.skipped)
    if as_json:
        typer.echo(msgspec.json.encode({**msgspec.to_builtins(record), "out": str(out)}).decode())
    else:
        show_repaired(record, f"Repaired model {out}", ("report", str(out / "report.html")))
        show_next(record, calibrate_with_tripwire(out, model, weights, data, skip_unreadable))
    raise typer.Exit(exit_code(record))


@contextlib.contextmanager
def _only_the_first_speaks(leads: bool) -> Iterator[None]:
    """The processes of further devices show nothing, not even why they end: the first one says it."""
    if not leads:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    yield
