"""How a benchmark's command ends: one line for what is wrong, no traceback for an interruption."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from guard.errors import GuardError
from handlers.stopping import stopped_by_sigterm


def enter(main: Callable[[], int | None]) -> NoReturn:
    """Run it and exit; told to end, it first ends what it has started, and its exit code is the one that a shell gives."""
    try:
        with stopped_by_sigterm():
            sys.exit(main())
    except GuardError as problem:
        sys.exit(str(problem))
    except KeyboardInterrupt as told:
        print("interrupted: the same command goes on after the last finished epoch or victim", file=sys.stderr)
        sys.exit(128 + (told.args[0] if told.args else signal.SIGINT))
    except OSError as error:
        sys.exit(f"{error.filename or 'output'}: {error.strerror or error}")
