"""`guard scan`."""

from __future__ import annotations

import shlex
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
import typer

from cli import options
from cli.display import progress_bars, show_rows
from cli.extras import needs
from cli.inputs import tell_skipped
from cli.memory import keep_freed_memory
from cli.threads import settle_threads
from guard.errors import InputError
from guard.files import as_text

if TYPE_CHECKING:
    from calibration import Hints
    from calibration.data import ImageSet
    from calibration.inspection.record import ScanRecord
    from calibration.sources import ModelSource
    from guard import Predictor

_HOW = "How it is inspected"

ScanMethod = Literal["neural-cleanse", "deep-inspect"]


def scan_command(
    model: options.ModelArgument,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write; a scan that is there is replaced.")],
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="CLEAN",
            help="Clean images: a folder with a sub-folder per class, or an .npz. For neural-cleanse; deep-inspect needs none.",
        ),
    ] = None,
    method: Annotated[
        ScanMethod,
        typer.Option(
            help="neural-cleanse puts triggers on clean images; deep-inspect needs none, only --shape, and sees less.",
            rich_help_panel=_HOW,
        ),
    ] = "neural-cleanse",
    weights: options.WeightsOption = None,
    pairs: Annotated[
        bool,
        typer.Option(
            "--pairs",
            help="Of neural-cleanse: also look for triggers from each label to each other one, to find backdoors for some "
            "source labels alone.",
            rich_help_panel=_HOW,
        ),
    ] = False,
    silent_units: Annotated[
        bool,
        typer.Option(
            "--silent-units",
            help="Of neural-cleanse: also look for triggers behind units that are silent without them, as in inserted modules.",
            rich_help_panel=_HOW,
        ),
    ] = False,
    patches: Annotated[
        bool,
        typer.Option(
            "--patches",
            help="Of neural-cleanse: also look for the patch of a few pixels that works best, for triggers of which no smaller "
            "part works.",
            rich_help_panel=_HOW,
        ),
    ] = False,
    rounds: Annotated[
        int,
        typer.Option(
            min=1,
            help="Of neural-cleanse: for infected labels, unlearn in a copy what was found and look for further triggers.",
            rich_help_panel=_HOW,
        ),
    ] = 1,
    steps: Annotated[
        int | None,
        typer.Option(
            min=16,
            help="Of the search: for a label's trigger, at most (neural-cleanse), or of the generator (deep-inspect).",
            show_default="1008, and 400",
            rich_help_panel=_HOW,
        ),
    ] = None,
    plain: Annotated[
        bool,
        typer.Option(
            "--plain",
            help="Of neural-cleanse: all steps for every label, as published; 2 to 6 times the work.",
            rich_help_panel=_HOW,
        ),
    ] = False,
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
            help="Bring images of a folder to this. For deep-inspect: what the model takes.",
            rich_help_panel=options.MODEL_PANEL,
        ),
    ] = None,
    skip_unreadable: options.SkipOption = False,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Of the cut into parts and of all draws.")] = 0,
    as_json: options.JsonOption = False,
) -> int:
    """Find out whether the model is backdoored, for which labels, and with which triggers.

    A backdoor needs a far smaller trigger than other labels do. By default, the
    smallest one is looked for that sends clean images to each label (Neural
    Cleanse). Labels that stand out get a second opinion: does the trigger work
    on other images, and would a clean model of the same task, trained here on the
    clean images, need as small a trigger for that label? A few hundred images
    of all classes do; labels are optional.

    Without any image, --method deep-inspect recovers some from the model, and
    learns to make triggers for them. Give --shape if the model's file does not
    say it, and --mean and --std if the model does not normalise for itself.

    The exit code is 0 if the model seems clean, 1 if it is infected, and 2 if
    something went wrong. DIR then holds scan.json, the triggers and report.html.
    The model must be one that PyTorch can train: .pt2, TorchScript .pt or
    package.module:factory, not .onnx.

    Example: guard scan model.pt2 --data clean/ --out scanned

    Example: guard scan model.pt2 --method deep-inspect --out scanned

    Ctrl-C leaves DIR as it was; the same command goes on from there.
    """
    needless = {
        "--data": data is not None,
        "--pairs": pairs,
        "--silent-units": silent_units,
        "--patches": patches,
        "--rounds": rounds > 1,
        "--plain": plain,
        "--skip-unreadable": skip_unreadable,
    }
    _check_options(method, data, [name for name, given in needless.items() if given])
    keep_freed_memory()
    with needs("repair"):
        from calibration.data import load_images
        from calibration.discovery import discover
        from calibration.engine import Engine
        from calibration.fine_tuning import trainable
        from calibration.inspection.deep_inspect import DeepInspectSettings
        from calibration.inspection.deep_scan import DeepScanSettings
        from calibration.inspection.record import KIND
        from calibration.inspection.scan import ScanSettings
        from calibration.inspection.search import Search
        from calibration.inspection.work import deep_scan_into, scan_into
        from calibration.sources import open_model

    search = Search() if steps is None else Search(steps=steps)
    settings = ScanSettings(
        search=search.plain() if plain else search,
        pairs=pairs,
        silent_units=silent_units,
        patches=patches,
        rounds=rounds,
        seed=seed,
    )
    deep = DeepScanSettings(search=DeepInspectSettings() if steps is None else DeepInspectSettings(steps=steps), seed=seed)
    KIND.check_target(out)
    given = options.hints(mean, std, output, layout, dtype, container)
    clean: ImageSet | None = None
    with tempfile.TemporaryDirectory(prefix="guard-") as scratch, progress_bars() as progress:
        source = open_model(model, weights, Path(scratch))
        trainable(source.backend)
        size = options.shape(shape)
        if data is None:
            predictor = _without_images(source, size, given)
        else:
            size = size or (source.image_shape if data.is_dir() else None)
            clean = load_images(data, size, skip_unreadable=skip_unreadable, progress=progress)
            predictor = discover(source.backend, clean, source.hints(given))
        settle_threads(predictor)
        try:
            if clean is None:
                record = deep_scan_into(out, predictor, deep, Engine(), progress, as_text(model))
            else:
                record = scan_into(out, predictor, clean, settings, Engine(), progress, as_text(model))
        except KeyboardInterrupt:
            typer.echo("interrupted: the same command goes on from there", err=True)
            raise
    tell_skipped(() if clean is None else clean.skipped)
    if as_json:
        typer.echo(msgspec.json.encode({**msgspec.to_builtins(record), "out": str(out)}).decode())
    else:
        _show(record, out)
        same = {"--weights": weights, "--mean": mean, "--std": std, "--output": output, "--layout": layout}
        same |= {"--dtype": dtype, "--container": container, "--shape": shape if clean is not None or record.infected else None}
        known = [model, *options.again(same), *(["--skip-unreadable"] if skip_unreadable else [])]
        typer.echo(as_text(f"next: {shlex.join(_next_command(record, known, data, out))}"))
    return 1 if record.infected else 0


