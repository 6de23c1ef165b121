"""`guard quarantine`: look through what was rejected."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from cli import options
from cli.display import show_rows
from guard import Quarantine
from guard.errors import QuarantineError
from guard.files import as_text
from guard.quarantine import Item
from guard.readings import reading_of

app = typer.Typer(no_args_is_help=True, help="Look through what was rejected: list, show, release, delete.")

_Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The quarantine folder.", exists=False)]
_Ids = Annotated[list[str], typer.Argument(metavar="ID...", help="Items, as list names them.")]


@app.command("list")
def list_items(folder: _Folder, as_json: options.JsonOption = False) -> None:
    """One line per item, oldest first."""
    items = _open(folder).items()
    if as_json:
        for item in items:
            typer.echo(msgspec.json.encode(item).decode())
    elif items:
        rows = [(item.id, _time(item), f"{item.label}", item.detector, _score(item)) for item in items]
        show_rows(
            f"{len(items)} {'item' if len(items) == 1 else 'items'} in {as_text(folder)}",
            rows,
            ("id", "time", "label", "detector", "found"),
        )
    else:
        typer.echo(f"{as_text(folder)} is empty")


@app.command("show")
def show_item(
    folder: _Folder, item_id: Annotated[str, typer.Argument(metavar="ID")], as_json: options.JsonOption = False
) -> None:
    """All that is known of one item, and where its picture lies."""
    item = _open(folder).get(item_id)
    picture = as_text(folder / item.image)
    if as_json:
        typer.echo(msgspec.json.encode({**msgspec.to_builtins(item), "path": picture}).decode())
        return
    show_rows(
        item.id,
        [
            ("time", _time(item)),
            ("the model would have answered", f"{item.label} (index {item.label_index})"),
            ("detector", item.detector),
            (reading_of(item.detector).quantity, _score(item)),
            ("picture", picture),
        ],
    )


@app.command("release")
def release_items(
    folder: _Folder,
    ids: _Ids,
    to: Annotated[Path, typer.Option(metavar="DIR", help="Where to move the pictures, into a sub-folder per label.")],
    label: Annotated[str | None, typer.Option(help="The true class name; the model's own answer otherwise.")] = None,
) -> None:
    """Take false alarms out: move their pictures into a folder of clean images."""
    quarantine = _open(folder)
    for item in [quarantine.get(item_id) for item_id in dict.fromkeys(ids)]:
        name = label if label is not None else item.label or "unlabelled"
        typer.echo(as_text(quarantine.release(item.id, to / _safe(name))))


@app.command("delete")
def delete_items(
    folder: _Folder,
    ids: Annotated[list[str] | None, typer.Argument(metavar="ID...", help="Items, as list names them.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Delete every item.")] = False,
) -> None:
    """Delete items for good."""
    quarantine = _open(folder)
    if bool(ids) == everything:
        raise QuarantineError("expected the ids of items, or --all for every item")
    named = dict.fromkeys(ids or [])
    chosen = [item.id for item in quarantine.items()] if everything else [quarantine.get(name).id for name in named]
    for item_id in chosen:
        quarantine.delete(item_id)
    typer.echo(f"deleted {len(chosen)}")


def _open(folder: Path) -> Quarantine:
    if not folder.is_dir():
        raise QuarantineError(f"expected a quarantine folder, got {folder}: no such folder; nothing may have been rejected yet")
    return Quarantine(folder)


def _time(item: Item) -> str:
    return datetime.fromtimestamp(item.time, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def _score(item: Item) -> str:
    """What was found, against the threshold."""
    reading = reading_of(item.detector)
    return f"{reading.value(item.score):.4f} {reading.rejects} {reading.text(item.threshold)}"


def _safe(name: str) -> str:
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise QuarantineError(f"expected a label that can name a folder, got {name!r}: pass another --label")
    return name
