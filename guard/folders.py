"""Folders and files that appear whole or not at all; folders never take the place of what is not theirs."""

from __future__ import annotations

import contextlib
import ctypes
import glob
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, final

from guard.errors import GuardError
from guard.files import as_text, is_text

_T = TypeVar("_T")
_TRIES, _PAUSE = 25, 0.02  # seconds; one who replaces again and again met five readings in a row
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
_OLD = "replaced"


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
                for path in (*draft.rglob("*"), draft):
                    _sync(path)
                _replace(folder, draft, Path(scratch) / _OLD)
                _sync(folder.parent)
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
    """Swap folders, where that takes two steps with the old one back when the new one can't move in."""
    if folder.exists() and exchange(folder, draft):
        return
    try:
        if folder.exists():
            os.replace(folder, old)
        os.replace(draft, folder)
    except BaseException:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        raise


def exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step, so that both names lead to one at every moment; False where the system can't."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux, or an old C library
        return False
    return bool(rename(_HERE, os.fsencode(first), _HERE, os.fsencode(second), _EXCHANGE) == 0)


def left_behind(folder: Path) -> Path | None:
    """Where a missing folder lies, whole, if its replacement was cut short between two steps."""
    folder = _real(folder)
    if folder.exists():
        return None
    return next(folder.parent.glob(f".{glob.escape(folder.name)}.*/{_OLD}"), None)


def read_settled(folder: Path, read: Callable[[], _T]) -> _T:
    """Read from a folder that may be replaced meanwhile: anew where it was, and that is why it failed.

    Raises:
        GuardError: As `read` raised it.
    """
    for _ in range(_TRIES - 1):
        before = _generation(folder)
        try:
            return read()
        except (GuardError, OSError):
            after = _generation(folder)
            if before == after and (after is not None or left_behind(folder) is None):
                raise
        time.sleep(_PAUSE)
    return read()


def _generation(folder: Path) -> tuple[int, int, int] | None:
    """Another one once a folder was replaced; None where there is none."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_ctime_ns


def _sync(path: Path) -> None:
    """Onto the disk, of a folder the names in it."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError:
        if not path.is_dir():  # which not every file system can, nor everybody who may write there
            raise


def write_whole(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write a file, or none: a reader never sees half of it.

    Args:
        path: Its name.
        data: What it holds.
        mode: Of a new file, less what the process's mask takes away.

    Raises:
        OSError: It can't be written; what was there stays.
    """
    partial = path.with_name(f".{path.name}.part")
    try:
        with open(partial, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
