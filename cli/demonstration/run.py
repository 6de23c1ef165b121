"""The demo's steps: the main path on real digits, with a real server."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import torch
import typer

from calibration import ImageSet, Settings, calibrate
from calibration.evaluation import Judged, judge, summarise
from calibration.histograms import histograms, judged_scores
from calibration.report import calibration_report, evaluation_report
from calibration.sources import open_model
from cli.demonstration.client import Replies, send
from cli.demonstration.digits import ATTACK, Digits, load_digits, save_exported, train_backdoored
from cli.demonstration.repairing import Repair, repair_digits
from cli.display import progress_bars, show_rows
from cli.extras import needs
from guard import Guard, GuardError, Policy, Quarantine
from guard.errors import InputError, ServingError
from guard.folders import FolderKind
from guard.profile import load_profile, save_profile

_GUARDED, _BARE = "digits", "digits-unguarded"
_MARKER = "guard-demo.txt"
_OURS = re.compile(  # and what an interruption leaves
    r"(clean|triggered)\.npz|images|model\.pt2|profile|rejected|repaired(-profile)?|report\.html|entropy\.png|result\.json|\..+"
)


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What `result.json` holds: shares of the requests of a kind, medians, latencies of single requests in seconds."""

    engine: str
    clean_requests: int
    triggered_requests: int
    clean_accuracy_unguarded: float
    clean_accuracy_guarded: float
    clean_rejected: float
    triggered_rejected: float
    attack_success_unguarded: float
    attack_success_guarded: float
    median_passes_clean: float
    median_passes_triggered: float
    latency_unguarded: float
    latency_guarded_clean: float
    latency_guarded_triggered: float
    report: str
    picture: str
    repair: Repair | None


def run(out: Path, model_store: Path, engine: Literal["auto", "torchserve", "asgi"], seed: int) -> Result:
    """Train, calibrate, export, serve, ask, repair, show; whatever was started is stopped in the end.

    Args:
        out: Folder for everything but the archive: new, empty, or of an earlier demo, which is replaced.
        model_store: Folder for the archive.
        engine: `auto` takes TorchServe, or ASGI where Java is missing.
        seed: Of split, training and calibration.

    Raises:
        InputError: The folder holds something else, or can't be written.
    """
    kind = FolderKind("demo", _MARKER, lambda name: _OURS.fullmatch(name) is not None or out / name == model_store, InputError)
    kind.check_target(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARKER).write_text("Written by guard demo, which replaces all of it when it runs again.\n")
    torch.set_num_threads(1)  # so small a net only waits for a second core
    digits = load_digits(seed)
    with progress_bars() as progress:
        profile = _prepare(digits, out, seed, progress)
        report, picture = _evaluate(digits, profile, out, progress)
    _write_samples(digits, out)
    rejected = out / "rejected"
    shutil.rmtree(rejected, ignore_errors=True)
    with _server(profile, model_store, engine, rejected) as (url, used):
        typer.echo(f"serving by {used} at {url}", err=True)
        with progress_bars() as progress:
            replies = [
                send(f"{url}/predictions/{name}", images, f"{kind}, {'guarded' if name == _GUARDED else 'no guard'}", progress)
                for name in (_BARE, _GUARDED)
                for kind, images in (("clean", digits.test), ("triggered", digits.triggered))
            ]
    repaired = _repair(digits, out, rejected, seed)
    result = _result(used, digits, replies, Guard.load(profile), report, picture, repaired)
    (out / "result.json").write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n")
    _show(result, out, profile)
    return result


def _prepare(digits: Digits, out: Path, seed: int, progress: Callable[[str, int, int], None]) -> Path:
    """Train the victim and calibrate it from its file, as a user would; returns the profile's folder."""
    net = train_backdoored(digits.train, seed, progress)
    file, profile = out / "model.pt2", out / "profile"
    save_exported(net, digits.train.images(slice(0, 2)), file)
    with tempfile.TemporaryDirectory(prefix="guard-") as scratch:
        source = open_model(str(file), None, Path(scratch))
        calibration = calibrate(source.backend, digits.clean, Settings(seed=seed), record=source.record, progress=progress)
        calibration.save(profile, source.file, {"report.html": calibration_report(calibration)})
    return profile


