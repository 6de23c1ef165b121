"""Which clean images do what: what is set aside, what chooses boundaries, what sets thresholds; and what can't be divided.

The clean set is cut in two by a seed: images that are set aside, STRIP's overlays, which also choose the neurons of activation
filters; and the others, which measure accuracy and set the thresholds. With sequential passes, some of these choose STRIP's
boundaries and set no threshold.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from calibration.accuracy import answers
from calibration.data import ImageSet
from calibration.overlays import choose_overlays
from calibration.settings import Settings, check_settings, for_boundaries, set_aside
from guard import Predictor
from guard.errors import CalibrationError, ModelError, TooFewImagesError

_ALLOW = "pass --allow-missing-classes; inputs of those classes may be rejected more often"


def without(clean: ImageSet, learnt: Collection[str], settings: Settings) -> ImageSet:
    """The images that a repair has not learnt from.

    Args:
        clean: Clean images.
        learnt: `digests` of those that it has learnt from.
        settings: What the others must do for.

    Raises:
        CalibrationError: Too few are left.
    """
    seen = clean.among(learnt)
    if not bool(seen.any()):
        return clean
    rest = clean.select(torch.nonzero(~seen).squeeze(1))
    try:
        check_settings(settings, len(rest))
    except CalibrationError as error:
        message = (
            f"the repair learnt from {int(seen.sum())} of {len(clean)} clean images, which can't set its threshold, and the "
            f"others are too few: {error}; or let the original go on detecting, with --tripwire ORIGINAL"
        )
        if isinstance(error, TooFewImagesError):
            raise TooFewImagesError(message, int(seen.sum()) + error.needed, len(clean)) from error
        raise CalibrationError(message) from error
    return rest


def divide(clean: ImageSet, predictor: Predictor, settings: Settings, preferred: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Indices of the images that are set aside, as overlays, and of the rest, which sets the thresholds.

    Args:
        clean: Clean images.
        predictor: That the detectors look at.
        settings: How many are set aside, and the seed.
        preferred: (N,), bool: those that are set aside first.

    Raises:
        CalibrationError: Labels that are not the model's, or classes of which there is no image.
        ModelError: Labels over the model's.
    """
    check_labels(clean, predictor)
    missing = _missing(clean, predictor, settings)
    if missing:
        raise CalibrationError(
            f"expected clean images of all {predictor.num_classes} classes, got none of {missing}: add some, or {_ALLOW}"
        )
    labels = clean.labels if clean.labels is not None else answers(predictor, clean)
    chosen = choose_overlays(labels, set_aside(settings), torch.Generator().manual_seed(settings.seed), preferred)
    left = torch.ones(len(clean), dtype=torch.bool)
    left[chosen] = False
    rest = torch.nonzero(left).squeeze(1)
    missing = _missing(clean.select(rest), predictor, settings)
    if missing:
        raise CalibrationError(
            f"expected clean images of all {predictor.num_classes} classes besides the {len(chosen)} overlays, got no other of "
            f"{missing}, whose only images became overlays: add more of them, or {_ALLOW}"
        )
    return chosen, rest


def divide_rest(rest: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Of the images that are not set aside those that choose STRIP's boundaries, at random, and those that set thresholds."""
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(settings.seed))
    choosing, setting = order.split([count := for_boundaries(settings, len(rest)), len(rest) - count])
    return rest[choosing], rest[setting.sort().values]


def check_labels(clean: ImageSet, predictor: Predictor) -> None:
    """Refuse labels that are not this model's.

    Raises:
        CalibrationError: Another number of class folders, or of class names.
        ModelError: Labels over the model's.
    """
    classes = predictor.num_classes
    if clean.labels is None:
        if clean.class_names and len(clean.class_names) != classes:
            raise CalibrationError(
                f"expected {classes} class_names, one per output of the model, got {len(clean.class_names)}: name all, or none"
            )
        return
    if clean.class_names and len(clean.class_names) != classes:
        raise CalibrationError(
            f"expected {classes} class folders, one per output of the model, got {len(clean.class_names)}: "
            "label order is the folders' sorted order, so add an (empty) folder for each missing class"
        )
    largest = int(clean.labels.max())
    if largest >= classes:
        raise ModelError(
            f"expected a model with more than {largest} outputs for these labels, got {classes}: is it another model?"
        )


def missing_classes(labels: Tensor, predictor: Predictor) -> str:
    """Classes that no label is of, as `3 (stop, yield, road works)`; empty where there is none."""
    missing = sorted(set(range(predictor.num_classes)) - set(labels.tolist()))
    shown = ", ".join(predictor.spec.label_name(label) for label in missing[:5]) + (" ..." if len(missing) > 5 else "")
    return f"{len(missing)} ({shown})" if missing else ""


def _missing(clean: ImageSet, predictor: Predictor, settings: Settings) -> str:
    """See `missing_classes`; empty where that is unknown, or allowed."""
    return "" if clean.labels is None or settings.allow_missing_classes else missing_classes(clean.labels, predictor)
