"""GYM's fine-tuning: the model learns to answer images that the lightweight preprocessing has changed.

Two recipes. `paper` is theirs: intensive images, labels, Adadelta, 5 epochs, 5x5 medians. `distilled` is ours: the images that
the model will get, mirrored too where the original bears it, the original's own answers to the clean ones beside the labels, a
longer schedule with batch norm in training mode, and a kernel in proportion to the image.

Reference: Zeng et al., GYM (DeepSweep), arXiv:2012.07006; rate and parameters are those of its public code.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from calibration.checkpoints import Checkpoints
from calibration.data import Progress, no_progress
from calibration.engine import Engine
from calibration.fine_tuning import TrainableCopy
from calibration.repair.cases import Part, Parts, logits
from calibration.repair.tuning import Lesson, Tuning, likeness, tune
from guard import Predictor
from guard.preprocessors import Gym, GymIntensive, Preprocessor, ThreeMedians

Recipe = Literal["distilled", "paper"]

PAPER = Tuning(epochs=5, rate=0.03, batch=10, weight=0.0, mixed=0.0, optimizer="adadelta")
DISTILLED = Tuning(epochs=60, rate=1e-2, warm_up=0.2, decay=1e-2, batch=64, mixed=0.0, batch_statistics=True)

_KERNELS = (1, 3, 5)
_BEARABLE = 0.02  # loss of accuracy on mirror images
_PAPERS_SIDE = 224  # pixels of the images that the public code filters with 5x5 medians


def lightweight(shape: tuple[int, int, int], recipe: Recipe = "distilled") -> Gym:
    """GYM's function at inference.

    Args:
        shape: (C, H, W) of the model's images.
        recipe: `paper` filters images of any size with 5x5 medians; otherwise the kernel is in proportion to the image, and
            one pixel, so no filter, for images of less than about 90 pixels: 5x5 on 32x32 blurs digits off a traffic sign.
    """
    if recipe == "paper":
        return Gym()
    wanted = 5.0 * min(shape[1:]) / _PAPERS_SIDE
    return Gym(kernel=min(_KERNELS, key=lambda kernel: abs(kernel - wanted)))


def fine_tune_gym(
    copied: TrainableCopy,
    original: Predictor,
    clean: Parts,
    recipe: Recipe,
    tuning: Tuning,
    engine: Engine,
    seed: int,
    checkpoints: Checkpoints | None = None,
    progress: Progress = no_progress,
) -> Gym:
    """Tune a copy in place for the preprocessor that is returned.

    Args:
        copied: The copy.
        original: Answers clean images.
        clean: Cut.
        recipe: Whose.
        tuning: `PAPER` or `DISTILLED`, with changes.
        engine: Where.
        seed: Of what is drawn.
        checkpoints: Written after each epoch, and gone on from.
        progress: Told how far it is.

    Raises:
        ModelError: The model can't be trained.
    """
    light = lightweight(original.spec.shape, recipe)
    change: Preprocessor = GymIntensive(medians=ThreeMedians(kernel=light.kernel)) if recipe == "paper" else light
    shown = light(clean.stopping.images, torch.Generator().manual_seed(seed))  # the same draws each time

    def score() -> float:
        return likeness(copied.predictor, shown, clean.stopping.answers, clean.stopping.labels, tuning)

    flips = recipe == "distilled" and bears_flips(original, clean.tuning)
    steps = len(_batches(torch.arange(len(clean.tuning)), tuning.batch))
    tune(
        copied,
        lambda epoch: _lessons(clean.tuning, change, tuning, flips, seed * 1_000_003 + epoch + 1),
        steps,
        tuning,
        engine,
        score,
        checkpoints,
        "gym",  # codefend's may lie beside it
        progress,
    )
    return light


def _lessons(part: Part, change: Preprocessor, tuning: Tuning, flips: bool, seed: int) -> Iterator[Lesson]:
    generator = torch.Generator().manual_seed(seed)
    for rows in _batches(torch.randperm(len(part), generator=generator), tuning.batch):
        images = part.images[rows]
        if flips:
            chosen = torch.rand(len(rows), generator=generator) < 0.5
            images = torch.where(chosen.view(-1, 1, 1, 1), images.flip(-1), images)
        yield Lesson(change(images, generator), part.answers[rows], part.labels[rows])


def _batches(order: Tensor, size: int) -> list[Tensor]:
    """Without a last one of a single image, from which batch norm can't take statistics."""
    return [rows for rows in order.split(size) if len(rows) > 1 or len(order) == 1]


def bears_flips(original: Predictor, part: Part) -> bool:
    """Whether mirror images have the same labels, by the original's own accuracy on them: then they are twice as many images.

    So it is with photographs of things, and not with digits or traffic signs.
    """
    flipped = logits(original, part.images.flip(-1)).argmax(dim=1)
    lost = (part.answers.argmax(dim=1) == part.labels).double().mean() - (flipped == part.labels).double().mean()
    return float(lost) <= _BEARABLE
