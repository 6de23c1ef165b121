"""The model store of a TorchServe, where it lies on this machine: archives appear in it whole, and replace no others."""

from __future__ import annotations

import contextlib
import fcntl
import filecmp
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import final

from guard.errors import ServingError


@final
@dataclass(frozen=True)
class Delivery:
    """An archive for a model store.

    Args:
        store: Its folder.
        write: Writes the archive to a path where nothing is.
    """

    store: Path
    write: Callable[[Path], object]

    @contextlib.contextmanager
    def placed(self, file: str) -> Iterator[Callable[[], None]]:
        """The archive in the store, under a name; if the block fails, it goes again, unless it was there before or is needed.

        Yields:
            What to call when something needs it, whatever becomes of the block.

        Raises:
            ServingError: Another one has the name, or the store can't be written.
        """
        target = self.store / file
        with self._draft(file) as draft, self.locked():
            ours = not target.exists()
            if ours:
                draft.replace(target)
            elif not filecmp.cmp(draft, target, shallow=False):
                raise ServingError(
                    f"expected no other archive {file} in {self.store}, got one of other content: export with another "
                    "--version, or delete it if nothing needs it"
                )
        needed = threading.Event()
        try:
            yield needed.set
        except BaseException:
            if ours and not needed.is_set():
                target.unlink(missing_ok=True)
            raise

    def is_in_store_as(self, file: str) -> bool:
        """Whether the store has that very archive under a name.

        Raises:
            ServingError: The store can't be written.
        """
        found = self.store / file
        if not found.is_file():
            return False
        with self._draft(found.name) as draft:
            return filecmp.cmp(draft, found, shallow=False)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Between looking and acting no other roll-out into this store acts; it waits. Without locks for files, it does not."""
        folder = os.open(self.store, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):
                fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    @contextlib.contextmanager
    def _draft(self, file: str) -> Iterator[Path]:
        try:
            with tempfile.TemporaryDirectory(dir=self.store, prefix=f".{file}.") as scratch:
                draft = Path(scratch) / file
                self.write(draft)
                yield draft
        except OSError as error:
            raise ServingError(f"could not copy {file} to {self.store}: {error.strerror or error}") from error
