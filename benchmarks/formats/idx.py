"""IDX, the format of MNIST and Fashion-MNIST: http://yann.lecun.com/exdb/mnist/ (big-endian, a magic number, then sizes)."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.formats.raw_set import Labelled, RawSet, SetName, labelled, read_bytes
from guard.errors import InputError

_FOLDERS: dict[str, tuple[str, ...]] = {
    "mnist": ("mnist", "MNIST/raw", "MNIST", "."),
    "fashion_mnist": ("fashion_mnist", "fashion-mnist", "FashionMNIST/raw", "FashionMNIST", "."),
}
"""Both sets use the same file names: a folder of the set's own name is looked at first."""

_UNSIGNED_BYTE = 8


def read_idx(name: SetName, folder: Path) -> RawSet | None:
    """Read the four files, plain or `.gz`.

    Returns:
        None when there is none of the four.

    Raises:
        InputError: Some of the four are missing, damaged, or not this set's.
    """
    for each in _FOLDERS[name]:
        place = folder / each
        if any(_find(place, part, what) for part in ("train", "t10k") for what in ("images", "labels")):
            return RawSet(name, str(place), _read_part(name, place, "train"), _read_part(name, place, "t10k"))
    return None


def _read_part(name: SetName, place: Path, part: str) -> Labelled:
    arrays = []
    for what, axes in (("images", 3), ("labels", 1)):
        path = _find(place, part, what)
        if path is None:
            raise InputError(
                f"expected {part}-{what}-idx{axes}-ubyte beside the others, got none in {place}: download all four"
            )
        arrays.append(_read(path, axes))
    return labelled(name, arrays[0], arrays[1], f"{place}/{part}-*")


def _find(place: Path, part: str, what: str) -> Path | None:
    axes = {"images": 3, "labels": 1}[what]
    names = [f"{part}-{what}{mark}idx{axes}-ubyte{end}" for mark in "-." for end in ("", ".gz")]
    return next((place / name for name in names if (place / name).is_file()), None)


def _read(path: Path, axes: int) -> NDArray[np.uint8]:
    data = read_bytes(path)
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"expected gzip, got {path}, which is damaged: download it again") from error
    start = 4 + 4 * axes
    magic = bytes((0, 0, _UNSIGNED_BYTE, axes))
    if len(data) < start or not data.startswith(magic):
        raise InputError(
            f"expected IDX of {axes} axes ({magic.hex()}), got {data[:4].hex() or 'nothing'} in {path}: download it again"
        )
    shape = np.frombuffer(data, ">u4", axes, 4).tolist()
    if math.prod(shape) != len(data) - start:
        raise InputError(
            f"expected {math.prod(shape)} bytes after the header, got {len(data) - start} in {path}: download it again"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
