"""`guard edge`: repairs for thin devices, which send their model, clean set and quarantine and get a repaired model back."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.edge_token import made_token, read_token
from cli.extras import needs
from cli.repair_inputs import looks_at
from guard.errors import CalibrationError, EdgeError, InputError, MissingExtraError

if TYPE_CHECKING:
    from handlers.edge_commands import Step
    from handlers.edge_jobs import Job, JobStore

app = typer.Typer(no_args_is_help=True, help="Repairs for thin devices.")

_GIB = 1024**3
_OVERLAYS = (100, 50, 25, 10)
_GUARD = [sys.executable, "-P", "-m", "cli.main"]  # -P: no file in the current folder passes for our code


@app.callback()
def _root() -> None:
    """Keeps `serve` a subcommand while it is the only one."""


@app.command("serve")
def serve(
    folder: Annotated[Path, typer.Option(metavar="DIR", help="Where jobs, their queue and the token are kept.")] = Path("edge"),
    host: Annotated[str, typer.Option(help="Address to bind; others only behind TLS.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for a free one.")] = 8090,
    token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Holds the token that devices must send.",
            show_default="GUARD_EDGE_TOKEN, or one made and kept in DIR/token",
        ),
    ] = None,
    max_bytes: Annotated[int, typer.Option(min=1, help="Of one file that a device sends, also unpacked.")] = _GIB,
    max_job_bytes: Annotated[
        int | None, typer.Option(min=1, help="Of all files of a job.", show_default="twice --max-bytes")
    ] = None,
    max_jobs: Annotated[int, typer.Option(min=1, help="Jobs kept; the oldest that have ended make room.")] = 16,
    max_job_minutes: Annotated[
        int, typer.Option(min=1, help="For which a job may run; then it has failed, and its processes are ended.")
    ] = 24 * 60,
    allow_factory: Annotated[
        list[str] | None,
        typer.Option(metavar="package.module:factory", help="Run this one's code for devices that name it; repeatable."),
    ] = None,
) -> None:
    """Repair models for devices that can't: guard repair ... --edge URL sends them here, by --method gym or codefend.

    One job runs at a time, as guard repair and then guard calibrate, in processes
    of their own, for --max-job-minutes at most. Jobs survive a restart: one that was
    under way goes on from its last epoch.

    Example: guard edge serve --folder /var/lib/guard-edge, then, on the device,
    guard repair model.pt2 --method codefend --data clean/ --quarantine rejected --out repaired
    --edge http://127.0.0.1:8090 --edge-token-file token
    """
    with needs("edge"):
        from handlers.asgi_server import serve_asgi
        from handlers.edge import MAX_CONNECTIONS, create_edge_app
        from handlers.edge_jobs import JobStore
        from handlers.edge_limits import EdgeLimits
        from handlers.edge_worker import EdgeWorker
        from handlers.request_log import configure_logging

    if importlib.util.find_spec("lightning_fabric") is None:  # the commands need it: better known before the first job
        raise MissingExtraError("lightning-fabric", "edge")
    limits = EdgeLimits(
        max_bytes=max_bytes,
        max_job_bytes=max_job_bytes or 2 * max_bytes,
        max_jobs=max_jobs,
        job_seconds=60.0 * max_job_minutes,
    )
    factories = tuple(allow_factory or ())
    for name in factories:
        if ":" not in name:
            raise InputError(f"expected --allow-factory package.module:factory, got {name}")
    token = read_token(token_file)
    if token is None:
        token, path = made_token(folder)
        typer.echo(f"devices need the token in {path}: guard repair ... --edge-token-file token", err=True)
    configure_logging()
    store = JobStore(folder, limits)
    with EdgeWorker(store, folder, edge_steps, token) as worker:
        serve_asgi(create_edge_app(store, worker, token, factories), host, port, max_connections=MAX_CONNECTIONS)


def edge_steps(job: Job, store: JobStore) -> Iterator[Step]:
    """The commands of a job: repair, unless that is done, and then a profile for what came of it.

    Args:
        job: What the device asked for; its values were checked, and none is a path.
        store: Where its files are.
    """
    from calibration.repair.record import PROFILE, is_repaired, read_record
    from handlers.edge_commands import Step
    from handlers.edge_protocol import CLEAN, QUARANTINE

    sent, result, request = store.sent(job.id), store.result(job.id), job.request
    file = sent / request.model.name
    model, weights = (str(file), None) if request.factory is None else (request.factory, str(file))
    clean = str(sent / CLEAN)
    if not is_repaired(result):
        command = [*_GUARD, "repair", model, "--data", clean, "--out", str(result), *_told(job)]
        command += [] if weights is None else ["--weights", weights]
        command += [] if request.file(QUARANTINE) is None else ["--quarantine", str(sent / QUARANTINE)]
        yield Step("repair", command, succeeds=frozenset({0, 1}))  # 1: it was written, and says itself what is wrong with it
        if not is_repaired(result):  # 1 is Python's own code, too: a crash, or a disk so full that stderr can't be written
            raise EdgeError("repair failed unexpectedly: see the edge server's log")
    record = read_record(result)
    command = [*_GUARD, "calibrate", str(result), "--data", clean, "--out", str(result / PROFILE), "--allow-missing-classes"]
    command += ["--tripwire", model, *([] if weights is None else ["--tripwire-weights", weights])]
    command += ["--overlays", str(_overlays(record.clean_images)), "--seed", str(request.options.seed)]
    yield Step("calibrate", command, required=False)


def _told(job: Job) -> list[str]:
    """The options of `guard repair` that the device gave."""
    options = job.request.options
    numbers = {name: ",".join(map(str, values)) for name, values in (("mean", options.mean), ("std", options.std))}
    given: dict[str, object] = {
        "method": options.method,
        "recipe": options.recipe,
        "views": options.views,
        "epochs": options.epochs,
        "gan-epochs": options.gan_epochs,
        "max-accuracy-drop": options.max_accuracy_drop,
        "seed": options.seed,
        **numbers,
        "output": options.output,
        "layout": options.layout,
        "dtype": options.dtype,
        "container": options.container,
    }
    wanted = {f"--{name}": value for name, value in given.items() if value not in (None, "")}
    told = [f"{option}={value}" for option, value in wanted.items() if looks_at(options.method, option)]
    return told + ["--allow-missing-classes"] * options.allow_missing_classes


def _overlays(images: int) -> int:
    """As many as the paper's 100, or fewer where the clean images would not do: the threshold needs its own."""
    from calibration.settings import Settings, check_settings

    for overlays in _OVERLAYS:
        try:
            check_settings(Settings(overlays=overlays), images)
        except CalibrationError:
            continue
        return overlays
    return _OVERLAYS[-1]
