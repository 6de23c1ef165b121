"""A bounded folder of rejected images.

Each item is a picture (`ID.png`, or `ID.npy` where PNG would lose precision) and `ID.json`, which is written last: an
item exists when its JSON does. Writes are atomic, ids sort by time, and the oldest items leave first when the folder is
over its bounds. An id ends in the first digits of its picture's digest, by which an image that is sent again is found. Several
processes may share a folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import re
import threading
import time
from pathlib import Path
from typing import final

import msgspec
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from guard.errors import UNREADABLE, QuarantineError
from guard.folders import write_whole

logger = logging.getLogger("guard.quarantine")
_ID = re.compile(r"[0-9]{19}-[0-9a-f]{8}")
_DIGITS = 8  # of a picture's SHA-256, in its id
_MODE = 0o600  # they are clients' images
_CHANNELS = (1, 3)  # of what PNG holds here
_TRIES = 3
_SPARE = 100  # a hundredth of the bounds is made free at once


class Item(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is known of a quarantined image.

    Attributes:
        id: Sorts by time.
        time: Seconds since the epoch.
        image: File name of the picture, in the same folder.
        detector: What fired.
        score: Its score.
        threshold: The threshold at that time.
        label_index: What the model would have answered.
        label: That class's name.
    """

    id: str
    time: float
    image: str
    detector: str
    score: float
    threshold: float
    label_index: int | None
    label: str | None


