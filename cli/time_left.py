"""How long something will take that takes long, once its first step is done."""

from __future__ import annotations

import time
from collections.abc import Callable

import typer

_WORTH = 60.0  # seconds: less need not be said

Report = Callable[[str, int, int], None]


def telling_time(progress: Report, what: str, advice: str, now: Callable[[], float] = time.monotonic) -> Report:
    """The same progress, which also says on stderr, once, how long a step's successors will take.

    Args:
        progress: Told everything.
        what: Is timed: from the first report of it to the next.
        advice: What to do where that is too long.
        now: A clock, in seconds.
    """
    began: list[tuple[float, int]] = []

    def report(name: str, done: int, total: int) -> None:
        progress(name, done, total)
        if name != what:
            return
        began.append((now(), done))
        if len(began) == 2:
            (start, before), (end, after) = began
            left = (end - start) / max(1, after - before) * (total - after)
            if left >= _WORTH:
                typer.echo(f"{what} will take {duration(left)} more, by its first step: {advice}", err=True)

    return report


def duration(seconds: float) -> str:
    """`about 14 hours`, `about 25 minutes`."""
    minutes = seconds / 60.0
    if minutes < 90.0:
        return f"about {max(1, round(minutes))} minute{'' if round(minutes) <= 1 else 's'}"
    return f"about {round(minutes / 60.0)} hours"
