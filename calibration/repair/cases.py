"""What a repair works on: clean images, quarantined ones, and the parts of both that it must not see."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self, final

import torch
from torch import Tensor

from calibration.data import ImageSet, Progress, digests, distinct_rows, load_images, no_progress
from guard import Predictor, Quarantine
from guard.errors import InputError, QuarantineError, RepairError

FEWEST_CLEAN = 50
FEWEST_QUARANTINED = 30
_HELD_OUT, _MOST_HELD_OUT = 0.2, 500  # share of both sets, and images at most: measures the repair, and does nothing else
_STOPPING, _MOST_STOPPING = 0.1, 250  # likewise: decides when to stop
_AT_ONCE = 256


@final
@dataclass(frozen=True)
class Part:
    """Images and what belongs to them.

    Attributes:
        images: (N, C, H, W), float32, in [0, 1].
        labels: (N,), int64: of clean images the true ones or, where those are unknown, the original's answers; of quarantined
            images the original's answers.
        answers: (N, M), logits of the original.
    """

    images: Tensor
    labels: Tensor
    answers: Tensor

    def __len__(self) -> int:
        return len(self.images)


@final
@dataclass(frozen=True)
class Parts:
    """A set in three parts that never mix.

    Attributes:
        tuning: Is learnt from.
        stopping: Says when to stop.
        held_out: Measures what came of it.
    """

    tuning: Part
    stopping: Part
    held_out: Part

    def __len__(self) -> int:
        return len(self.tuning) + len(self.stopping) + len(self.held_out)

    @classmethod
    def none(cls, predictor: Predictor) -> Self:
        """Of no images at all."""
        spec = predictor.spec
        part = Part(torch.empty(0, *spec.shape), torch.empty(0, dtype=torch.int64), torch.empty(0, predictor.num_classes))
        return cls(part, part, part)


def clean_parts(clean: ImageSet, predictor: Predictor, seed: int, learns: bool = True) -> Parts:
    """Cut a clean set by a seed; of equal images one counts.

    Args:
        clean: The set.
        predictor: The original.
        seed: Of the cut.
        learns: False for a repair that does not learn from images: then all of them are held out.

    Raises:
        RepairError: Too few images.
    """
    images = clean.images(slice(None))
    rows = _clean_rows(digests(images))
    return _cut(images[rows], None if clean.labels is None else clean.labels[rows], predictor, seed, learns)


def quarantined_parts(
    images: Tensor, predictor: Predictor, seed: int, clean: Collection[str] = (), learns: bool = True
) -> Parts:
    """Cut quarantined images by a seed; of equal ones, which a client sent again, one counts.

    Args:
        images: (N, C, H, W), in [0, 1].
        predictor: The original.
        seed: Of the cut.
        clean: Digests of the clean images; one of these in a quarantine is known to be a false alarm, and is left out.
        learns: See `clean_parts`.

    Raises:
        RepairError: Too few images.
    """
    return _cut(images[_quarantined_rows(digests(images), clean)], None, predictor, seed, learns)


def check_enough(clean: ImageSet | None, quarantined: ImageSet | None) -> None:
    """Refuse, before any work, too few images.

    Raises:
        RepairError: It says of which, and how many there must be.
    """
    known = [] if clean is None else digests(clean.images(slice(None)))
    if clean is not None:
        _clean_rows(known)
    if quarantined is not None:
        _quarantined_rows(digests(quarantined.images(slice(None))), frozenset(known))


def load_quarantined(
    place: Path, shape: tuple[int, int, int], *, skip_unreadable: bool = False, progress: Progress = no_progress
) -> ImageSet:
    """Quarantined images of a model's shape, without labels.

    Args:
        place: A quarantine folder, or any folder of images, or an `.npz` with `x`.
        shape: (C, H, W) of the model's images.
        skip_unreadable: Leave out items whose picture can't be read or has another shape, and list them.
        progress: Told about each image.

    Raises:
        QuarantineError: Nothing there.
        CalibrationError: Unreadable pictures, and no leave to skip them.
        InputError: Images of another shape.
    """
    quarantine = Quarantine(place)
    items = quarantine.items() if place.is_dir() else []
    if not items:
        if not place.exists():
            raise QuarantineError(
                f"expected a quarantine folder, got {place}: no such folder; nothing may have been rejected yet"
            )
        if place.is_dir() and not any(place.iterdir()):
            raise QuarantineError(f"expected rejected images in {place}, got an empty folder: nothing was rejected yet")
        loaded = load_images(place, shape, skip_unreadable=skip_unreadable, progress=progress)
        return ImageSet(loaded.pixels, skipped=loaded.skipped)
    found: list[Tensor] = []
    skipped: list[tuple[str, str]] = []
    for done, item in enumerate(items, start=1):
        progress("reading the quarantine", done, len(items))
        try:
            image = quarantine.image(item)
            if tuple(image.shape) != shape:
                raise InputError(
                    f"expected quarantined images of shape {shape}, got {tuple(image.shape)} ({item.id}): "
                    "is it another model's?"
                )
            if not bool(torch.isfinite(image).all()):
                raise InputError(f"expected finite pixels, got NaN or Inf in quarantined {item.id}: delete the item")
        except (QuarantineError, InputError) as error:
            if not (place / f"{item.id}.json").exists():  # evicted or released meanwhile
                continue
            if not skip_unreadable:
                raise type(error)(f"{error}; or pass --skip-unreadable") from error
            skipped.append((item.id, str(error)))
            continue
        found.append(image)
    if not found:
        raise QuarantineError(f"expected images of shape {shape} in {place}, got none that can be read")
    return ImageSet(torch.stack(found), skipped=tuple(skipped))


def logits(predictor: Predictor, images: Tensor) -> Tensor:
    """What the original says, as logarithms of its probabilities, which serve as logits; (N, M).

    Raises:
        ModelError: It failed.
    """
    parts = [predictor(part).cpu() for part in images.split(_AT_ONCE)]
    return torch.cat(parts).clamp_min(1e-8).log()


def _clean_rows(known: Sequence[str]) -> list[int]:
    rows = distinct_rows(known)
    if len(rows) < FEWEST_CLEAN:
        same = "" if len(rows) == len(known) else f" different ones among {len(known)}"
        raise RepairError(f"expected at least {FEWEST_CLEAN} clean images to repair with, got {len(rows)}{same}: add images")
    return rows


def _quarantined_rows(known: Sequence[str], clean: Collection[str]) -> list[int]:
    rows = [row for row in distinct_rows(known) if known[row] not in clean]
    if len(rows) < FEWEST_QUARANTINED:
        same = "" if len(rows) == len(known) else f" different ones that are not among the clean images, of {len(known)}"
        raise RepairError(
            f"expected at least {FEWEST_QUARANTINED} quarantined images to learn the trigger from, got {len(rows)}{same}: "
            "serve on until the quarantine holds more, or use --method gym without --quarantine"
        )
    return rows


def _cut(images: Tensor, labels: Tensor | None, predictor: Predictor, seed: int, learns: bool) -> Parts:
    try:
        predictor.spec.check(images)
    except InputError as error:
        raise InputError(f"the images don't fit the model: {error}") from error
    answers = logits(predictor, images)
    failed = int(torch.isnan(answers).any(dim=1).sum())
    if failed:
        raise RepairError(f"the model gave no answer to {failed} of {len(images)} images: check --mean, --std, --output")
    known = answers.argmax(dim=1) if labels is None else labels
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    held_out, stopping = len(images), 0
    if learns:
        held_out = min(_MOST_HELD_OUT, max(1, round(_HELD_OUT * len(images))))
        stopping = min(_MOST_STOPPING, max(1, round(_STOPPING * len(images))))
    rows = order.split([held_out, stopping, len(images) - held_out - stopping])
    parts = [Part(images[part], known[part], answers[part]) for part in rows]
    return Parts(parts[2], parts[1], parts[0])
