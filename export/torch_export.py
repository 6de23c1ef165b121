"""A model as a `torch.export` program (`.pt2`): weights and graph in one file that needs no code to load."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from pathlib import Path

import msgspec
import torch
from torch import nn
from torch.export import Dim

from export.original import Original, drafts_beside
from guard.errors import ExportError, one_line
from guard.predictors.exported import ExportedBackend
from guard.predictors.module import ModuleBackend
from guard.predictors.screening import file_sha256
from guard.profile import ModelRecord, Profile, save_profile


def export_pt2(profile_folder: Path, output: Path) -> Path:
    """Write a profile's model as a `torch.export` program with a dynamic batch, and compare it with the original.

    Args:
        profile_folder: A profile of a module that a factory makes, or of a `.pt2` file, which is copied.
        output: The `.pt2` file; an existing one is replaced.

    Returns:
        `output`.

    Raises:
        ExportError: The model can't be exported, or the export answers differently; nothing is left behind.
    """
    original = Original.load(profile_folder)
    _write(original, output)
    return output


def with_exported_model(profile_folder: Path, target: Path) -> Profile:
    """Copy a profile whose model or tripwire a factory makes into one that holds `.pt2` files instead.

    Args:
        profile_folder: The original.
        target: A new folder.

    Raises:
        ExportError: See `export_pt2`.
    """
    original = Original.load(profile_folder)
    watched = original.tripwire()
    with tempfile.TemporaryDirectory(prefix="guard-export-") as scratch:
        record, file = _as_file(original, Path(scratch) / "model.pt2")
        profile, watched_file = msgspec.structs.replace(original.profile, model=record), None
        if watched is not None and profile.tripwire is not None:
            record, watched_file = _as_file(watched, Path(scratch) / "tripwire.pt2")
            profile = msgspec.structs.replace(profile, tripwire=msgspec.structs.replace(profile.tripwire, model=record))
        return save_profile(profile, original.arrays, target, file, tripwire_file=watched_file)


def _as_file(original: Original, output: Path) -> tuple[ModelRecord, Path]:
    """A model that a factory makes as a `.pt2` file, any other as it is."""
    record = original.profile.model
    if record.factory is None:
        return record, original.model_file
    file = _write(original, output)
    return msgspec.structs.replace(record, kind="torch-export", file=file.name, factory=None, sha256=file_sha256(file)), file


def _write(original: Original, output: Path) -> Path:
    if output.suffix != ".pt2":
        raise ExportError(f"expected an output file that ends in .pt2, got {output.name}")
    backend = original.predictor.backend
    with drafts_beside(output.parent, output.name) as scratch:
        draft = scratch / output.name
        if isinstance(backend, ExportedBackend):
            shutil.copyfile(original.model_file, draft)
        elif isinstance(backend, ModuleBackend):
            _export(backend.module, original, draft)
        else:
            raise ExportError(
                f"expected a model in PyTorch code for a .pt2 export, got {backend.kind}: TorchServe and `guard serve` run "
                "that file as it is"
            )
        original.compare(ExportedBackend.load(draft))
        draft.replace(output)
    return output


def _export(module: nn.Module, original: Original, draft: Path) -> None:
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the exporter's own deprecations
            batch = {0: Dim("batch", min=1)}
            program = torch.export.export(module, (original.example(),), dynamic_shapes=(batch,))
            torch.export.save(program, draft)
    except Exception as error:  # the tracer raises whatever the model's code met
        raise ExportError(
            f"torch.export can't trace this model with a dynamic batch ({one_line(error)}): "
            "remove branches on values or on the batch size from its forward"
        ) from error
