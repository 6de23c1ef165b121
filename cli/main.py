"""`guard`: the command, its subcommands in the order of a tour, and how it fails."""

from __future__ import annotations

import os
import signal
import sys
import traceback

import typer

from cli import calibrate, check, demo, edge, evaluate, export, quarantine, red_team, repair, roll_out, scan, serve
from guard import GuardError, __version__
from guard.files import printable
from handlers.stopping import stopped_by_sigterm

_UNREAD = 128 + signal.SIGPIPE  # what a shell says of a program that wrote to a closed pipe

app = typer.Typer(
    name="guard",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help=(
        "Put a vision model that somebody else trained into production safely.\n\n"
        "A model may hold a backdoor: it behaves well until an input carries the attacker's trigger. This command sets up and "
        "runs a guard that refuses such inputs.\n\n"
        "A tour: [bold]guard demo[/] shows it all on real digits. [bold]guard calibrate[/] MODEL --data CLEAN --out PROFILE "
        "sets the threshold from clean images alone, [bold]guard scan[/] MODEL --data CLEAN says whether the model is "
        "backdoored, and [bold]guard red-team[/] MODEL --data CLEAN plants known triggers in "
        "copies to find the best setting for it. [bold]guard check[/] PROFILE IMAGE judges images, [bold]guard evaluate[/] "
        "measures the guard, [bold]guard serve[/] PROFILE answers over HTTP, [bold]guard export[/] PROFILE makes a TorchServe "
        "archive, and [bold]guard quarantine[/] shows what was rejected. [bold]guard repair[/] MODEL --method auto --data "
        "CLEAN scans, repairs a copy and verifies it, with --quarantine DIR also by what was rejected, and "
        "[bold]guard roll-out[/] puts the repaired model into TorchServe.\n\n"
        "MODEL is a .onnx, .pt2 or TorchScript .pt file, package.module:factory with --weights, or a folder that guard "
        "repair wrote. CLEAN is a folder with one "
        "sub-folder of images per class, or an .npz with x and y."
    ),
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"guard {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", help="Show the version and leave.", callback=_version, is_eager=True),
) -> None:
    """Everything happens in the subcommands."""


app.command("demo", rich_help_panel="Start here")(demo.demo)
app.command("calibrate", rich_help_panel="Before serving")(calibrate.calibrate_command)
app.command("red-team", rich_help_panel="Before serving")(red_team.red_team_command)
app.command("scan", rich_help_panel="Before serving")(scan.scan_command)
app.command("repair", rich_help_panel="Before serving")(repair.repair_command)
app.command("check", rich_help_panel="Before serving")(check.check)
app.command("evaluate", rich_help_panel="Before serving")(evaluate.evaluate_command)
app.command("export", rich_help_panel="Serving")(export.export)
app.command("serve", rich_help_panel="Serving")(serve.serve)
app.command("roll-out", rich_help_panel="Serving")(roll_out.roll_out_command)
app.add_typer(edge.app, name="edge", rich_help_panel="Serving")
app.add_typer(quarantine.app, name="quarantine", rich_help_panel="Serving")


def main() -> None:
    """Run the command; a problem is one line on stderr and exit code 2."""
    with stopped_by_sigterm():
        try:
            _main()
        except SystemExit as end:
            _leave_at_once_if_one_of_several(end.code)
            raise


def _leave_at_once_if_one_of_several(code: str | int | None) -> None:
    """Processes that train together (`--devices`) end here: an interpreter's own end is at times aborted by network threads."""
    if int(os.environ.get("WORLD_SIZE") or 1) > 1 and "lightning_fabric" in sys.modules:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def _main() -> None:
    try:
        code = app(standalone_mode=False)
    except GuardError as error:
        _fail(str(error))
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)  # of usage errors: which subcommand
        if not error.format_message():  # `guard` alone: the help has been shown
            sys.exit(2)
        message = error.format_message().replace("Value error, ", "")
        _fail(f"{message} (see: {context.command_path if context else 'guard'} --help)")
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except OSError as error:
        _fail(f"{error.filename or 'output'}: {error.strerror or error}")
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # click's: nobody reads on, as in `| head`; 1 would be a verdict
            sys.exit(_UNREAD)
        _fail("expected a model that leaves the process alone, got one that tries to end it: don't use it")
    except Exception as error:  # a mistake of ours; 1 would be a verdict of some commands
        traceback.print_exception(error)
        raise SystemExit(2) from error
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> None:
    typer.echo(f"guard: {printable(' '.join(message.split()))}", err=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
