"""`.npz` with x_train, y_train, x_test and y_test, images plain or as lossless WebP strips."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.formats.raw_set import RawSet, SetName, labelled
from guard.arrays import read_arrays
from guard.errors import InputError

_NEEDED = ("x_train", "y_train", "x_test", "y_test")


def read_npz(name: SetName, folder: Path) -> RawSet | None:
    """Read `NAME.npz` or `NAME.webp.npz`.

    Returns:
        None when there is neither.

    Raises:
        InputError: Damaged, arrays missing, or not this set's.
    """
    path = next((path for path in (folder / f"{name}.npz", folder / f"{name}.webp.npz") if path.is_file()), None)
    if path is None:
        return None
    arrays = _decode(read_arrays(path), path.name)
    if missing := [key for key in _NEEDED if key not in arrays]:
        found = ", ".join(arrays) or "nothing"
        raise InputError(f"expected arrays {', '.join(_NEEDED)} in {path.name}, got {found}: add {', '.join(missing)}")
    train = labelled(name, arrays["x_train"], arrays["y_train"], path.name)
    test = labelled(name, arrays["x_test"], arrays["y_test"], path.name)
    heldout = None
    if "x_heldout" in arrays and "y_heldout" in arrays:
        heldout = labelled(name, arrays["x_heldout"], arrays["y_heldout"], path.name)
    tracks = arrays.get("track_train")
    if tracks is None:
        return RawSet(name, path.name, train, test, heldout)
    if tracks.shape != (len(train),) or tracks.dtype.kind not in "iu":
        raise InputError(
            f"expected {len(train)} whole numbers as track_train, got {tracks.shape}, {tracks.dtype}, in {path.name}"
        )
    return RawSet(name, path.name, train, test, heldout, tracks.astype(np.int64))


def write_npz(raw: RawSet, folder: Path) -> Path:
    """Write `NAME.npz`, whole or not at all.

    Raises:
        InputError: The folder can't be written.
    """
    path, part = folder / f"{raw.name}.npz", folder / f"{raw.name}.npz.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            np.savez_compressed(
                file,
                x_train=raw.train.x,
                y_train=raw.train.y.astype(np.uint8),
                x_test=raw.test.x,
                y_test=raw.test.y.astype(np.uint8),
            )
        part.replace(path)
    except OSError as error:
        raise InputError(f"expected to write {path}, got {error.strerror or error}: pass another folder with --data") from error
    return path


def _decode(arrays: dict[str, NDArray[np.generic]], source: str) -> dict[str, NDArray[np.generic]]:
    """Arrays kept as lossless WebP strips, `NAME_webp` with offsets and shape, as plain arrays."""
    decoded = {name: array for name, array in arrays.items() if not name.endswith(("_webp", "_offsets", "_shape"))}
    for key in (name for name in arrays if name.endswith("_webp")):
        name = key.removesuffix("_webp")
        try:
            decoded[name] = _unpack(arrays[key], arrays[f"{name}_offsets"], arrays[f"{name}_shape"])
        except (KeyError, ValueError, TypeError, OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(
                f"expected {key} as WebP strips with offsets and shape in {source}, got others: get it again"
            ) from error
    return decoded


def _unpack(strips: NDArray[np.generic], offsets: NDArray[np.generic], sizes: NDArray[np.generic]) -> NDArray[np.uint8]:
    shape = tuple(int(size) for size in sizes)
    data = strips.tobytes()
    images = [
        np.asarray(Image.open(io.BytesIO(data[start:end])).convert("RGB")).reshape(-1, *shape[1:])
        for start, end in itertools.pairwise(int(offset) for offset in offsets)
    ]
    return np.concatenate(images)