def _repair(digits: Digits, out: Path, rejected: Path, seed: int) -> Repair | None:
    """Repair from what the server rejected, where what that needs is installed."""
    with progress_bars() as progress:
        try:
            return repair_digits(digits, out, rejected, seed, progress)
        except GuardError as error:  # the first half is worth showing all the same
            typer.echo(f"no repair: {error}", err=True)
            return None


def _evaluate(digits: Digits, profile: Path, out: Path, progress: Callable[[str, int, int], None]) -> tuple[Path, Path]:
    """Score the test images in full; returns the report and the picture of the two distributions."""
    guard = Guard.load(profile)
    clean: Judged = judge(guard, digits.test, "all passes, clean", progress)
    triggered: Judged = judge(guard, digits.triggered, "all passes, triggered", progress)
    evaluation = summarise(clean, digits.test.labels, triggered, digits.triggered.labels, ATTACK.target_label)
    report, picture = out / "report.html", out / "entropy.png"
    report.write_bytes(evaluation_report(evaluation, guard, clean, triggered))
    picture.write_bytes(histograms(judged_scores(guard, clean, triggered)))
    return report, picture


def _write_samples(digits: Digits, out: Path) -> None:
    """A few images to try by hand, and both sets as `.npz` for `guard evaluate`."""
    from PIL import Image

    folder = out / "images"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for kind, images in (("clean", digits.test), ("triggered", digits.triggered)):
        np.savez_compressed(out / f"{kind}.npz", x=images.pixels[:, 0].numpy(), y=images.known_labels.numpy())
        for row in range(5):
            Image.fromarray(images.pixels[row, 0].numpy()).save(folder / f"{kind}-{row}.png")


@contextlib.contextmanager
def _server(profile: Path, model_store: Path, engine: str, rejected: Path) -> Iterator[tuple[str, str]]:
    """A server of the guarded and of the bare model, which answers through the same code without a detector."""
    with tempfile.TemporaryDirectory(prefix="guard-") as scratch:
        settings, arrays = load_profile(profile)
        bare = Path(scratch) / "bare"
        model = profile / (settings.model.file or "")
        unguarded = msgspec.structs.replace(settings, detectors=(), policy=Policy(mode="monitor"))
        save_profile(unguarded, arrays, bare, model)
        if engine != "asgi":
            try:
                with _torchserve(profile, bare, model_store, Path(scratch), rejected) as url:
                    yield url, "torchserve"
                return
            except ServingError as error:
                if engine == "torchserve" or shutil.which("java") is not None:
                    raise
                typer.echo(f"{error}; going on with ASGI", err=True)
        with _asgi(profile, bare, rejected) as url:
            yield url, "asgi"


@contextlib.contextmanager
def _torchserve(profile: Path, bare: Path, model_store: Path, scratch: Path, rejected: Path) -> Iterator[str]:
    with needs("torchserve"):
        from export import export_mar
        from handlers.torchserve_server import TorchServeProcess

    archive = export_mar(profile, model_store, _GUARDED)
    typer.echo(f"archive: {archive}", err=True)
    store = scratch / "store"
    export_mar(bare, store, _BARE)
    export_mar(profile, store, _GUARDED, model_config={"guard": {"quarantine": str(rejected.absolute())}})
    with TorchServeProcess(store, {name: f"{name}.mar" for name in (_GUARDED, _BARE)}) as server:
        yield server.url


@contextlib.contextmanager
def _asgi(profile: Path, bare: Path, rejected: Path) -> Iterator[str]:
    with needs("asgi"):
        from handlers.asgi import create_app
        from handlers.asgi_server import AsgiServer
        from handlers.service import ImageService

    guarded = Guard.load(profile, quarantine=Quarantine(rejected))
    services = {name: ImageService(guard, name) for name, guard in ((_GUARDED, guarded), (_BARE, Guard.load(bare)))}
    with AsgiServer(create_app(services)) as server:
        yield server.url


