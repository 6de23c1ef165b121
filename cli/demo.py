"""`guard demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cli.extras import needs


def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Everything but the archive is written there.")] = Path("build/demo"),
    model_store: Annotated[Path, typer.Option(metavar="DIR", help="Where the archive goes.")] = Path("model-store"),
    engine: Annotated[
        Literal["auto", "torchserve", "asgi"], typer.Option(help="auto: TorchServe, or ASGI where Java is missing.")
    ] = "auto",
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of split, training and calibration.")] = 0,
) -> None:
    """Show it all on real digits, in a minute or two.

    Trains a small classifier on poisoned digits, calibrates a guard on clean ones, exports it, starts a server, sends
    clean and triggered images over HTTP, prints what was answered and what was rejected, stops what it started, and
    repairs the classifier from what was rejected.
    """
    with needs("calibration"):
        from cli.demonstration.run import run

    run(out, model_store, engine, seed)
