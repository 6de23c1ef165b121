"""`guard roll-out`."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from cli.extras import needs


def roll_out_command(
    archive: Annotated[Path, typer.Argument(metavar="ARCHIVE", help="The .mar of the new version, made by guard export.")],
    name: Annotated[
        str | None, typer.Option(help="That the server serves the model by.", show_default="the archive's name")
    ] = None,
    management: Annotated[str, typer.Option(metavar="URL", help="Of the management API.")] = "http://127.0.0.1:8081",
    inference: Annotated[str, typer.Option(metavar="URL", help="Of the inference API.")] = "http://127.0.0.1:8080",
    store: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The server's model store, to copy the archive to; without it, it is there already."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes of the new version.", show_default="the archive's, or as before")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Requests that a worker judges at once.", show_default="the archive's, or as before"),
    ] = None,
    batch_delay: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="MS",
            help="How long a request waits for others to be judged along; a lone one, too.",
            show_default="the archive's, or as before",
        ),
    ] = None,
    keep_old: Annotated[
        bool, typer.Option("--keep-old", help="Leave the old version registered, without workers, to go back to.")
    ] = False,
    key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="TorchServe's key_file.json, where it asks for tokens.")
    ] = None,
    timeout: Annotated[
        float, typer.Option(help="Seconds until the new version must be ready, and the old one's queue empty.")
    ] = 120.0,
    drain_timeout: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="SECONDS",
            help="That the old version then gets to finish: one worker ends when it has, several end when that time is up.",
            show_default="its response timeout",
        ),
    ] = None,
) -> None:
    """Let a running TorchServe take a new version of a model, without losing a request.

    The new version is registered beside the old one, tried with clean images of
    its profile, and made the default; the old one answers what it had, and ends.
    If the new version does not work, the old one serves on. Its guard has the
    options that the archive was exported with (guard export --config), not those
    of the old version. TorchServe must have been started with --enable-model-api
    (guard serve --engine torchserve --updates does).

    Example: guard export profile-2 --name signs --version 2.0 --config signs-config.yaml, then
    guard roll-out model-store/signs.mar, and where guard serve started the server, with the options that it prints
    """
    with needs("torchserve"):
        from handlers.torchserve_api import Addresses, read_keys
        from handlers.torchserve_capacity import Capacity
        from handlers.torchserve_rollout import archive_config, archive_version, roll_out
        from handlers.torchserve_store import Delivery
        from handlers.torchserve_trial import archive_images

        config = archive_config(archive)
    version = archive_version(archive)
    model = name or archive.stem
    keys = {} if key_file is None else read_keys(key_file)
    delivery = None if store is None else Delivery(store, partial(shutil.copyfile, archive))
    addresses = Addresses(
        management=management,
        inference=inference,
        management_token=keys.get("management"),
        inference_token=keys.get("inference"),
    )
    options = config.get("guard")
    own = "none" if not options else json.dumps(options, default=str)
    typer.echo(f"guard options of {model} {version}: {own}; else its profile's policy, no quarantine, default limits", err=True)
    bound = "its response timeout" if drain_timeout is None else f"{drain_timeout:g} s"
    typer.echo(f"once it serves, the old version gets up to {bound} to finish what it has taken", err=True)
    given = Capacity(workers=workers, batch_size=batch_size, max_batch_delay=batch_delay)
    done = roll_out(
        model,
        archive.name if delivery is None else f"{model}-{version}.mar",
        version,
        addresses,
        delivery=delivery,
        images=archive_images(archive),
        capacity=given.or_else(Capacity.read(config)),
        keep_old=keep_old,
        timeout=timeout,
        drain_timeout=drain_timeout,
    )
    if not done.tried:
        typer.echo(f"note: {model} {done.version} could be sent no clean image: only that it had loaded was tried", err=True)
    typer.echo(f"{model} {done.version} serves now; {done.replaced} ended after {done.seconds:.0f} s")