def _result(
    engine: str, digits: Digits, replies: list[Replies], guard: Guard, report: Path, picture: Path, repaired: Repair | None
) -> Result:
    bare_clean, bare_triggered, safe_clean, safe_triggered = replies
    truth = digits.test.known_labels
    target = torch.full((len(digits.triggered),), ATTACK.target_label)
    return Result(
        engine=engine,
        clean_requests=len(digits.test),
        triggered_requests=len(digits.triggered),
        clean_accuracy_unguarded=bare_clean.share_answered(truth),
        clean_accuracy_guarded=safe_clean.share_answered(truth),
        clean_rejected=safe_clean.share_rejected,
        triggered_rejected=safe_triggered.share_rejected,
        attack_success_unguarded=bare_triggered.share_answered(target),
        attack_success_guarded=safe_triggered.share_answered(target),
        median_passes_clean=_median_passes(guard, digits.test),
        median_passes_triggered=_median_passes(guard, digits.triggered),
        latency_unguarded=bare_clean.latency,
        latency_guarded_clean=safe_clean.latency,
        latency_guarded_triggered=safe_triggered.latency,
        report=str(report),
        picture=str(picture),
        repair=repaired,
    )


def _median_passes(guard: Guard, images: ImageSet) -> float:
    """One image at a time, as a lone request is judged."""
    rows = torch.arange(min(200, len(images)))
    return float(np.median([guard(images.images(row.unsqueeze(0)))[0].passes for row in rows]))


def _show(result: Result, out: Path, profile: Path) -> None:
    rows = [
        ("clean images answered rightly", _percent(result.clean_accuracy_unguarded), _percent(result.clean_accuracy_guarded)),
        ("clean images rejected", "-", _percent(result.clean_rejected)),
        ("triggered images rejected", "-", _percent(result.triggered_rejected)),
        ("attack success", _percent(result.attack_success_unguarded), _percent(result.attack_success_guarded)),
        ("median passes, clean image", "-", f"{result.median_passes_clean:g}"),
        ("median passes, triggered image", "-", f"{result.median_passes_triggered:g}"),
        ("median latency, clean image", _milliseconds(result.latency_unguarded), _milliseconds(result.latency_guarded_clean)),
        ("median latency, triggered image", "-", _milliseconds(result.latency_guarded_triggered)),
    ]
    title = f"{result.clean_requests} clean and {result.triggered_requests} triggered images over HTTP ({result.engine})"
    show_rows(title, rows, ("", "without guard", "with guard"))
    typer.echo(f"report: {result.report}\npicture of the two entropy distributions: {result.picture}\n")
    if result.repair is not None:
        _show_repair(result.repair)
    typer.echo(f"try: {_guard()} check {profile} {out / 'images'}")


def _guard() -> str:
    """The command as a shell finds it: by its name, or by its path where its environment is not active."""
    beside = Path(sys.executable).parent / "guard"
    if shutil.which("guard") is not None or not beside.is_file():
        return "guard"
    return os.path.relpath(beside) if beside.is_relative_to(Path.cwd()) else str(beside)


def _show_repair(repair: Repair) -> None:
    """The figures of the second half."""
    rows = [
        (
            "held-out clean images answered rightly",
            _percent(repair.clean_accuracy_before),
            _percent(repair.clean_accuracy_after),
        ),
        ("held-out rejected images that keep their old answer", _percent(1.0), _percent(repair.old_answer_kept)),
    ]
    title = f"Repaired in {repair.seconds:.0f} s, from {repair.quarantined} rejected images"
    show_rows(title, rows, ("", "before", "after"))
    typer.echo(f"what was learnt of the trigger: {repair.report}")
    typer.echo(f"a profile in which the original detects and the repaired model answers: {repair.profile}\n")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"
