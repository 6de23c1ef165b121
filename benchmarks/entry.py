"""How a benchmark's command ends: one line for what is wrong, no traceback for an interruption."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

from guard.errors import GuardError


def enter(main: Callable[[], int | None]) -> NoReturn:
    """Run it and exit."""
    try:
        sys.exit(main())
    except GuardError as problem:
        sys.exit(str(problem))
    except KeyboardInterrupt:
        print("interrupted: the same command goes on after the last finished epoch or victim", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        sys.exit(f"{error.filename or 'output'}: {error.strerror or error}")
