"""The zip archive that holds a PyTorch model, read once and written back plain.

Python's reader and PyTorch's disagree about odd archives: PyTorch's looks names up without regard to case, takes the first
of two entries of one name and believes other offsets. So odd archives are refused, and what is loaded is not the file but
a plain copy of exactly what was looked at.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

from guard.errors import ModelError

_UNPACKED_SLACK = 64 * 1024**2


def read_archive(path: Path, what: str) -> dict[str, bytes]:
    """Entries by their name below the archive's one top folder.

    Args:
        path: The file.
        what: What it should be, for the message.

    Raises:
        ModelError: No archive, a damaged one, or one that two readers could read differently.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            infos = [info for info in archive.infolist() if not info.is_dir()]
            if sum(info.file_size for info in infos) > 2 * path.stat().st_size + _UNPACKED_SLACK:
                raise ModelError(f"refused {path.name}: it unpacks to far more than its size; save the model again")
            entries = {info.filename: archive.read(info) for info in infos}
    except ModelError:
        raise
    except Exception as error:  # zipfile raises half a dozen types for damaged archives
        raise ModelError(f"expected a {what} file, got {path.name}, which is no such archive or is damaged") from error
    if len({info.filename.casefold() for info in infos}) != len(infos):
        raise ModelError(f"refused {path.name}: two of its entries have the same name; save the model again")
    if len({name.partition("/")[0] for name in entries}) != 1 or any("/" not in name for name in entries):
        raise ModelError(f"expected a {what} file, got {path.name}, an archive without the one folder that those have")
    return {name.partition("/")[2]: data for name, data in entries.items()}


def write_archive(entries: Mapping[str, bytes]) -> io.BytesIO:
    """A plain archive of these entries, in memory."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in entries.items():
            archive.writestr(f"model/{name}", data)
    buffer.seek(0)
    return buffer
