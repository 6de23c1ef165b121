"""What a device sends an edge server: a model file without pickles, and images as plain arrays."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from guard.errors import EdgeError, GuardError
from guard.predictors import load_backend
from guard.predictors.archives import read_archive
from guard.predictors.screening import file_sha256
from handlers.edge_protocol import FileInfo

if TYPE_CHECKING:
    from calibration.data import ImageSet
    from calibration.sources import ModelSource

_KINDS = {"torch-export": "model.pt2", "torchscript": "model.pt", "onnx": "model.onnx", "module": "model.safetensors"}
_SAMPLES = "data/sample_inputs/"


def write_model(source: ModelSource, folder: Path) -> Path:
    """Put a model into a folder, ready to be sent.

    Args:
        source: The model; of a factory's module the weights are sent.
        folder: An existing one.

    Raises:
        EdgeError: It lies in no file, or can't be freed of pickles.
    """
    if source.file is None:
        raise EdgeError("expected a model in a file, or a factory of an nn.Module, got a predict function, which can't be sent")
    target = folder / _KINDS[source.backend.kind]
    if source.backend.kind != "torch-export" or not _has_samples(source.file):
        shutil.copyfile(source.file, target)
        return target
    with zipfile.ZipFile(target, "w") as archive:
        for name, data in read_archive(source.file, "torch.export").items():
            entry = zipfile.ZipInfo(f"model/{name}")  # without a date: the same model is the same bytes
            archive.writestr(entry, b"" if name.startswith(_SAMPLES) else data)
    try:
        load_backend(target)
    except GuardError as error:
        raise EdgeError(
            f"expected a .pt2 file that loads without its pickled sample inputs, got {source.file.name}, which does not: "
            f"send it as TorchScript ({error})"
        ) from error
    return target


def write_images(images: ImageSet, target: Path) -> None:
    """Write images, and what is known of their labels, as an `.npz`; bytes where that is exact."""
    arrays: dict[str, Any] = {"x": _exact(images.pixels).numpy()}
    if images.labels is not None:
        arrays["y"] = images.labels.numpy()
    if images.class_names:
        arrays["class_names"] = np.array(images.class_names, dtype=np.str_)
    np.savez_compressed(target, **arrays)


def declared(path: Path) -> FileInfo:
    """A file's name, size and checksum."""
    return FileInfo(name=path.name, size=path.stat().st_size, sha256=file_sha256(path))


def _has_samples(path: Path) -> bool:
    return any(data for name, data in read_archive(path, "torch.export").items() if name.startswith(_SAMPLES))


def _exact(pixels: Tensor) -> Tensor:
    if pixels.dtype == torch.uint8:
        return pixels
    whole = pixels.mul(255.0).round()
    return whole.to(torch.uint8) if bool(((whole / 255.0) - pixels).abs().max() < 1e-6) else pixels
