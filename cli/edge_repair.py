"""`guard repair ... --edge URL`: send the work to an edge server, wait for it, and verify what comes back."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, final

import msgspec
import typer

from cli import options as common
from cli.display import progress_bars
from cli.edge_sending import check_options, check_same, declared, named, write_images, write_model
from cli.edge_token import VARIABLE, read_token
from cli.extras import needs
from cli.inputs import tell_skipped
from cli.repaired import calibrate_with_tripwire, exit_code, show_next, show_repaired
from guard import Guard, load_profile
from guard.errors import EdgeError, InputError
from guard.loading import load_profile_backend
from guard.readings import reading_of
from guard.records import DetectorRecord
from handlers.edge_protocol import CLEAN, QUARANTINE, FileInfo, JobRequest, JobStatus, Manifest, RepairOptions, check_job_id

if TYPE_CHECKING:
    from calibration.data import Progress
    from calibration.repair.record import RepairRecord
    from calibration.sources import ModelSource
    from handlers.edge_client import EdgeClient

_EDGE = "On an edge server"

EdgeOption = Annotated[
    str | None,
    typer.Option(
        metavar="URL", help="Let this guard edge serve repair, by gym or codefend, and make a profile.", rich_help_panel=_EDGE
    ),
]
EdgeTokenOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Holds its token.", show_default=f"the environment's {VARIABLE}", rich_help_panel=_EDGE),
]
EdgeJobOption = Annotated[
    str | None,
    typer.Option(metavar="ID", help="Send nothing: wait for this job, sent before, and fetch it.", rich_help_panel=_EDGE),
]
InsecureEdgeOption = Annotated[
    bool, typer.Option("--insecure-edge", help="Allow plain http to another machine.", rich_help_panel=_EDGE)
]


@final
@dataclass(frozen=True)
class EdgeChoice:
    """Which edge server, and what of it.

    Attributes:
        url: Its own.
        token_file: Holds its token; None for the environment's.
        job: Sent before; None for a new one.
        insecure: Allow plain HTTP to another machine.
    """

    url: str
    token_file: Path | None = None
    job: str | None = None
    insecure: bool = False


@final
@dataclass(frozen=True)
class _Images:
    """Where images are, and how they are read."""

    clean: Path
    quarantine: Path | None
    shape: tuple[int, int, int] | None
    skip_unreadable: bool


def repair_on_edge(
    edge: EdgeChoice,
    model: str,
    data: Path,
    out: Path,
    asked: RepairOptions,
    *,
    given: Collection[str] = (),
    weights: Path | None = None,
    quarantine: Path | None = None,
    shape: str | None = None,
    skip_unreadable: bool = False,
    as_json: bool = False,
) -> None:
    """Have an edge server repair a model, and write what it made once that was verified.

    Ctrl-C while files are sent cancels the job. Later the job goes on without us, and is fetched by its id.

    Args:
        edge: The server.
        model: As MODEL.
        data: As CLEAN.
        out: Folder to write; a repaired model that is there is replaced.
        asked: How to repair.
        given: Options of the command line, like `--seed`; a job that was sent before must agree with their values.
        weights: For a factory's module.
        quarantine: What the guard rejected.
        shape: As text; to bring images of a folder to.
        skip_unreadable: Leave out files that are no images.
        as_json: Print JSON instead of a table.

    Raises:
        EdgeError: The server refuses, fails or stays away, or what it sent can't be trusted.
        GuardError: The model, the images, the options or the target can't be used.
    """
    check_options(asked)
    _check_images(data, quarantine)
    sent_before = None if edge.job is None else check_job_id(edge.job)
    with needs("device"):
        from calibration.fine_tuning import trainable
        from calibration.repair.record import KIND
        from calibration.sources import open_model
        from handlers.edge_client import EdgeClient

    token = read_token(edge.token_file)
    if token is None:
        raise EdgeError(f"expected the edge's token, got none: pass --edge-token-file FILE, or set {VARIABLE}")
    KIND.check_target(out, model, weights)
    images = _Images(data, quarantine, common.shape(shape), skip_unreadable)
    values = {**named(asked), "--quarantine": quarantine, "--shape": images.shape}
    expected = {} if sent_before is None else {name: value for name, value in values.items() if name in given}
    with (
        tempfile.TemporaryDirectory(prefix="guard-") as scratch,
        EdgeClient(edge.url, token, insecure=edge.insecure) as client,
        progress_bars() as progress,
    ):
        source = open_model(model, weights, Path(scratch))
        source.check_not_repaired()
        trainable(source.backend)
        (Path(scratch) / "sent").mkdir()
        file = write_model(source, Path(scratch) / "sent")
        job = sent_before or _submit(client, file, source, images, asked, progress)
        with _fetched_later(client, job):
            status = client.wait(job, progress)
            record, manifest = _fetch(client, status, source, file, out, expected, progress)
        with contextlib.suppress(EdgeError):  # it expires by itself
            client.delete(job)
    _show(record, manifest, out, calibrate_with_tripwire(out, model, weights, data, skip_unreadable), as_json)


def _submit(
    client: EdgeClient, file: Path, source: ModelSource, images: _Images, asked: RepairOptions, progress: Progress
) -> str:
    """Send all that the job needs, and have it run; returns its id."""
    files = {file.name: file} | _write_sets(file.parent, source, images, progress)
    request = JobRequest(options=asked, files=tuple(declared(path) for path in files.values()), factory=source.record.factory)
    job = client.create(request)
    try:
        client.upload(job, files, progress)
        client.start(job)
    except BaseException:
        with contextlib.suppress(EdgeError):  # it expires by itself
            client.delete(job)
        raise
    typer.echo(f"job {job} at {client.url}", err=True)
    return job


def _check_images(*places: Path | None) -> None:
    """Refuse, before any work, images that are not there."""
    for place in places:
        if place is not None and not place.exists():
            raise InputError(f"expected a folder of images or an .npz, got {place}, which does not exist: check the path")


def _write_sets(folder: Path, source: ModelSource, images: _Images, progress: Progress) -> dict[str, Path]:
    """The clean set and the quarantine as `.npz`, by name."""
    from calibration.data import load_images
    from calibration.repair.cases import check_enough, load_quarantined

    size = images.shape or (source.image_shape if images.clean.is_dir() else None)
    clean = load_images(images.clean, size, skip_unreadable=images.skip_unreadable, progress=progress)
    tell_skipped(clean.skipped)
    found = None
    if images.quarantine is not None:
        found = load_quarantined(images.quarantine, clean.shape, skip_unreadable=images.skip_unreadable, progress=progress)
        tell_skipped(found.skipped)
    check_enough(clean, found)
    written = {CLEAN: folder / CLEAN}
    write_images(clean, written[CLEAN])
    if found is not None:
        written[QUARANTINE] = folder / QUARANTINE
        write_images(found, written[QUARANTINE])
    return written


@contextlib.contextmanager
def _fetched_later(client: EdgeClient, job: str) -> Iterator[None]:
    """Around the time in which the edge has the job: whatever ends us, the user is told how to go on."""
    later = f"job {job} stays at {client.url}: fetch it with the same command and --edge-job {job}"
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(later, err=True)
        raise
    except EdgeError as error:
        if error.code in ("job-failed", "unknown-job", "unauthorized"):
            raise
        raise EdgeError(f"{error}; {later}", error.status, error.code) from error


def _fetch(
    client: EdgeClient,
    status: JobStatus,
    source: ModelSource,
    file: Path,
    out: Path,
    expected: Mapping[str, object],
    progress: Progress,
) -> tuple[RepairRecord, Manifest]:
    """Write the folder, all of it or nothing, once every file of it was verified and the models in it load."""
    from calibration.repair.record import KIND

    sent = declared(file)
    manifest = client.manifest(status, (sent,))
    with KIND.writing(out) as draft:
        client.fetch(manifest, draft, progress)
        record = _check(draft, source, sent)
        check_same(record, expected, f"job {status.id} at {client.url}")
    return record, manifest


def _check(draft: Path, source: ModelSource, sent: FileInfo) -> RepairRecord:
    """Load what was fetched; the record then names the model as it is here."""
    from calibration.repair.record import JSON, PROFILE, read_record

    record = read_record(draft)
    module = source.record.factory is not None
    if record.original_sha256 != (source.backend.fingerprint() if module else sent.sha256):
        raise EdgeError("refused the edge server's result: it is a repair of another model")
    profile = load_profile(draft / PROFILE)[0] if (draft / PROFILE).exists() else None
    models = [
        record.model,
        *([profile.model] if profile else []),
        *([profile.tripwire.model] if profile and profile.tripwire else []),
    ]
    if any(item.factory != source.record.factory for item in models):  # loading one runs its code
        raise EdgeError("refused the edge server's result: it names another factory than ours")
    load_profile_backend(draft, record.model)
    if profile is not None:
        watched = None if profile.tripwire is None else profile.tripwire.model.sha256
        if (watched, profile.model.sha256) != (record.original_sha256, record.model.sha256):
            raise EdgeError("refused the edge server's result: its profile is not of our model and the repaired one")
        Guard.load(draft / PROFILE)
    original = source.backend.fingerprint()
    if original != record.original_sha256:  # a .pt2 was sent without its sample inputs
        record = msgspec.structs.replace(record, original_sha256=original)
        (draft / JSON).write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")
    return record


def _show(record: RepairRecord, manifest: Manifest, out: Path, otherwise: str, as_json: bool) -> None:
    from calibration.repair.record import PROFILE
    from handlers.edge_client import printable

    profile = out / PROFILE if (out / PROFILE).is_dir() else None
    note = None if manifest.note is None else printable(manifest.note)
    if as_json:
        figures = msgspec.to_builtins(record)
        body = {**figures, "out": str(out), "profile": None if profile is None else str(profile), "note": note}
        typer.echo(msgspec.json.encode(body).decode())
        raise typer.Exit(exit_code(record))
    show_repaired(record, f"Repaired model {out}", *_profile_rows(profile), ("report", str(out / "report.html")))
    if profile is None:
        typer.echo(f"no profile: {note or 'the edge server made none'}", err=True)
        show_next(record, otherwise)
    else:
        typer.echo("in its profile the original goes on detecting, and the repaired model answers", err=True)
        show_next(record, f"guard check {profile} IMAGE, guard serve {profile}")
    raise typer.Exit(exit_code(record))


def _profile_rows(folder: Path | None) -> list[tuple[str, str]]:
    """What a profile that came along was calibrated to."""
    if folder is None:
        return []
    profile, _ = load_profile(folder)
    accuracy = "unknown" if profile.clean_accuracy is None else f"{profile.clean_accuracy:.2%}"
    return [("profile", str(folder)), ("its clean accuracy", accuracy), *map(_threshold_row, profile.detectors)]


def _threshold_row(record: DetectorRecord) -> tuple[str, str]:
    reading, limit = reading_of(record.title), record.threshold
    return (f"its {reading.quantity} threshold", f"{reading.text(limit.value)}, for {limit.frr:.2%} false rejections")
