"""Labelled images from disk: a folder in the ImageFolder convention, or an `.npz` with `x` and `y`."""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from guard.arrays import load_arrays
from guard.decoding import FORMATS, SUFFIXES, Limits, decode_image
from guard.errors import CalibrationError, InputError, WrongSizeError
from guard.files import as_text, is_text, list_images
from guard.images import InputSpec

_MOST_LABELS = 2**31
_AT_ONCE = 256  # images
_SLACK = 1e-6  # of float pixels, whose last bits depend on who divided them
_LIMITS = Limits(max_bytes=100 * 1024**2, max_pixels=100_000_000)

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much is done, and of how much."""

_GREY = ("1", "L", "I;16", "I;16B", "I;16L")


def no_progress(what: str, done: int, total: int) -> None:
    """Show nothing."""


@final
@dataclass(frozen=True)
class ImageSet:
    """Images with their labels.

    Attributes:
        pixels: (N, C, H, W), uint8 in 0..255 or float32 in [0, 1].
        labels: (N,), int64; None when unknown.
        class_names: In label order; empty when unknown.
        names: One per image, for reports; empty when there are none.
        skipped: Files that could not be read, each with the reason.
        resized: How many images were of another size, which serving refuses unless it resizes, too.
    """

    pixels: Tensor
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    resized: int = 0

    def __len__(self) -> int:
        return int(self.pixels.shape[0])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        _, channels, height, width = self.pixels.shape
        return (channels, height, width)

    @property
    def known_labels(self) -> Tensor:
        """(N,), int64.

        Raises:
            InputError: There are no labels.
        """
        if self.labels is None:
            raise InputError("expected labels with these images, got none: add y to the .npz, or class folders")
        return self.labels

    def images(self, rows: Tensor | slice) -> Tensor:
        """Some images as (B, C, H, W), float32, in [0, 1]."""
        chosen = self.pixels[rows]
        return chosen.to(torch.float32) / 255.0 if chosen.dtype == torch.uint8 else chosen

    def select(self, rows: Tensor) -> ImageSet:
        """The images at these indices, as a set of their own."""
        labels = None if self.labels is None else self.labels[rows]
        names = tuple(self.names[row] for row in rows.tolist()) if self.names else ()
        return ImageSet(self.pixels[rows], labels, self.class_names, names)

    def distinct(self) -> ImageSet:
        """The set, with equal images once."""
        rows = distinct_rows(self._digests)
        return self if len(rows) == len(self) else replace(self.select(torch.tensor(rows)), skipped=self.skipped)

    def among(self, known: Collection[str]) -> Tensor:
        """(N,), bool: which images have one of these `digests`."""
        if not known:
            return torch.zeros(len(self), dtype=torch.bool)
        return torch.tensor([item in known for item in self._digests], dtype=torch.bool)

    @functools.cached_property
    def _digests(self) -> list[str]:
        parts = torch.arange(len(self)).split(_AT_ONCE)
        return [item for part in parts for item in digests(self.images(part))]


def distinct_rows(known: Sequence[str]) -> list[int]:
    """Of equal `digests` the first, in order: an image that is held out must not have been learnt from."""
    return sorted({digest: row for row, digest in reversed(list(enumerate(known)))}.values())


def digests(images: Tensor) -> list[str]:
    """What equal images have in common, and others have not: one (hex) for each.

    Pixels count to 1/65535: an image in bytes equals the same one as numbers, whose last bit depends on who divided it.

    Args:
        images: (N, C, H, W), float32, in [0, 1].
    """
    return [hashlib.sha256(image.mul(65535.0).round().to(torch.int32).numpy().tobytes()).hexdigest()[:32] for image in images]


def load_images(
    path: str | Path,
    shape: tuple[int, int, int] | None = None,
    *,
    skip_unreadable: bool = False,
    progress: Progress = no_progress,
) -> ImageSet:
    """Load images and labels.

    Args:
        path: A folder of images, or of one sub-folder per class in label order of their sorted names (ImageFolder); or
            an `.npz` with `x`, uint8 or float in [0, 1], (N, H, W), (N, H, W, C) or (N, C, H, W), and labels `y` (N,).
        shape: (C, H, W) to bring images of a folder to; None takes the files' own size, which must then be the same.
        skip_unreadable: Leave out files that are no images, and list them, instead of refusing.
        progress: Told about each file.

    Raises:
        CalibrationError: Nothing there, or unreadable files and no leave to skip them.
        InputError: Arrays of another shape, type or range.
    """
    source = Path(path)
    if source.is_dir():
        return _load_folder(source, shape, skip_unreadable, progress)
    if not source.is_file():
        raise CalibrationError(f"expected a folder of images or an .npz, got {source}: no such file or folder")
    if source.suffix.lower() != ".npz":
        raise CalibrationError(f"expected a folder of images or an .npz with x and y, got {source.name}")
    loaded = load_npz(source)
    if shape is not None and loaded.shape != shape:
        raise InputError(f"expected images of shape {shape}, got {loaded.shape} in {source.name}: resize them first")
    return loaded


def load_npz(path: Path) -> ImageSet:
    """Load `x` and, where there is one, `y` from an `.npz`; nothing is unpickled.

    Raises:
        InputError: Damaged, or arrays of another shape, type or range.
    """
    arrays = load_arrays(path)
    names = _to_names(arrays["class_names"], path.name) if "class_names" in arrays else ()
    pixels = _to_pixels(arrays["x"], path.name)
    labels = _to_labels(arrays["y"], len(pixels), path.name) if "y" in arrays else None
    if names and labels is not None and int(labels.max()) >= len(names):
        raise InputError(f"expected class_names for all labels up to {int(labels.max())}, got {len(names)} in {path.name}")
    return ImageSet(pixels, labels, names)


def _to_pixels(x: NDArray[np.generic], name: str) -> Tensor:
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[3] in (1, 3):
        x = np.moveaxis(x, 3, 1)
    elif x.ndim != 4 or x.shape[1] not in (1, 3):
        raise InputError(f"expected x of shape (N, H, W), (N, H, W, C) or (N, C, H, W) with C 1 or 3, got {x.shape} in {name}")
    if x.size == 0:
        raise CalibrationError(f"expected images, got an empty x, {x.shape}, in {name}")
    if x.dtype == np.uint8:
        return torch.from_numpy(np.array(x, dtype=np.uint8, order="C"))
    if x.dtype.kind != "f":
        raise InputError(f"expected x as uint8 0..255 or float 0..1, got {x.dtype} in {name}: convert it")
    values = np.array(x, dtype=np.float32, order="C")
    bad = np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(axis=1))
    if len(bad):
        shown = ", ".join(map(str, bad[:5])) + (" ..." if len(bad) > 5 else "")
        raise InputError(f"expected finite pixels, got NaN or Inf in {len(bad)} images of {name} (rows {shown}): drop them")
    if values.min() < -_SLACK or values.max() > 1.0 + _SLACK:
        got = f"{values.min():.7g} to {values.max():.7g}"
        raise InputError(f"expected float pixels in [0, 1], got {got} in {name}: divide by what white is, 255 of bytes")
    return torch.from_numpy(values.clip(0.0, 1.0, out=values))


def _to_labels(y: NDArray[np.generic], count: int, name: str) -> Tensor:
    if y.shape not in ((count,), (count, 1)) or y.dtype.kind not in "iuf":
        raise InputError(f"expected {count} whole-number labels y, got {y.dtype} of shape {y.shape} in {name}")
    labels = y.reshape(-1).astype(np.float64)
    if not ((labels == np.round(labels)) & (labels >= 0) & (labels < _MOST_LABELS)).all():
        raise InputError(f"expected labels y as whole numbers from 0, got others in {name}")
    return torch.from_numpy(labels.astype(np.int64))


def _to_names(values: NDArray[np.generic], name: str) -> tuple[str, ...]:
    try:
        names = tuple(item.decode() if isinstance(item, bytes) else str(item) for item in values.reshape(-1).tolist())
        "".join(names).encode()
    except UnicodeError as error:
        raise InputError(f"expected class_names in UTF-8, got other bytes in {name}: save them as str") from error
    return names


def _load_folder(folder: Path, shape: tuple[int, int, int] | None, skip: bool, progress: Progress) -> ImageSet:
    classes, files = _list_folder(folder)
    spec = _common_spec([path for path, _ in files], shape)
    pixels, labels, names, skipped, resized = [], [], [], [], 0
    for done, (path, label) in enumerate(files, start=1):
        name = as_text(path.relative_to(folder))
        try:
            image, fits = _decode(path, spec)
        except (InputError, OSError) as error:
            skipped.append((name, as_text(str(error))))
        else:
            pixels.append(image)
            labels.append(label)
            names.append(name)
            resized += not fits
        progress("reading images", done, len(files))
    if skipped and (not skip or not pixels):
        first, reason = skipped[0]
        raise CalibrationError(
            f"{len(skipped)} of {len(files)} files can't be read, first {first}: {reason}; mend them or pass --skip-unreadable"
        )
    stacked = torch.stack(pixels)
    whole = stacked.mul(255.0).round()
    exact = bool(((whole / 255.0) - stacked).abs().max() < 1e-6)
    return ImageSet(
        whole.to(torch.uint8) if exact else stacked,
        torch.tensor(labels) if classes else None,
        tuple(item.name for item in classes),
        tuple(names),
        tuple(skipped),
        resized,
    )


def _list_folder(folder: Path) -> tuple[list[Path], list[tuple[Path, int]]]:
    """Class folders, none where images are without classes, and image files, each with its label, -1 where it has none."""
    try:
        classes = sorted(item for item in folder.iterdir() if item.is_dir() and not item.name.startswith("."))
        files = [(path, label) for label, item in enumerate(classes) for path in list_images(item, deep=True)]
        loose = list_images(folder)
    except OSError as error:
        raise CalibrationError(f"expected a folder that can be read, got {error.filename}: {error.strerror}") from error
    if files and loose:
        raise CalibrationError(
            f"expected images in class folders only, got {len(loose)} beside them in {folder}, first {loose[0].name}: move them"
        )
    if not files and not loose:
        raise CalibrationError(f"expected images ({', '.join(SUFFIXES)}) in {folder} or its class folders, got none")
    if not files:
        return [], [(path, -1) for path in loose]
    seen: dict[Path, int] = {}
    for path, label in files:
        other = seen.setdefault(path.resolve(), label)
        if other != label:
            raise CalibrationError(
                f"expected images of one class each, got {as_text(path)} in {classes[other].name}, too, by a link: remove it"
            )
    odd = next((item.name for item in classes if not is_text(item.name)), None)
    if odd is not None:
        raise CalibrationError(f"expected class folders with names in UTF-8, got {as_text(odd)}: rename it")
    return classes, files


def _decode(path: Path, spec: InputSpec) -> tuple[Tensor, bool]:
    """An image, (C, H, W), and whether it was of that size."""
    data = path.read_bytes()
    try:
        return decode_image(data, msgspec.structs.replace(spec, resize=False), _LIMITS), True
    except WrongSizeError:
        if not spec.resize:
            raise
        return decode_image(data, spec, _LIMITS), False


def _common_spec(files: Sequence[Path], shape: tuple[int, int, int] | None) -> InputSpec:
    """The size to decode to: the one asked for, or the files' own."""
    if shape is not None:
        return InputSpec(channels=shape[0], height=shape[1], width=shape[2], resize=True)
    sizes: Counter[tuple[int, int]] = Counter()
    grey = True
    for path in files:
        try:
            with Image.open(path, formats=FORMATS) as image:
                sizes[image.size] += 1
                grey = grey and image.mode in _GREY
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            continue  # named when it is decoded
    if len(sizes) > 1:
        (width, height), _ = sizes.most_common(1)[0]
        raise InputError(
            f"expected images of one size, got {len(sizes)} sizes: say what the model takes, e.g. --shape 3,{height},{width}"
        )
    (width, height) = next(iter(sizes), (1, 1))
    return InputSpec(channels=1 if grey else 3, height=height, width=width)
