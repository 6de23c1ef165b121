"""Image sets on disk, cut into three parts that never mix.

*attacker* trains the victim, *defender* gives overlays and thresholds, *evaluation* gives every reported figure. MNIST:
the first 50,000 of train, the last 10,000, the test set. GTSRB: train, 5,000 of test, the other 7,630; which 5,000 is
committed in `splits/gtsrb_defender.json`.
"""

from __future__ import annotations

import io
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from calibration.data import ImageSet
from guard.arrays import read_arrays
from guard.errors import InputError

SetName = Literal["mnist", "gtsrb"]
FILES: dict[SetName, str] = {"mnist": "mnist.npz", "gtsrb": "gtsrb.webp.npz"}
DEFAULT_FOLDER = Path(__file__).parent.parent.parent / "shared" / "data"

_SPLITS = Path(__file__).parent / "splits"
_SPLIT_SEED = 2026


@dataclass(frozen=True)
class Parts:
    """One image set in its three parts, each with labels."""

    attacker: ImageSet
    defender: ImageSet
    evaluation: ImageSet
    num_classes: int


def load_parts(name: SetName, folder: Path = DEFAULT_FOLDER) -> Parts:
    """Load a set.

    Args:
        name: Which.
        folder: Where its file lies.

    Raises:
        InputError: The file is not there.
    """
    path = folder / FILES[name]
    if not path.is_file():
        raise InputError(f"expected {FILES[name]} in {folder}, got none: pass the folder that holds it with --data")
    arrays = _decode(read_arrays(path))
    train = _images(arrays["x_train"], arrays["y_train"])
    test = _images(arrays["x_test"], arrays["y_test"])
    if name == "mnist":
        return Parts(train.select(torch.arange(50_000)), train.select(torch.arange(50_000, 60_000)), test, 10)
    rows = gtsrb_defender_rows()
    rest = torch.ones(len(test), dtype=torch.bool)
    rest[rows] = False
    return Parts(train, test.select(rows), test.select(torch.nonzero(rest).squeeze(1)), 43)


def gtsrb_defender_rows() -> Tensor:
    """(5000,), int64, indices into GTSRB's test set, as committed."""
    return torch.tensor(json.loads((_SPLITS / "gtsrb_defender.json").read_text(encoding="utf-8")))


def draw_gtsrb_defender_rows() -> list[int]:
    """How the committed indices were drawn."""
    return sorted(np.random.default_rng(_SPLIT_SEED).permutation(12_630)[:5_000].tolist())


def _images(x: NDArray[np.generic], y: NDArray[np.generic]) -> ImageSet:
    pixels = x[:, None] if x.ndim == 3 else np.moveaxis(x, 3, 1)
    return ImageSet(torch.from_numpy(np.array(pixels, dtype=np.uint8, order="C")), torch.from_numpy(y.astype(np.int64)))


def _decode(arrays: dict[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
    """Arrays kept as lossless WebP strips, `NAME_webp` with offsets and shape, as plain arrays."""
    decoded = {name: array for name, array in arrays.items() if not name.endswith(("_webp", "_offsets", "_shape"))}
    for key in (name for name in arrays if name.endswith("_webp")):
        name = key.removesuffix("_webp")
        shape = tuple(int(size) for size in arrays[f"{name}_shape"])
        offsets = [int(offset) for offset in arrays[f"{name}_offsets"]]
        data = arrays[key].tobytes()
        strips = [
            np.asarray(Image.open(io.BytesIO(data[start:end])).convert("RGB")).reshape(-1, *shape[1:])
            for start, end in itertools.pairwise(offsets)
        ]
        decoded[name] = np.concatenate(strips)
    return decoded


if __name__ == "__main__":
    _SPLITS.mkdir(exist_ok=True)
    (_SPLITS / "gtsrb_defender.json").write_text(json.dumps(draw_gtsrb_defender_rows()) + "\n", encoding="utf-8")
