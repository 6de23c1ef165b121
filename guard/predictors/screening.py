"""Look at a model file before any loader does.

A model that somebody else trained is untrusted input. Two of PyTorch's file formats can run code while they load: a
`torch.export` archive may carry pickles, and TorchScript may write files. Both are refused here, by reading the archive
without unpickling anything.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import zipfile
from pathlib import Path

import torch

from guard.errors import ModelError

_FILE_OPERATORS = re.compile(rb"\b(?:torch|ops\.aten)\.(?:save|from_file|load)\b")
_PLAIN_PT2 = re.compile(
    r"^[^/]+/(?:archive_format|archive_version|byteorder|\.data/[^/]+|models/[^/]+\.json|extra/[^/]*"
    r"|data/(?:weights|constants)/(?:(?:weight|tensor)_\d+|[^/]+_config\.json)|data/sample_inputs/[^/]+\.pt)$"
)


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def screen_torchscript(path: Path) -> None:
    """Refuse a `.pt` file that is not TorchScript, or whose code reads or writes files.

    Raises:
        ModelError: It says what the file is instead.
    """
    with _open_zip(path, "TorchScript") as archive:
        names = archive.namelist()
        if not any("/code/" in name for name in names):
            raise ModelError(
                f"expected TorchScript, got {path.name}, a pickled checkpoint: nothing is unpickled here; load it where "
                "you trust it and save the model with torch.jit.trace(...).save, torch.onnx.export or torch.export.save"
            )
        for name in names:
            if "/code/" in name and name.endswith(".py") and _FILE_OPERATORS.search(archive.read(name)):
                raise ModelError(f"refused {path.name}: its TorchScript code reads or writes files ({name}); don't run it")


def screen_exported(path: Path) -> None:
    """Refuse a `.pt2` archive that would be unpickled without restriction, or that holds native code.

    Raises:
        ModelError: It names the entry.
    """
    with _open_zip(path, "torch.export") as archive:
        for name in archive.namelist():
            if not _PLAIN_PT2.match(name):
                raise ModelError(f"refused {path.name}: entry {name} is native code or a pickled object; export it again")
            if name.endswith("_config.json") and _asks_for_pickle(archive.read(name)):
                raise ModelError(f"refused {path.name}: {name} asks for unpickling; export plain tensors only")
            if name.endswith(".pt"):
                _check_restricted(archive.read(name), path.name, name)


def _asks_for_pickle(config: bytes) -> bool:
    try:
        entries = json.loads(config).get("config", {})
        return any(bool(entry.get("use_pickle")) for entry in entries.values())
    except (ValueError, AttributeError):
        return True


def _check_restricted(data: bytes, file: str, name: str) -> None:
    """The loader falls back to full unpickling when the restricted one fails: so the restricted one must succeed."""
    if not data:
        return
    try:
        torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception as error:  # any failure at all would trigger the loader's unrestricted fallback
        raise ModelError(f"refused {file}: {name} holds more than tensors; export it again from plain inputs") from error


def _open_zip(path: Path, what: str) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise ModelError(f"expected a {what} file, got {path.name}, which is no such archive or is damaged") from error
