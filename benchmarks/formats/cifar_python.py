"""CIFAR's Python version: https://www.cs.toronto.edu/~kriz/cifar.html (pickles, read as data and never unpickled)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.formats.pickled_data import NotPlainDataError, read_pickled_data
from benchmarks.formats.raw_set import Archive, Labelled, RawSet, SetName, labelled, read_bytes
from guard.errors import InputError

_PIXELS = 3 * 32 * 32


_ARCHIVES: dict[str, tuple[Archive, str]] = {
    "cifar10": (Archive("cifar-10-batches-py", tuple(f"data_batch_{n}" for n in range(1, 6)), "test_batch"), "labels"),
    "cifar100": (Archive("cifar-100-python", ("train",), "test"), "fine_labels"),
}


def read_cifar_python(name: SetName, folder: Path) -> RawSet | None:
    """Read `cifar-10-batches-py` or `cifar-100-python`.

    Returns:
        None when there is no such folder.

    Raises:
        InputError: A file is missing, damaged, holds more than plain data, or is not this set's.
    """
    archive, labels = _ARCHIVES[name]
    return archive.read(name, folder, lambda path: _read(name, path, labels))


def _read(name: SetName, path: Path, key: str) -> Labelled:
    try:
        batch = read_pickled_data(read_bytes(path))
    except NotPlainDataError as error:
        raise InputError(
            f"expected a CIFAR batch, got {path}, which holds {error}: don't unpickle it, download it again"
        ) from error
    pixels, labels = batch.get("data"), batch.get(key)
    if not isinstance(pixels, np.ndarray) or pixels.ndim != 2 or pixels.shape[1] != _PIXELS:
        raise InputError(f"expected a CIFAR batch with data (N, {_PIXELS}), got none in {path}: download it again")
    if not isinstance(labels, list) or any(type(label) is not int for label in labels):
        raise InputError(f"expected a CIFAR batch with {key}, a list of whole numbers, got none in {path}: is it that set?")
    images = np.moveaxis(pixels.reshape(-1, 3, 32, 32), 1, 3)
    return labelled(name, images, np.array(labels), str(path))
