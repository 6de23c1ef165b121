"""Image sets from https://www.openml.org, by scikit-learn."""

from __future__ import annotations

from http.client import HTTPException

import numpy as np

from benchmarks.formats.raw_set import KINDS, RawSet, SetName, labelled
from guard.errors import InputError, MissingExtraError, one_line

OPENML: dict[SetName, int] = {"mnist": 554, "fashion_mnist": 40996, "cifar10": 40927, "cifar100": 41983}
"""mnist_784, Fashion-MNIST, CIFAR_10 and CIFAR-100, by their numbers; GTSRB's images are not there."""

_TEST = 10_000


def fetch_raw_set(name: SetName) -> RawSet:
    """Download a set; scikit-learn keeps it in its own folder.

    Args:
        name: Which; all but GTSRB.

    Returns:
        The last 10,000 rows as the test set.

    Raises:
        InputError: Not there, no network, or rows that are not this set's.
        MissingExtraError: No scikit-learn.
    """
    if name not in OPENML:
        raise InputError(f"expected one of {', '.join(OPENML)} to fetch, got {name}: OpenML has no such images")
    try:
        from sklearn.datasets import fetch_openml
    except ImportError:
        raise MissingExtraError("scikit-learn", "calibration") from None
    source = f"OpenML's data set {OPENML[name]}"
    try:
        fetched = fetch_openml(data_id=OPENML[name], as_frame=False, parser="liac-arff")
        values, labels = np.asarray(fetched.data), np.asarray(fetched.target).astype(np.int64)
    except (OSError, HTTPException, ValueError) as error:
        raise InputError(
            f"expected {source}, got {one_line(error, 150)}: try again, or put {name}'s own files there"
        ) from error
    with np.errstate(invalid="ignore"):
        pixels = values.astype(np.uint8)
    shape = KINDS[name].shape
    if pixels.shape[1:] != (int(np.prod(shape)),) or len(pixels) <= _TEST or not np.array_equal(pixels, values):
        raise InputError(
            f"expected over {_TEST} rows of {np.prod(shape)} bytes, got {values.shape} in {source}: use {name}'s own files"
        )
    images = pixels.reshape(-1, *shape) if len(shape) == 2 else np.moveaxis(pixels.reshape(-1, 3, *shape[:2]), 1, 3)
    train = labelled(name, images[:-_TEST], labels[:-_TEST], source)
    return RawSet(name, source, train, labelled(name, images[-_TEST:], labels[-_TEST:], source))
