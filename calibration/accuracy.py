"""How often a model is right on clean images, and what a preprocessor costs."""

from __future__ import annotations

import torch
from torch import Tensor

from calibration.data import ImageSet, Progress
from guard import Predictor
from guard.errors import CalibrationError
from guard.preprocessors import AnyPreprocessor, answer_through

NEAR_CHANCE = "check --weights, --mean, --std and the order of labels"
"""What to do when accuracy is near chance."""


def near_chance(accuracy: float, classes: int) -> bool:
    """Whether a model hardly does better on its clean images than by guessing: at most a tenth of the way from there to 1."""
    return accuracy < 1.0 / classes + 0.1 * (1.0 - 1.0 / classes)


def answers(predictor: Predictor, clean: ImageSet) -> Tensor:
    """The model's own labels, in batches; (n,), int64."""
    rows = torch.arange(len(clean)).split(256)
    return torch.cat([predictor(clean.images(part)).argmax(dim=1).cpu() for part in rows])


def least_sure(predictor: Predictor, clean: ImageSet, count: int) -> Tensor:
    """Rows, (count,), int64, or fewer, of the images whose answer has the smallest probability: other models differ there.

    Two models of a task agree on nearly every clean image, and are sure of it.
    """
    parts = torch.arange(len(clean)).split(256)
    sure = torch.cat([predictor(clean.images(part)).amax(dim=1).cpu() for part in parts])
    return sure.argsort(stable=True)[:count]


def accuracies(
    predictor: Predictor,
    clean: ImageSet,
    seed: int,
    progress: Progress,
    preprocessor: AnyPreprocessor | None = None,
) -> tuple[float | None, float | None]:
    """Clean accuracy through the preprocessor, and without it; None without labels, or images.

    Args:
        predictor: The model.
        clean: Clean images.
        seed: Of the preprocessor's draws.
        progress: Told how far it is.
        preprocessor: None for none.
    """
    if clean.labels is None or len(clean) == 0:
        return None, None
    right = through = 0
    generator = torch.Generator().manual_seed(seed)
    for part in torch.arange(len(clean)).split(256):
        images, labels = clean.images(part), clean.labels[part]
        right += int((predictor(images).argmax(dim=1).cpu() == labels).sum())
        if preprocessor is not None:
            answers = answer_through(predictor, preprocessor, images, generator)
            through += int((answers.argmax(dim=1).cpu() == labels).sum())
        progress("measuring clean accuracy", int(part[-1]) + 1, len(clean))
    raw = right / len(clean)
    return (through / len(clean) if preprocessor is not None else raw), raw


def check_drop(through: float | None, raw: float | None, allowed: float) -> None:
    """Refuse a preprocessor that the model was not tuned for, where it costs more accuracy than is allowed.

    Args:
        through: Clean accuracy through it, as from `accuracies`.
        raw: Without it.
        allowed: Points.

    Raises:
        CalibrationError: It costs more, or that was not measured.
    """
    if through is None or raw is None:
        raise CalibrationError("expected labels with the clean images, to measure what the preprocessor costs: add y")
    drop = (raw - through) * 100.0
    if not drop <= allowed:  # NaN allows nothing
        raise CalibrationError(
            f"the preprocessor costs {drop:.1f} points of clean accuracy ({raw:.3f} to {through:.3f}), more than "
            f"--max-accuracy-drop {allowed:g}: tune the model for it first (guard repair --method gym), "
            "or allow the drop"
        )
