"""Optional parts of the installation, named when they are missing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from guard.errors import MissingExtraError


@contextlib.contextmanager
def needs(extra: str) -> Iterator[None]:
    """Around imports that an extra provides.

    Raises:
        MissingExtraError: It names the package and the extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or extra, extra) from error
