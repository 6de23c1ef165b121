"""CIFAR's binary version: https://www.cs.toronto.edu/~kriz/cifar.html (label bytes, then 3072 of pixels, again and again)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.formats.raw_set import Archive, Labelled, RawSet, SetName, labelled, read_bytes
from guard.errors import InputError

_PIXELS = 3 * 32 * 32


_ARCHIVES: dict[str, tuple[Archive, int]] = {
    "cifar10": (Archive("cifar-10-batches-bin", tuple(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"), 1),
    "cifar100": (Archive("cifar-100-binary", ("train.bin",), "test.bin"), 2),
}
"""CIFAR-100 has two label bytes, the coarse class and then the fine one, which is ours."""


def read_cifar_binary(name: SetName, folder: Path) -> RawSet | None:
    """Read `cifar-10-batches-bin` or `cifar-100-binary`.

    Returns:
        None when there is no such folder.

    Raises:
        InputError: A file is missing, damaged, or not this set's.
    """
    archive, label_bytes = _ARCHIVES[name]
    return archive.read(name, folder, lambda path: _read(name, path, label_bytes))


def _read(name: SetName, path: Path, label_bytes: int) -> Labelled:
    data = np.frombuffer(read_bytes(path), np.uint8)
    size = label_bytes + _PIXELS
    if len(data) == 0 or len(data) % size:
        raise InputError(f"expected records of {size} bytes, got {len(data)} bytes in {path}: unpack the archive again")
    records = data.reshape(-1, size)
    images = np.moveaxis(records[:, label_bytes:].reshape(-1, 3, 32, 32), 1, 3)
    return labelled(name, images, records[:, label_bytes - 1], str(path))