def _check_options(method: ScanMethod, data: Path | None, needless: list[str]) -> None:
    """Refuse to go without what Neural Cleanse needs, and to take what DeepInspect does not.

    Raises:
        InputError: See above.
    """
    if method == "neural-cleanse" and data is None:
        raise InputError(
            "expected --data CLEAN with --method neural-cleanse, which puts triggers on clean images, got none: add it, or "
            "scan with --method deep-inspect, which needs none"
        )
    if method == "deep-inspect" and needless:
        raise InputError(
            f"expected {' and '.join(needless)} with --method neural-cleanse alone, got {method}, which looks at no images: "
            f"drop {'it' if len(needless) == 1 else 'them'}, or the method"
        )


def _without_images(source: ModelSource, size: tuple[int, int, int] | None, given: Hints) -> Predictor:
    """The model, with what is known of its images.

    Raises:
        InputError: Their shape is not.
    """
    from calibration.discovery import discover_without_images

    size = size or source.image_shape
    if size is None:
        raise InputError(
            "expected --shape C,H,W with --method deep-inspect, for a model that does not say what images it takes, got none: "
            "add it, like --shape 3,32,32"
        )
    return discover_without_images(source.backend, size, source.hints(given))


def _next_command(record: ScanRecord, model: list[str], data: Path | None, out: Path) -> list[str]:
    """Repair what is infected, by what was found; of what seems clean, make a profile that guards it all the same."""
    from calibration.repair.dhbe_settings import is_of_a_size

    known = ["--scan", str(out)] if record.method == "neural-cleanse" else []
    command = ["repair", *model, "--method", "auto", *known] if record.infected else ["calibrate", *model]
    blindly = record.infected and data is None and is_of_a_size(record.input)
    if blindly:
        command = ["repair", *model, "--method", "dhbe"]
    folder = out.parent / f"{out.absolute().name}-{'repaired' if record.infected else 'profile'}"
    images = [] if blindly else ["--data", "CLEAN" if data is None else str(data)]
    return ["guard", *command, *images, "--out", str(folder)]


def _show(record: ScanRecord, out: Path) -> None:
    from calibration.inspection.figures import figure_rows, looks, patch_table, remarks, smallest_table, verdict

    show_rows(f"Scan {out}", [*figure_rows(record), ("report", str(out / "report.html"))])
    for where, findings in looks(record).items():
        header, rows = smallest_table(record, findings)
        typer.echo()
        show_rows(f"The smallest triggers {where}", rows, header)
    if record.patches:
        header, rows = patch_table(record.patches)
        typer.echo()
        show_rows("Patches", rows, header)
    typer.echo()
    typer.echo(verdict(record))
    for text in remarks(record):
        typer.echo(text, err=True)
