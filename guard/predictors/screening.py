"""Look at a model file before any loader does.

A model that somebody else trained is untrusted input. Two of PyTorch's file formats can run code while they load: a
`torch.export` archive may carry pickles and Python source, and TorchScript may write files. Both are refused here, by
reading the archive without unpickling anything; what is loaded then is a plain copy of what was looked at.

This keeps code from running. It does not make PyTorch's operators safe with hostile arguments: run unknown models with as
few rights as they need.
"""

from __future__ import annotations

import hashlib
import io
import re
from pathlib import Path

from guard.errors import ModelError
from guard.predictors.archives import read_archive, write_archive
from guard.predictors.programs import plain_program, plain_weights

_UNSAFE_SCRIPT = re.compile(
    rb"\b(?:save|from_file|load|rpc_sync|rpc_async|rpc_remote|[Pp]rint|_print|warn|warnings|_test_warn\w*|manual_seed)\b"
    rb"|(?<![\w.])ops\b(?! : |\.(?:aten|prim|prims|quantized|_quantized|quantized_decomposed|prepacked|mkldnn|torchvision)\b)"
)
"""Whole words anywhere in the code, because TorchScript allows blanks, comments and aliases between `torch` and `save`."""

_TEXT = rb'(?:[\w.]+|"[^"\\\n]*")'
_WARNING = re.compile(
    rb"^([ \t]*)torch\.warn\((?:" + _TEXT + rb"|torch\.format\(" + _TEXT + rb"(?:, " + _TEXT + rb")*\))(?:, \w+)?\)[ \t]*$",
    re.MULTILINE,
)
"""A line of its own without a call but of `format`, as PyTorch's layers have them: its text may be anything, also what our own
logs and metrics look like."""

_PLAIN_ATTRIBUTE = re.compile(rb'\bgetattr\([\w.]+, "[^"\\]*"\)')
"""How TorchScript writes a submodule named by a number. Any other `getattr` could spell `save` in pieces."""

_PLAIN_PT2 = re.compile(
    r"archive_format|archive_version|byteorder|\.data/[^/]+|models/[^/]+\.json|extra/[^/]*"
    r"|data/(?:weights|constants)/(?:(?:weight|tensor)_[0-9]+|[^/]+_config\.json)|data/sample_inputs/[^/]+\.pt"
)


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def screen_torchscript(path: Path) -> io.BytesIO:
    """Refuse a `.pt` file that is not TorchScript, or whose code reads or writes files, or prints or warns: into our output.

    Returns:
        The same archive, for the loader, without the plain warnings that PyTorch's own layers have.

    Raises:
        ModelError: It says what the file is instead.
    """
    entries = read_archive(path, "TorchScript")
    scripts = {name: data for name, data in entries.items() if name.casefold().startswith("code/")}
    if not scripts:
        raise ModelError(
            f"expected TorchScript, got {path.name}, a pickled checkpoint: nothing is unpickled here; load it where "
            "you trust it and save the model with torch.jit.trace(...).save, torch.onnx.export or torch.export.save"
        )
    for name, data in scripts.items():
        if name.endswith(".debug_pkl"):
            continue
        entries[name] = _WARNING.sub(rb"\1pass", data)
        word = _unsafe(entries[name])
        if word:
            raise ModelError(
                f"refused {path.name}: its TorchScript code reads or writes files, prints or warns ({word!r} in {name}); don't "
                "run it, or, where that is but a name or a text, export it anew with another"
            )
    return write_archive(entries)


def _unsafe(code: bytes) -> str:
    """What in it may not be there; empty for nothing."""
    found = _UNSAFE_SCRIPT.search(code)
    if found is not None:
        return found.group().decode()
    plain, nested = code, 1
    while nested:
        plain, nested = _PLAIN_ATTRIBUTE.subn(b"_", plain)
    return "getattr" if b"getattr" in plain else ""


def screen_exported(path: Path) -> io.BytesIO:
    """Refuse a `.pt2` archive that could run code while it loads, or that holds native code.

    Returns:
        The same archive without debugging information and sample inputs, for the loader.

    Raises:
        ModelError: It names the entry.
    """
    entries = read_archive(path, "torch.export")
    for name, data in entries.items():
        if not _PLAIN_PT2.fullmatch(name):
            raise ModelError(f"refused {path.name}: entry {name} is native code or a pickled object; export it again")
        try:
            if name.startswith("models/"):
                entries[name] = plain_program(data)
            elif name.endswith("_config.json"):
                entries[name] = plain_weights(data, name)
        except ModelError as error:
            raise ModelError(f"refused {path.name}: {name}: {error}; export plain tensors and operators only") from error
        if name.startswith("data/sample_inputs/"):  # a pickle, which nothing here needs: an empty one isn't unpickled
            entries[name] = b""
    return write_archive(entries)
