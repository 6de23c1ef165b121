"""What commands show: progress on stderr, tables on stdout."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from guard.errors import InputError

_FILE_WIDTH = 200  # where nobody looks at a terminal, nothing need be folded
_SELDOM = 30.0  # seconds between lines of a step
_BETWEEN = 4  # spaces between columns, at most


@contextlib.contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """One bar per step of a long command, on stderr; yields the function that the steps report to.

    Where stderr is no terminal, each step is a plain line as it starts, one every half minute, and one as it ends; with
    GUARD_PROGRESS=lines one whenever it goes on.
    """
    if not sys.stderr.isatty():
        yield _plain_lines()
        return
    columns = (
        TextColumn("{task.description:<28}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield report


def _plain_lines() -> Callable[[str, int, int], None]:
    shown: dict[str, float] = {}
    last = ""
    every = os.environ.get("GUARD_PROGRESS") == "lines"  # an edge server passes them on

    def report(what: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if every or what not in shown or now - shown[what] >= _SELDOM or done == total:
            remark = what not in shown and done == total == 1 and not every
            shown[what] = now
            line = what if remark else f"{what} {done}/{total}"
            if line != last:
                typer.echo(line, err=True)
            last = line

    return report


def show_rows(title: str, rows: Sequence[tuple[str, ...]], header: tuple[str, ...] = ()) -> None:
    """Print a table whose first column names and whose others are figures."""
    table = Table(
        title=Text(title), title_justify="left", title_style="bold", show_header=bool(header), box=None, pad_edge=False
    )
    narrowest = 0
    for number, column in enumerate(zip(*([header] if header else []), *rows, strict=True)):
        unbroken = column if number == 0 else [word for cell in column for word in cell.split()]
        width = max((len(text) for text in unbroken), default=0)  # no figure is cut up, however narrow the terminal
        name = header[number] if header else ""
        table.add_column(Text(name), justify="left" if number == 0 else "right", no_wrap=number == 0, min_width=width)
        narrowest += width + _BETWEEN
    for row in rows:
        table.add_row(*map(Text, row))  # class names and paths are no markup
    console = Console(width=None if sys.stdout is not None and sys.stdout.isatty() else _FILE_WIDTH)
    Console(width=max(console.width, narrowest)).print(table)


def make_room(report: Path) -> None:
    """Refuse before the long work what could not be written, or would overwrite what is no page."""
    if report.suffix.lower() not in (".html", ".htm") or report.is_dir():
        raise InputError(f"expected --report as a file whose name ends in .html, got {report}")
    try:
        report.parent.mkdir(parents=True, exist_ok=True)
        is_new = not report.exists()
        with report.open("ab"):
            pass
        if is_new:
            report.unlink()
    except OSError as error:
        raise InputError(f"can't write --report {report}: {error.strerror or error}; name another place") from error
