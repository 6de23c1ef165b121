"""An image set as its files hold it, before it is cut into parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final

import numpy as np
from numpy.typing import NDArray

from guard.errors import InputError

SetName = Literal["mnist", "fashion_mnist", "gtsrb", "cifar10", "cifar100"]


@final
@dataclass(frozen=True)
class Kind:
    """What every file of a set must hold.

    Attributes:
        shape: Of one image, (H, W) or (H, W, 3).
        num_classes: Labels are whole numbers below it.
    """

    shape: tuple[int, ...]
    num_classes: int


KINDS: dict[SetName, Kind] = {
    "mnist": Kind((28, 28), 10),
    "fashion_mnist": Kind((28, 28), 10),
    "gtsrb": Kind((32, 32, 3), 43),
    "cifar10": Kind((32, 32, 3), 10),
    "cifar100": Kind((32, 32, 3), 100),
}


@final
@dataclass(frozen=True)
class Labelled:
    """Images with labels; made by `labelled`, which checks them.

    Attributes:
        x: (N, H, W) or (N, H, W, 3), uint8.
        y: (N,), int64.
    """

    x: NDArray[np.uint8]
    y: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.y)

    def rows(self, chosen: NDArray[np.int64] | slice) -> Labelled:
        """Some of them."""
        return Labelled(self.x[chosen], self.y[chosen])


@final
@dataclass(frozen=True)
class RawSet:
    """A set as its files hold it.

    Attributes:
        name: Which.
        source: The file or folder, for messages.
        train: Training images, in the file's order.
        test: Test images, in the file's order.
        heldout: More training images, kept apart; only in our own CIFAR-10 file.
        tracks: (len(train),), int64: frames of one physical sign share a number within their class; only GTSRB's.
    """

    name: SetName
    source: str
    train: Labelled
    test: Labelled
    heldout: Labelled | None = None
    tracks: NDArray[np.int64] | None = None


def labelled(name: SetName, x: NDArray[np.generic], y: NDArray[np.generic], source: str) -> Labelled:
    """Check images and labels against what the set must hold.

    Args:
        name: Which set.
        x: (N, H, W) or (N, H, W, 3), uint8.
        y: (N,) or (N, 1), whole numbers.
        source: The file, for messages.

    Raises:
        InputError: Another type, shape or count, or labels out of range.
    """
    kind = KINDS[name]
    if x.dtype != np.uint8 or x.shape[1:] != kind.shape or len(x) == 0:
        shape = ", ".join(map(str, kind.shape))
        raise InputError(f"expected {name} images (N, {shape}), uint8, got {x.shape}, {x.dtype}, in {source}: is it that set?")
    if y.dtype.kind not in "iu" or y.shape not in ((len(x),), (len(x), 1)):
        raise InputError(f"expected {len(x)} whole-number labels, got {y.shape}, {y.dtype}, in {source}: get the file again")
    labels = y.reshape(-1).astype(np.int64)
    if labels.min() < 0 or labels.max() >= kind.num_classes:
        got, most = f"{labels.min()} to {labels.max()}", kind.num_classes - 1
        raise InputError(f"expected {name} labels 0 to {most}, got {got} in {source}: is it that set?")
    return Labelled(x.astype(np.uint8, copy=False), labels)


def joined(parts: Sequence[Labelled]) -> Labelled:
    """All of them, one after the other."""
    return Labelled(np.concatenate([part.x for part in parts]), np.concatenate([part.y for part in parts]))


def read_bytes(path: Path) -> bytes:
    """A file's bytes.

    Raises:
        InputError: It can't be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"expected {path}, got {error.strerror or 'none'}: unpack the whole archive again") from error


def official_folder(folder: Path, name: str) -> Path | None:
    """The unpacked archive of this name: in `folder`, or `folder` itself."""
    if (folder / name).is_dir():
        return folder / name
    return folder if folder.name == name and folder.is_dir() else None


@final
@dataclass(frozen=True)
class Archive:
    """An unpacked archive of training batches and a test batch.

    Attributes:
        folder: Its name.
        train: Files of the training batches, in order.
        test: File of the test batch.
    """

    folder: str
    train: tuple[str, ...]
    test: str

    def read(self, name: SetName, folder: Path, read: Callable[[Path], Labelled]) -> RawSet | None:
        """Read all batches; None when there is no such archive in `folder`."""
        place = official_folder(folder, self.folder)
        if place is None:
            return None
        return RawSet(name, self.folder, joined([read(place / batch) for batch in self.train]), read(place / self.test))
