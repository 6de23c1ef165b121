"""What unpickling could do."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import torch


class CreatesFile:
    """Unpickling it creates a file: what an attacker would do worse."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.path),)


def pickled(path: Path) -> bytes:
    """What creates that file when it is unpickled."""
    buffer = io.BytesIO()
    torch.save(((CreatesFile(path),), {}), buffer)
    return buffer.getvalue()