@final
class Quarantine:
    """A folder of rejected images, bounded by count and bytes. Of equal images it holds one, the first.

    Args:
        folder: Made on the first write, for its user alone.
        max_items: Items kept. Where several processes write, each may go over the bounds by a hundredth.
        max_bytes: Bytes kept, pictures and JSON together.
    """

    def __init__(self, folder: str | Path, max_items: int = 10_000, max_bytes: int = 1024**3) -> None:
        if max_items < 1 or max_bytes < 1:
            raise QuarantineError(f"expected positive bounds, got {max_items} items and {max_bytes} bytes")
        self.folder = Path(folder)
        self.max_items = max_items
        self.max_bytes = max_bytes
        self.failures = 0
        self._newest = 0  # nanoseconds, of ids
        self._known: dict[str, list[str]] = {}  # ids by their digests, as of when the folder was looked through
        self._items_left, self._bytes_left = 0, 0  # until the folder is looked through again
        self._lock = threading.Lock()

    def add(
        self,
        image: Tensor,
        *,
        detector: str,
        score: float,
        threshold: float,
        label_index: int | None = None,
        label: str | None = None,
    ) -> str | None:
        """Store one image; never raises on a full or read-only disk, because requests must still be answered.

        Args:
            image: (C, H, W), float32, in [0, 1].
            detector: What fired.
            score: Its score.
            threshold: The threshold that the score reached.
            label_index: What the model would have answered.
            label: That class's name.

        Returns:
            The item's id, where an equal image is there already that one's, or None when it could not be stored; then
            `failures` has grown and the log says why.
        """
        data, suffix = _encode(image)
        digest = hashlib.sha256(data).hexdigest()[:_DIGITS]
        for left in reversed(range(_TRIES)):
            with self._lock:
                now = time.time_ns()
                name = f"{self._next(now):019d}-{digest}"
                same = self._same(digest, suffix, data)
                if same is not None:
                    return same
                item = Item(
                    id=name, time=now / 1e9, image=name + suffix, detector=detector, score=score, threshold=threshold,
                    label_index=label_index, label=label,
                )  # fmt: skip
                try:
                    self._put(item, data)
                    return name
                except (OSError, QuarantineError) as error:
                    self._discard(name)
                    if isinstance(error, FileNotFoundError) and left:
                        continue  # a busier process took it for the oldest, half written
                    self.failures += 1
                    logger.warning(
                        "quarantine: could not store an image (%s); %d so far",
                        error.strerror if isinstance(error, OSError) and error.strerror else error,
                        self.failures,
                    )
                    return None
        return None

    def _put(self, item: Item, data: bytes) -> None:
        record = msgspec.json.format(msgspec.json.encode(item), indent=1)
        if len(data) + len(record) > self.max_bytes:
            raise OSError(f"item of {len(data) + len(record)} bytes is over the folder's bound of {self.max_bytes}")
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_whole(self.folder / item.image, data, _MODE)
        write_whole(self._record(item.id), record, _MODE)
        self._known.setdefault(item.id[-_DIGITS:], []).append(item.id)
        self._items_left -= 1
        self._bytes_left -= len(data) + len(record)
        if self._items_left < 0 or self._bytes_left < 0:
            self._evict()

    def _same(self, digest: str, suffix: str, data: bytes) -> str | None:
        """The item of this very picture: others may have the same few digits, by chance or by design."""
        for stem in self._known.get(digest, ()):
            with contextlib.suppress(OSError):  # evicted, released or deleted meanwhile
                if self._record(stem).is_file() and (self.folder / (stem + suffix)).read_bytes() == data:
                    return stem
        return None

    def _next(self, now: int) -> int:
        """An id's time: after all others, also where the clock was set back, for the oldest go first."""
        if not self._newest:
            with contextlib.suppress(OSError):  # no folder yet, or none that can be read: storing says so
                self._newest = max((int(stem.partition("-")[0]) for stem in self._sizes()), default=0)
        self._newest = max(now, self._newest + 1)
        return self._newest

    def items(self) -> list[Item]:
        """All items, oldest first; records that can't be read are left out."""
        found = []
        for path in sorted(self.folder.glob("*.json")):
            try:
                if _ID.fullmatch(path.stem):
                    found.append(self._read(path))
            except (OSError, QuarantineError) as error:
                logger.warning("quarantine: skipped %s (%s)", path.name, error)
        return found

    def get(self, item_id: str) -> Item:
        """One item by id.

        Raises:
            QuarantineError: There is none, or its record is damaged.
        """
        path = self._record(item_id)
        if not path.is_file():
            raise QuarantineError(f"expected the id of an item in {self.folder}, got {item_id}: see guard quarantine list")
        return self._read(path)

    def image(self, item: Item) -> Tensor:
        """An item's picture, (C, H, W), float32, in [0, 1].

        Raises:
            QuarantineError: It is missing or damaged.
        """
        path = self.folder / item.image
        try:
            if path.suffix == ".npy":
                return torch.from_numpy(np.load(path, allow_pickle=False))
            with Image.open(path, formats=("PNG",)) as picture:
                pixels = np.asarray(picture, dtype=np.float32) / np.float32(255.0)
        except Exception as error:  # readers raise whatever they stumble over
            raise QuarantineError(f"expected a picture in {path}, got one that can't be read: delete the item") from error
        return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1).contiguous()

    def delete(self, item_id: str) -> None:
        """Remove one item.

        Raises:
            QuarantineError: There is no such item, or it can't be removed.
        """
        self.get(item_id)
        self._forget(item_id)

    def release(self, item_id: str, folder: Path) -> Path:
        """Move one item's picture into a folder, and forget the item.

        What readers of image folders take is PNG: an image kept as numbers, such as one that was resized, is rounded to the
        nearest 1/255.

        Returns:
            Where the picture lies now.

        Raises:
            QuarantineError: There is no such item, no PNG can hold it, or the folder can't be written, or is the quarantine's.
        """
        item = self.get(item_id)
        if folder.exists() and folder.samefile(self.folder):
            raise QuarantineError(
                f"expected a folder outside the quarantine, got {folder}, the quarantine itself: pick another"
            )
        target = folder / f"{item.id}.png"
        try:
            data = (self.folder / item.image).read_bytes() if item.image == target.name else self._rounded(item)
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(target, data)
        except OSError as error:
            raise QuarantineError(f"could not move {item_id} to {folder}: {error.strerror or error}") from error
        self._forget(item_id)
        return target

    def _rounded(self, item: Item) -> bytes:
        """An image that is kept as numbers, as PNG.

        Raises:
            QuarantineError: It can't be read, or is not 1 or 3 channels of pixels in [0, 1].
        """
        image = self.image(item)
        if image.ndim != 3 or image.shape[0] not in _CHANNELS or 0 in image.shape:
            problem = f"1 or 3 channels, got shape {tuple(image.shape)}"
        elif not bool(((image >= 0.0) & (image <= 1.0)).all()):  # NaN is neither
            problem = "pixels in [0, 1], got others"
        else:
            return _png(image.mul(255.0).round())
        raise QuarantineError(
            f"expected {problem}, in {item.image}: no PNG holds it; np.load reads the file, guard quarantine delete forgets it"
        )

    def _record(self, item_id: str) -> Path:
        if not _ID.fullmatch(item_id):
            raise QuarantineError(f"expected an item's id like {time.time_ns()}-0a1b2c3d, got {item_id!r}")
        return self.folder / f"{item_id}.json"

    def _read(self, path: Path) -> Item:
        try:
            item = msgspec.json.decode(path.read_bytes(), type=Item)
        except UNREADABLE as error:
            raise QuarantineError(f"expected an item's record in {path}, got a damaged one ({error})") from error
        except OSError as error:
            raise QuarantineError(f"could not read {path}: {error.strerror or error}") from error
        if item.id != path.stem or item.image not in (f"{item.id}.png", f"{item.id}.npy"):
            raise QuarantineError(f"expected the record of {path.stem} in {path}, got that of {item.id}: delete it")
        return item

    def _forget(self, item_id: str) -> None:
        self._discard(item_id)
        if self._record(item_id).exists():
            raise QuarantineError(f"could not remove {item_id} from {self.folder}: is the folder read-only?")

    def _discard(self, item_id: str) -> None:
        files = [item_id + suffix for suffix in (".json", ".png", ".npy")]
        for name in (*files, *(f".{file}.part" for file in files)):  # parts are what a crash left
            try:
                (self.folder / name).unlink(missing_ok=True)
            except OSError:
                continue

    def _sizes(self) -> dict[str, int]:
        """Bytes of each item, by its id; what another process removes meanwhile counts as gone."""
        sizes: dict[str, int] = {}
        with os.scandir(self.folder) as entries:
            for entry in entries:
                stem = entry.name.removeprefix(".").partition(".")[0]
                if _ID.fullmatch(stem):
                    try:
                        sizes[stem] = sizes.get(stem, 0) + entry.stat().st_size
                    except FileNotFoundError:
                        continue
        self._known = {}
        for stem in sizes:
            self._known.setdefault(stem[-_DIGITS:], []).append(stem)
        return sizes

    def _evict(self) -> None:
        """Oldest out first, until both bounds hold, and a hundredth more: so that not every item costs a look at all."""
        sizes = self._sizes()
        count, total = len(sizes), sum(sizes.values())
        self._items_left, self._bytes_left = self.max_items // _SPARE, self.max_bytes // _SPARE
        for stem in sorted(sizes):
            if count <= self.max_items - self._items_left and total <= self.max_bytes - self._bytes_left:
                return
            self._discard(stem)
            count, total = count - 1, total - sizes[stem]


def _encode(image: Tensor) -> tuple[bytes, str]:
    """PNG where that is exact, `.npy` elsewhere."""
    values = image.detach().cpu().to(torch.float32)
    pixels = values.mul(255.0).round()
    if values.shape[0] in _CHANNELS and bool(((pixels / 255.0) - values).abs().max() < 1e-6):
        return _png(pixels), ".png"
    buffer = io.BytesIO()
    np.save(buffer, values.numpy(), allow_pickle=False)
    return buffer.getvalue(), ".npy"


def _png(pixels: Tensor) -> bytes:
    """A picture of (C, H, W), whole numbers in 0..255, C 1 or 3."""
    buffer = io.BytesIO()
    array = pixels.to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(buffer, format="PNG")
    return buffer.getvalue()
