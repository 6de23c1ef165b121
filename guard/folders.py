"""Folders and files that appear whole or not at all; folders never take the place of what is not theirs."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import final

from guard.errors import GuardError
from guard.files import as_text, is_text


@final
@dataclass(frozen=True)
class FolderKind:
    """What a folder of ours looks like.

    Attributes:
        what: What it is, for messages: "profile".
        marker: The file that every one has.
        ours: Whether a name belongs into one.
        error: Raised for whatever goes wrong.
    """

    what: str
    marker: str
    ours: Callable[[str], bool]
    error: type[GuardError]

    def check_target(self, folder: Path, *read: str | Path | None) -> None:
        """Refuse, before any work, a folder that can't be written or that holds something else.

        Args:
            folder: It.
            read: What the work reads: a folder that holds it would be replaced, and it be lost. None for nothing.
        """
        for place in (folder, _real(folder)):
            if not is_text(place):
                raise self.error(f"expected a folder whose name is UTF-8, got {as_text(place)}: pick another --out")
        folder = _real(folder)
        files = [Path(path) for path in read if path is not None and Path(path).exists()]  # MODEL may be a factory
        lost = next((path for path in files if folder in _real(path).parents), None)
        if lost is not None:
            raise self.error(
                f"expected a folder without what is read, got {folder}, which holds {lost.name}: pick another --out"
            )
        parent = next((place for place in folder.parents if place.exists()), folder)
        if not parent.is_dir():
            raise self.error(f"could not write the {self.what} to {folder}: {parent} is no folder; pick another --out")
        if not os.access(parent, os.W_OK):
            raise self.error(f"could not write the {self.what} to {folder}: Permission denied; pick another --out")
        if folder.exists() and not folder.is_dir():
            raise self.error(f"expected a folder to write the {self.what} to, got {folder}, a file: pick another --out")
        foreign = self._foreign(folder)
        if foreign is not None:
            raise self.error(
                f"expected a new, empty or {self.what} folder, got {folder}, which holds something else ({foreign}): "
                "pick another --out"
            )

    @contextlib.contextmanager
    def writing(self, folder: Path) -> Iterator[Path]:
        """A hidden draft beside the folder, which takes its place at the end of the block; an error leaves what was there."""
        folder = _real(folder)
        self.check_target(folder)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
                draft = Path(scratch) / "draft"
                draft.mkdir()
                yield draft
                _replace(folder, draft, Path(scratch) / "replaced")
        except OSError as error:
            raise self.error(f"could not write the {self.what} to {folder}: {error.strerror or error}") from error

    def _foreign(self, folder: Path) -> str | None:
        """What would be lost if the folder were replaced: the first name in it that none of ours has."""
        if not folder.exists():
            return None
        if not folder.is_dir():
            return folder.name
        names = sorted(item.name for item in folder.iterdir())
        if not names:
            return None
        if self.marker not in names:
            return names[0]
        return next((name for name in names if name != self.marker and not self.ours(name)), None)


def _real(folder: str | Path) -> Path:
    """Where a link leads, so that what it leads to is replaced and the link stays."""
    return Path(os.path.realpath(folder))


def _replace(folder: Path, draft: Path, old: Path) -> None:
    """Swap folders; when the new one can't move in, the old one moves back."""
    try:
        if folder.exists():
            os.replace(folder, old)
        os.replace(draft, folder)
    except BaseException:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        raise


def write_whole(path: Path, data: bytes) -> None:
    """Write a file, or none: a reader never sees half of it.

    Raises:
        OSError: It can't be written; what was there stays.
    """
    partial = path.with_name(f".{path.name}.part")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
