"""Plain arrays from an `.npz`, without unpickling."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from guard.errors import InputError


def load_arrays(path: Path) -> dict[str, NDArray[np.generic]]:
    """Read an `.npz` of images: like `read_arrays`, with at least an `x`.

    Raises:
        InputError: As there, or no `x`.
    """
    arrays = read_arrays(path)
    if "x" not in arrays:
        found = ", ".join(arrays) or "nothing"
        raise InputError(f"expected arrays x and y in {path.name}, got {found}: save with np.savez(path, x=..., y=...)")
    return arrays


def read_arrays(path: Path) -> dict[str, NDArray[np.generic]]:
    """Read every array of an `.npz`, by name.

    Raises:
        InputError: Not there, damaged, or holds Python objects.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: np.asarray(archive[name]) for name in archive.files}
    except OSError as error:
        raise InputError(f"expected an .npz, got {path}: {error.strerror or 'not one'}") from error
    except Exception as error:  # NumPy's and the archive's readers raise whatever they stumble over, MemoryError among it
        raise InputError(f"expected an .npz of plain arrays, got {path.name}, which does not load: save it again") from error
