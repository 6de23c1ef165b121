"""Images that a command is given: files, folders and `.npz`, in batches, the bad ones with their error."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from torch import Tensor

from guard import GuardError, InputError, InputSpec, Limits, decode_image
from guard.arrays import load_arrays
from guard.files import as_text, list_images, printable


def read_images(paths: list[Path], spec: InputSpec, limits: Limits) -> Iterator[tuple[str, Tensor | GuardError]]:
    """Each image with its name as text, or the reason why it can't be read.

    Args:
        paths: Image files, folders (searched for images), or `.npz` with `x`.
        spec: The model's input.
        limits: Of one encoded image.
    """
    for path in paths:
        if path.is_dir():
            yield from _folder(path, spec, limits)
        elif path.suffix.lower() == ".npz":
            yield from _arrays(path, spec)
        else:
            yield as_text(path), _decode(path, spec, limits)


def tell_skipped(skipped: Iterable[tuple[str, str]]) -> None:
    """Name, on stderr, the files that could not be read, a line each."""
    for name, reason in skipped:
        typer.echo(printable(f"skipped {name}: {reason}"), err=True)


def tell_resized(resized: int, total: int, spec: InputSpec) -> None:
    """Say, on stderr, that images were brought to the model's size, where serving does not do so.

    Args:
        resized: How many.
        total: Of how many.
        spec: The profile's.
    """
    if resized and not spec.resize:
        typer.echo(
            f"{resized} of {total} images were of another size than {spec.width}x{spec.height} and were resized: serving and "
            "guard check refuse such images unless calibrated with --resize",
            err=True,
        )


def _folder(path: Path, spec: InputSpec, limits: Limits) -> Iterator[tuple[str, Tensor | GuardError]]:
    try:
        files = list_images(path, deep=True)
    except OSError as error:
        yield as_text(path), InputError(f"expected a folder that can be read, got {error.filename}: {error.strerror}")
        return
    if not files:
        yield as_text(path), InputError(f"expected images in {path}, got none")
    for file in files:
        yield as_text(file), _decode(file, spec, limits)


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
        yield as_text(path), error
        return
    if x.ndim == 0 or len(x) == 0:
        yield as_text(path), InputError(f"expected images in x, got none in {path.name}, of shape {x.shape}: save some")
        return
    for row in range(len(x)):
        yield f"{as_text(path)}[{row}]", _row(x[row], spec)


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
