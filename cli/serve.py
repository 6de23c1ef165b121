"""`guard serve`."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from cli import options
from cli.export import export_to_scratch
from cli.extras import needs
from cli.threads import settle_threads
from guard import Guard, Limits, Policy, Quarantine, load_profile
from guard.errors import InputError
from guard.loading import check_memory_limit
from guard.predictors.predictor import DEFAULT_MEMORY_LIMIT

_MIB = 1024**2
_OF_TORCHSERVE = ("--workers", "--batch-size", "--batch-delay", "--updates")


def serve(
    context: typer.Context,
    profile: options.ProfileArgument,
    engine: Annotated[Literal["asgi", "torchserve"], typer.Option(help="torchserve needs Java.")] = "asgi",
    host: Annotated[str, typer.Option(help="Address to bind; TorchServe binds 127.0.0.1 only.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for a free one.")] = 8080,
    name: Annotated[str | None, typer.Option(help="Of the model, in the path.", show_default="the folder's name")] = None,
    mode: Annotated[
        Literal["enforce", "monitor"] | None, typer.Option(help="monitor never blocks.", show_default="the profile's")
    ] = None,
    on_error: Annotated[
        Literal["reject", "accept"] | None, typer.Option(help="When the guard fails.", show_default="the profile's")
    ] = None,
    latency_budget: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="That detectors may take; what is undecided then is treated like an error.",
            show_default="no bound",
        ),
    ] = None,
    memory_limit: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="MIB",
            help="That a forward pass may take beside the model, by an estimate: lower takes fewer images at once.",
        ),
    ] = DEFAULT_MEMORY_LIMIT // 1024**2,
    quarantine: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep copies of suspicious images there.")] = None,
    max_bytes: Annotated[int, typer.Option(min=1, help="Of one encoded image.")] = Limits().max_bytes,
    max_pixels: Annotated[int, typer.Option(min=1, help="Of one image, by its header.")] = Limits().max_pixels,
    expose_scores: Annotated[
        bool, typer.Option("--expose-scores", help="Put scores into answers; they help an attacker.")
    ] = False,
    public_metrics: Annotated[
        bool,
        typer.Option("--public-metrics", help="Answer /metrics to other machines, too; they tell scores."),
    ] = False,
    workers: Annotated[int, typer.Option(min=1, help="TorchServe's worker processes.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests that a TorchServe worker judges at once.")] = 8,
    batch_delay: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="MS",
            help="How long a request waits in TorchServe for others to be judged along; a lone one, too.",
            show_default="2",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; TorchServe chooses by itself.")] = "cpu",
    updates: Annotated[
        bool, typer.Option("--updates", help="Let TorchServe take new versions of the model, see guard roll-out.")
    ] = False,
) -> None:
    """Answer images over HTTP: POST the bytes of one to /predictions/NAME.

    200 with the label, 422 for a suspicious image, 400 or 413 for one that can't be judged, 503 when the guard fails.
    Metrics for Prometheus are at /metrics (TorchServe: on a port of their own), for this machine alone. One JSON line per
    request goes to stderr.

    Example: guard serve profile, then
    curl -H 'content-type: image/png' --data-binary @photo.png http://127.0.0.1:8080/predictions/profile
    """
    of_torchserve = [name for name in _OF_TORCHSERVE if name in options.given(context)]
    if engine == "asgi" and of_torchserve:
        named = " and ".join(of_torchserve)
        raise InputError(f"expected {named} with --engine torchserve, got it without: add that engine, or drop {named}")
    if engine == "torchserve" and public_metrics:
        raise InputError(
            "expected --public-metrics with --engine asgi, got torchserve, whose metrics stay on this machine: drop it"
        )
    model = name or profile.absolute().name
    limits = Limits(max_bytes=max_bytes, max_pixels=max_pixels)
    settings, _ = load_profile(profile)
    check_memory_limit(memory_limit * _MIB, settings.input)
    policy = Policy(
        mode=mode or settings.policy.mode,
        on_error=on_error or settings.policy.on_error,
        latency_budget=settings.policy.latency_budget if latency_budget is None else latency_budget,
    )
    if engine == "asgi":
        store = None if quarantine is None else Quarantine(quarantine)
        load = partial(Guard.load, profile, policy=policy, quarantine=store, device=device, memory_limit=memory_limit * _MIB)
        _serve_asgi(load, model, host, port, limits, expose_scores, public_metrics)
        return
    if host != "127.0.0.1":
        raise InputError(
            f"expected --host 127.0.0.1 with TorchServe, which gets no security fixes any more, got {host}: use a proxy"
        )
    told = {"mode": mode, "on_error": on_error, "latency_budget": latency_budget}  # else the profile's, a later version's own
    extra: dict[str, object] = {
        **{key: value for key, value in told.items() if value is not None},
        "memory_limit": memory_limit * _MIB,
        "max_bytes": limits.max_bytes,
        "max_pixels": limits.max_pixels,
        "expose_scores": expose_scores,
    }
    if quarantine is not None:
        extra["quarantine"] = str(quarantine.absolute())
    _serve_torchserve(profile, model, port, workers, batch_size, batch_delay, max_bytes, updates, extra)


def _serve_asgi(
    load: Callable[[], Guard],
    model: str,
    host: str,
    port: int,
    limits: Limits,
    expose_scores: bool,
    public_metrics: bool,
) -> None:
    with needs("asgi"):
        from handlers.asgi import create_app
        from handlers.asgi_server import serve_asgi
        from handlers.request_log import configure_logging
        from handlers.service import ImageService

    configure_logging()
    guard = load()
    settle_threads(guard.predictor)
    services = {model: ImageService(guard, model, limits, expose_scores)}
    serve_asgi(create_app(services, public_metrics=public_metrics), host, port)


def _serve_torchserve(
    profile: Path,
    model: str,
    port: int,
    workers: int,
    batch_size: int,
    batch_delay: int | None,
    max_bytes: int,
    updates: bool,
    extra: dict[str, object],
) -> None:
    with needs("torchserve"):
        from handlers.torchserve_server import ServerOptions, TorchServeProcess

    config: dict[str, object] = {"guard": extra}
    with export_to_scratch(profile, model, config) as store:
        choices = ServerOptions(
            inference_port=port,
            workers=workers,
            batch_size=batch_size,
            max_batch_delay_ms=batch_delay,
            max_request_size=max_bytes + _MIB,
            model_api=updates,
            echo=sys.stderr,
        )
        with (
            contextlib.suppress(KeyboardInterrupt),  # being told to stop is how a server ends well
            TorchServeProcess(Path(store), {model: f"{model}.mar"}, choices) as server,
        ):
            typer.echo(f"serving {server.url}/predictions/{model}, metrics at {server.metrics_url}; stop with Ctrl-C", err=True)
            if updates:
                kept = server.store.with_name(f"{model}-config.yaml")  # goes when the server does
                kept.write_text(json.dumps(config, indent=2))  # JSON is YAML
                where = (
                    f"--management {server.management_url} --inference {server.url} --store {shlex.quote(str(server.store))}"
                )
                export = f"guard export PROFILE --name {model} --version VERSION --config {shlex.quote(str(kept))}"
                typer.echo(f"new versions: {export}", err=True)
                typer.echo(f"then: guard roll-out model-store/{model}.mar --name {model} {where}", err=True)
            server.wait()
