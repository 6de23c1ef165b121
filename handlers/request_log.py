"""Logging for a server in the foreground: requests as JSON lines on stderr, everything else as usual."""

from __future__ import annotations

import logging
import sys

_NAME = "backdoor-guard"


def configure_logging(level: int = logging.INFO) -> None:
    """Send the logger `guard.requests` to stderr as it is, one JSON object a line, and the others in the usual form.

    Calling it again changes the level and nothing else.

    Args:
        level: Of everything but the requests, which are always logged.
    """
    plain = logging.StreamHandler(sys.stderr)
    plain.setFormatter(logging.Formatter("%(message)s"))
    usual = logging.StreamHandler(sys.stderr)
    usual.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    requests = logging.getLogger("guard.requests")
    requests.setLevel(logging.INFO)
    requests.propagate = False
    root = logging.getLogger()
    root.setLevel(level)
    for target, handler in ((requests, plain), (root, usual)):
        handler.set_name(_NAME)
        for old in [item for item in target.handlers if item.get_name() == _NAME]:
            target.removeHandler(old)
        target.addHandler(handler)
