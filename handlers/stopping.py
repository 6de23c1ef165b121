"""How what was started ends, when it is told to."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end a command as Ctrl-C does: in order, with everything stopped and removed that it started.

    SIGHUP, too, which comes when the terminal is closed, unless it is ignored, as under nohup. The KeyboardInterrupt that is
    raised carries the signal's number; that of Ctrl-C carries none.
    """

    def stop(number: int, _: FrameType | None) -> None:
        if number == signal.SIGHUP:  # the shell sends one, and the system another, which must not interrupt the end
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        raise KeyboardInterrupt(number)

    with signals_call(stop, signal.SIGTERM, signal.SIGHUP):
        yield


@contextlib.contextmanager
def signals_call(handler: Callable[[int, FrameType | None], None], *numbers: signal.Signals) -> Iterator[None]:
    """Have signals handled inside the block; a SIGHUP that is ignored, as under nohup, stays so."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    before = {number: signal.signal(number, handler) for number in numbers if not (number == signal.SIGHUP and ignored)}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)
