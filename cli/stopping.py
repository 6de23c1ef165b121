"""How commands that start servers end."""

from __future__ import annotations

import signal
from types import FrameType


def stop_on_sigterm() -> None:
    """Let SIGTERM end a command as Ctrl-C does: in order, with everything stopped that it started."""

    def stop(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
