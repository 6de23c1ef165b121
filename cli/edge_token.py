"""The token that a device and its edge server share: from a file, or from the environment; never from the command line."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from guard.errors import EdgeError
from handlers.edge_protocol import check_token

VARIABLE = "GUARD_EDGE_TOKEN"
_MADE = "token"


def read_token(file: Path | None) -> str | None:
    """The token that the user gives; None where he gives none.

    Args:
        file: That holds it; None for the environment's `GUARD_EDGE_TOKEN`.

    Raises:
        EdgeError: The file can't be read, or the token is too short.
    """
    if file is None:
        value = os.environ.get(VARIABLE)
        return None if value is None else check_token(value)
    try:
        return check_token(file.read_text(encoding="ascii"))
    except (OSError, UnicodeDecodeError) as error:
        raise EdgeError(
            f"expected a file with the edge's token, got {file}, which can't be read: check --edge-token-file"
        ) from error


def made_token(folder: Path) -> tuple[str, Path]:
    """The token that this server made for itself, now or when it started for the first time, and where it lies.

    Raises:
        EdgeError: It can't be written, or was replaced by one that is too short.
    """
    path = folder / _MADE
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not path.exists():
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                file.write(secrets.token_urlsafe(32) + "\n")
    except OSError as error:
        raise EdgeError(f"can't write a token to {path} ({error.strerror or error}): pass --token-file") from error
    token = read_token(path)
    if token is None:
        raise EdgeError(f"expected a token in {path}, got none: delete it")
    return token, path
