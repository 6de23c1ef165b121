"""Images that a command is given: files, folders and `.npz`, in batches, the bad ones with their error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from guard import GuardError, InputError, InputSpec, Limits, decode_image
from guard.arrays import load_arrays
from guard.decoding import SUFFIXES


def read_images(paths: list[Path], spec: InputSpec, limits: Limits) -> Iterator[tuple[str, Tensor | GuardError]]:
    """Each image with its name, or the reason why it can't be read.

    Args:
        paths: Image files, folders (searched for images), or `.npz` with `x`.
        spec: The model's input.
        limits: Of one encoded image.
    """
    for path in paths:
        if path.is_dir():
            files = sorted(item for item in path.rglob("*") if item.suffix.lower() in SUFFIXES and item.is_file())
            if not files:
                yield str(path), InputError(f"expected images in {path}, got none")
            for file in files:
                yield str(file), _decode(file, spec, limits)
        elif path.suffix.lower() == ".npz":
            yield from _arrays(path, spec)
        else:
            yield str(path), _decode(path, spec, limits)


def _decode(path: Path, spec: InputSpec, limits: Limits) -> Tensor | GuardError:
    try:
        with path.open("rb") as file:
            data = file.read(limits.max_bytes + 1)
        return decode_image(data, spec, limits)
    except OSError as error:
        return InputError(f"expected an image file, got {path}: {error.strerror or error}")
    except GuardError as error:
        return error


def _arrays(path: Path, spec: InputSpec) -> Iterator[tuple[str, Tensor | GuardError]]:
    try:
        x = load_arrays(path)["x"]
    except InputError as error:
        yield str(path), error
        return
    for row in range(len(x) if x.ndim else 0):
        yield f"{path}[{row}]", _row(x[row], spec)


def _row(values: NDArray[np.generic], spec: InputSpec) -> Tensor | GuardError:
    """One array image, (H, W), (H, W, C) or (C, H, W), as (C, H, W) in [0, 1]."""
    if values.ndim == 2:
        values = values[None]
    elif values.ndim == 3 and values.shape != spec.shape and values.shape[2] in (1, 3):
        values = np.moveaxis(values, 2, 0)
    if values.dtype != np.uint8 and values.dtype.kind != "f":
        return InputError(f"expected uint8 0..255 or float 0..1, got {values.dtype}")
    image = torch.from_numpy(np.array(values, dtype=np.float32, order="C"))
    image = image / 255.0 if values.dtype == np.uint8 else image
    try:
        spec.check(image.unsqueeze(0))
    except GuardError as error:
        return error
    return image
