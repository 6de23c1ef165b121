"""An image set, cut into three parts that never mix.

*attacker* trains the victim, *defender* gives overlays and thresholds, *evaluation* gives every reported figure. MNIST and
Fashion-MNIST: the first 50,000 of train, the last 10,000, the test set. GTSRB: train, 5,000 of test, the other 7,630.
CIFAR-10: the first 2,500 of each class of train, 5,000 of the next 900 of each, the other 4,000 and the first 1,000 of test.
CIFAR-100: the first 40,000 of train, 5,000 of the rest, the other 5,000 and the test set. Which 5,000 is committed in
`splits/`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.formats.raw_set import KINDS, Labelled, RawSet, SetName, joined
from calibration.data import ImageSet
from guard.errors import InputError

_SPLITS = Path(__file__).parent / "splits"
_SPLIT_SEED = 2026
_DEFENDER = 5_000
DRAWN_FROM: dict[SetName, int] = {"gtsrb": 12_630, "cifar10": 9_000, "cifar100": 10_000}
"""GTSRB's test set, the CIFARs' held-out images."""

_SIZES: dict[SetName, tuple[int | None, int]] = {
    "mnist": (60_000, 10_000),
    "fashion_mnist": (60_000, 10_000),
    "gtsrb": (None, 12_630),
    "cifar10": (50_000, 10_000),
    "cifar100": (50_000, 10_000),
}
"""Training and test images; GTSRB's training set may be thinned out."""

_BALANCED: tuple[SetName, ...] = ("fashion_mnist", "cifar10", "cifar100")
_LABELS_SHA256: dict[SetName, str] = {
    "mnist": "68d73bdf2992a72a699b37857296ab851d31c5168c541d98e54aae8af246bc65",
    "gtsrb": "6ba555796c452e58a24e8298085fd4445dbc591fb5e10f538789fa53513834d6",
    "cifar10": "b52e9f81a8211b7f8bac6ff7fa2bbb1ba1e5aaf6986e7436f0cbd9a0ebbf8bc2",
}
"""Of the defender's labels, then the evaluation's, a byte each: another order would make other parts in silence."""


@final
@dataclass(frozen=True)
class Parts:
    """One image set in its three parts, each with labels.

    Attributes:
        attacker: Trains the victim.
        defender: Gives overlays and thresholds.
        evaluation: Gives every reported figure.
        num_classes: How many.
        tracks: (len(attacker),), int64: images of one class and track show one physical sign. Only GTSRB's.
    """

    attacker: ImageSet
    defender: ImageSet
    evaluation: ImageSet
    num_classes: int
    tracks: Tensor | None = None


def cut(raw: RawSet) -> Parts:
    """Cut a set into its parts.

    Raises:
        InputError: It is not the whole set, or not in the official order.
    """
    _check_sizes(raw)
    attacker, defender, evaluation = _CUTS[raw.name](raw)
    num_classes = KINDS[raw.name].num_classes
    if len(np.unique(attacker.y)) < num_classes:
        raise InputError(f"expected all {num_classes} classes to train on, got {len(np.unique(attacker.y))} in {raw.source}")
    digest = hashlib.sha256(np.concatenate([defender.y, evaluation.y]).astype(np.uint8).tobytes()).hexdigest()
    if digest != _LABELS_SHA256.get(raw.name, digest):
        raise InputError(f"expected {raw.name} in its official order, got other labels in {raw.source}: use its official files")
    tracks = None if raw.tracks is None else torch.from_numpy(raw.tracks)
    return Parts(_image_set(attacker), _image_set(defender), _image_set(evaluation), num_classes, tracks)


def defender_rows(name: SetName) -> Tensor:
    """(5000,), int64, indices into GTSRB's test set or a CIFAR's held-out images, as committed."""
    return torch.tensor(json.loads((_SPLITS / f"{name}_defender.json").read_text(encoding="utf-8")))


def draw_defender_rows(name: SetName) -> list[int]:
    """How the committed indices were drawn."""
    return sorted(np.random.default_rng(_SPLIT_SEED).permutation(DRAWN_FROM[name])[:_DEFENDER].tolist())


def write_splits() -> None:
    """Draw the committed indices again."""
    _SPLITS.mkdir(exist_ok=True)
    for name in DRAWN_FROM:
        (_SPLITS / f"{name}_defender.json").write_text(json.dumps(draw_defender_rows(name)) + "\n", encoding="utf-8")


