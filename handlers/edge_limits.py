"""What an edge server takes of a device: so much, and no archive that holds pickles."""

from __future__ import annotations

import errno
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import final

from guard.errors import EdgeError, TooLargeError
from handlers.edge_protocol import JobRequest


@final
@dataclass(frozen=True)
class EdgeLimits:
    """How much an edge server takes and keeps.

    Attributes:
        max_bytes: Of one file, also once it is unpacked.
        max_job_bytes: Of all files that a job sends.
        max_jobs: Jobs kept; the oldest that have ended make room.
        job_seconds: After which a job that still runs has failed.
        receiving_seconds: After which a job of whose files nothing arrives is dropped.
        kept_seconds: After which a job that has ended, or can't be read, is dropped.
    """

    max_bytes: int = 1024**3
    max_job_bytes: int = 2 * 1024**3
    max_jobs: int = 16
    job_seconds: float = 24 * 3600.0
    receiving_seconds: float = 3600.0
    kept_seconds: float = 7 * 24 * 3600.0

    def __post_init__(self) -> None:
        """Refuse bounds that nothing fits into."""
        if min(self.max_bytes, self.max_job_bytes, self.max_jobs) < 1:
            raise EdgeError(f"expected positive bounds, got {self.max_bytes}, {self.max_job_bytes} and {self.max_jobs}")

    def check_request(self, request: JobRequest) -> None:
        """Look at what a job is going to send.

        Raises:
            TooLargeError: It declares more than is taken.
        """
        largest = max(item.size for item in request.files)
        if largest > self.max_bytes:
            raise TooLargeError(f"expected files of at most {self.max_bytes} bytes, got one of {largest}: send fewer images")
        together = sum(item.size for item in request.files)
        if together > self.max_job_bytes:
            raise TooLargeError(f"expected at most {self.max_job_bytes} bytes a job, got {together}: send fewer images")

    def check_file(self, path: Path, name: str) -> None:
        """Look at an archive's table of contents: the commands that load it read all of it into memory.

        Args:
            path: Of the file.
            name: That it was sent by, which says whether it must be an archive.

        Raises:
            TooLargeError: It unpacks to more than is taken.
            EdgeError: It holds pickles, or is no archive though its name says so.
            OSError: The disk fails, or the file was deleted meanwhile (FileNotFoundError).
        """
        if not name.endswith((".npz", ".pt", ".pt2")):
            return
        try:
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            cause = error if isinstance(error, OSError) else error.__context__  # zipfile takes some for a bad archive, too
            if isinstance(cause, OSError) and cause.errno not in (None, errno.EINVAL):  # an offset that leads nowhere is one
                raise cause from None
            raise EdgeError(f"expected an archive in {name}, got something else: save it again", 422, "bad-file") from error
        unpacked = sum(entry.file_size for entry in entries)
        if unpacked > self.max_bytes:
            raise TooLargeError(f"expected {name} to unpack to at most {self.max_bytes} bytes, got {unpacked}")
        if name.endswith(".pt2") and any("/sample_inputs/" in entry.filename and entry.file_size for entry in entries):
            raise EdgeError(f"refused {name}: its sample inputs are pickled; send it without them", 422, "pickled")
