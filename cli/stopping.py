"""How commands end that are told to."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end a command as Ctrl-C does: in order, with everything stopped and removed that it started.

    SIGHUP, too, which comes when the terminal is closed, unless it is ignored, as under nohup.
    """

    def stop(number: int, _: FrameType | None) -> None:
        if number == signal.SIGHUP:  # the shell sends one, and the system another, which must not interrupt the end
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        raise KeyboardInterrupt

    numbers = [signal.SIGTERM] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGTERM, signal.SIGHUP]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
