"""`guard roll-out`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from cli.extras import needs
from guard.errors import ServingError


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
    workers: Annotated[int, typer.Option(min=1, help="Processes of the new version.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests that a worker judges at once.")] = 8,
    keep_old: Annotated[bool, typer.Option("--keep-old", help="Leave the old version registered, without workers.")] = False,
    key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="TorchServe's key_file.json, where it asks for tokens.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds until the new version must be ready.")] = 120.0,
) -> None:
    """Let a running TorchServe take a new version of a model, without losing a request.

    The new version is registered beside the old one, tried, and made the
    default; the old one answers what it had, and ends. If the new version does
    not work, the old one serves on. TorchServe must have been started with
    --enable-model-api (guard serve --engine torchserve --updates does).

    Example: guard export profile-2 --name signs --version 2.0, then guard roll-out model-store/signs.mar, and where guard serve
    started the server, with the options that it prints
    """
    with needs("torchserve"):
        from handlers.torchserve_rollout import Addresses, archive_version, read_keys, roll_out

    version = archive_version(archive)
    model = name or archive.stem
    keys = {} if key_file is None else read_keys(key_file)
    file = archive.name
    if store is not None:
        file = f"{model}-{version}.mar"
        try:
            shutil.copyfile(archive, store / file)
        except OSError as error:
            raise ServingError(f"could not copy {archive} to {store}: {error.strerror or error}") from error
    addresses = Addresses(
        management=management,
        inference=inference,
        management_token=keys.get("management"),
        inference_token=keys.get("inference"),
    )
    done = roll_out(
        model,
        file,
        version,
        addresses,
        workers=workers,
        options={"batch_size": batch_size},
        keep_old=keep_old,
        timeout=timeout,
    )
    typer.echo(f"{model} {done.version} serves now; {done.replaced} ended after {done.seconds:.0f} s")
