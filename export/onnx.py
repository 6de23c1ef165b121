"""A model as ONNX."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from export.original import Original, drafts_beside
from guard.errors import ExportError, MissingExtraError, one_line
from guard.predictors.exported import ExportedBackend
from guard.predictors.module import ModuleBackend
from guard.predictors.onnx import OnnxBackend
from guard.predictors.screening import screen_exported
from guard.predictors.torchscript import TorchScriptBackend


def export_onnx(profile_folder: str | Path, output: str | Path) -> Path:
    """Write a profile's model as one ONNX file with a dynamic batch, and compare it with the original.

    A `.pt2` program with a fixed batch becomes an ONNX model with that batch. An ONNX model is copied.

    Args:
        profile_folder: A profile with its model's file, or of a module that a factory makes.
        output: The `.onnx` file; an existing one is replaced.

    Returns:
        `output`.

    Raises:
        ExportError: The model can't be exported, or the export answers differently; nothing is left behind.
        MissingExtraError: The ONNX packages are not installed.
    """
    for package in ("onnx", "onnxruntime", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, "onnx")
    profile_folder, output = Path(profile_folder), Path(output)
    if output.suffix != ".onnx":
        raise ExportError(f"expected an output file that ends in .onnx, got {output.name}")
    original = Original.load(profile_folder)
    with drafts_beside(output.parent, output.name) as scratch:
        draft = scratch / output.name
        if isinstance(original.predictor.backend, OnnxBackend):
            shutil.copyfile(original.model_file, draft)
        else:
            _export(original, draft)
        original.compare(OnnxBackend.load(draft))
        draft.replace(output)
    return output


def _export(original: Original, draft: Path) -> None:
    source, arguments, options = _call(original)
    try:
        with warnings.catch_warnings(), torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # the exporters' own deprecations
            torch.onnx.export(source, arguments, str(draft), external_data=False, verbose=False, **options)
    except Exception as error:  # the exporters raise whatever the model's code met
        raise ExportError(
            f"the ONNX exporter can't convert this model ({one_line(error)}): export it where its code is, with "
            "torch.onnx.export, and calibrate that file"
        ) from error


def _call(original: Original) -> tuple[Any, tuple[Tensor, ...], dict[str, Any]]:
    """What the exporter takes: a module or program, its example and its options."""
    backend = original.predictor.backend
    if isinstance(backend, ExportedBackend):
        return torch.export.load(screen_exported(original.model_file)), (), {"dynamo": True}
    example = (original.example(),)
    if isinstance(backend, ModuleBackend):
        return backend.module, example, {"dynamo": True, "dynamic_shapes": ({0: Dim("batch", min=1)},)}
    if isinstance(backend, TorchScriptBackend):  # only the older exporter reads these
        return backend.module, example, {"dynamo": False, "input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}}
    raise ExportError(f"expected a model in a file for an ONNX export, got {backend.kind}")