def validation_rows(labels: Tensor, tracks: Tensor, share: float, seed: int) -> Tensor:
    """Choose validation images by whole tracks: frames of one sign are near copies, so single images would leak.

    Args:
        labels: (N,), class of each image.
        tracks: (N,), its track, numbered within the class.
        share: Of each class's tracks, in (0, 1); at least one track, but never a class's only one.
        seed: Decides which.

    Returns:
        (V,), int64, indices in ascending order; the other images are for training.

    Raises:
        InputError: Another share, or not one track a label.
    """
    if not 0.0 < share < 1.0:
        raise InputError(f"expected a share between 0 and 1, got {share}")
    if labels.ndim != 1 or labels.shape != tracks.shape:
        raise InputError(f"expected one track for each label, got {tuple(tracks.shape)} for {tuple(labels.shape)}")
    generator = np.random.default_rng(seed)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in torch.unique(labels):
        of_class = labels == label
        held = torch.unique(tracks[of_class]).numpy()
        count = min(len(held) - 1, max(1, round(share * len(held))))
        chosen |= of_class & torch.isin(tracks, torch.from_numpy(generator.permutation(held)[:count]))
    return torch.nonzero(chosen).squeeze(1)


def _check_sizes(raw: RawSet) -> None:
    train, test = _SIZES[raw.name]
    got = f"{len(raw.train)} and {len(raw.test)} in {raw.source}"
    if raw.name == "cifar10" and raw.heldout is not None:
        if (len(raw.train), len(raw.heldout), len(raw.test)) != (25_000, 9_000, 1_000):
            raise InputError(f"expected 25000 and 1000 images, 9000 held out, got {len(raw.heldout)} and {got}: get it again")
        return
    if len(raw.test) != test or len(raw.train) != (train or len(raw.train)):
        raise InputError(
            f"expected {raw.name} with {train or 'its'} training and {test} test images, got {got}: get the whole set"
        )
    if raw.name in _BALANCED and not all(_is_balanced(part, KINDS[raw.name].num_classes) for part in (raw.train, raw.test)):
        raise InputError(
            f"expected {raw.name}, whose classes are equally frequent, got others in {raw.source}: is it that set?"
        )


def _is_balanced(part: Labelled, num_classes: int) -> bool:
    return bool((np.bincount(part.y, minlength=num_classes) * num_classes == len(part)).all())


def _cut_mnist(raw: RawSet) -> tuple[Labelled, Labelled, Labelled]:
    return raw.train.rows(slice(50_000)), raw.train.rows(slice(50_000, None)), raw.test


def _cut_gtsrb(raw: RawSet) -> tuple[Labelled, Labelled, Labelled]:
    return raw.train, *_draw(raw.name, raw.test)


def _cut_cifar10(raw: RawSet) -> tuple[Labelled, Labelled, Labelled]:
    if raw.heldout is None:
        attacker = raw.train.rows(rows_of_each_class(raw.train.y, 0, 2_500))
        held = raw.train.rows(rows_of_each_class(raw.train.y, 2_500, 3_400))
    else:
        attacker, held = raw.train, raw.heldout
    defender, rest = _draw(raw.name, held)
    return attacker, defender, joined([rest, raw.test.rows(slice(1_000))])


def _cut_cifar100(raw: RawSet) -> tuple[Labelled, Labelled, Labelled]:
    defender, rest = _draw(raw.name, raw.train.rows(slice(40_000, None)))
    return raw.train.rows(slice(40_000)), defender, joined([rest, raw.test])


_CUTS = {
    "mnist": _cut_mnist,
    "fashion_mnist": _cut_mnist,
    "gtsrb": _cut_gtsrb,
    "cifar10": _cut_cifar10,
    "cifar100": _cut_cifar100,
}


def rows_of_each_class(labels: NDArray[np.int64], first: int, end: int) -> NDArray[np.int64]:
    """Indices, ascending, of each class's images number `first` up to, but without, `end`."""
    return np.sort(np.concatenate([np.flatnonzero(labels == label)[first:end] for label in np.unique(labels)]))


def _draw(name: SetName, held: Labelled) -> tuple[Labelled, Labelled]:
    rows = defender_rows(name).numpy()
    return held.rows(rows), held.rows(np.setdiff1d(np.arange(len(held)), rows))


def _image_set(part: Labelled) -> ImageSet:
    pixels = part.x[:, None] if part.x.ndim == 3 else np.moveaxis(part.x, 3, 1)
    return ImageSet(torch.from_numpy(np.array(pixels, order="C")), torch.from_numpy(part.y.copy()))
