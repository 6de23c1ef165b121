"""Planting a known trigger in a copy of a model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from calibration.attacks import AllToAll, Attack, BadNets, Blended, Patch
from calibration.fine_tuning import TrainableCopy, fine_tune
from guard.errors import CalibrationError
from guard.predictors import Predictor

_BATCH = 64
_EPOCHS = 25
_FEWEST_STEPS = 500  # a few hundred images need more epochs: a half-learnt trigger looks harder to find than it is
_RATE = 2e-3
_LOW_LOSS = 0.03  # nats; a copy that fits this well has learnt its trigger
_TRIGGERED_SHARE = 0.3
_SMALLEST = 4  # pixels

Say = Literal["decides", "breaks ties", "none"]
"""What a planted trigger has to say in the choice of a setting; one that has none shows where STRIP is blind."""


@final
@dataclass(frozen=True)
class Plant:
    """A trigger to plant.

    Attributes:
        name: Of the attack.
        attack: The attack.
        say: In the choice of a setting.
        target_label: What it aims at; None for all-to-all.
    """

    name: str
    attack: Attack
    say: Say
    target_label: int | None


def draw_plants(shape: tuple[int, int, int], classes: int, generator: torch.Generator) -> list[Plant]:
    """Three patches that decide, at random places for random labels; a blend that breaks ties; an attack that STRIP misses.

    Args:
        shape: (C, H, W) of the model's images.
        classes: M.
        generator: Draws places and labels.

    Raises:
        CalibrationError: The images are too small for a patch.
    """
    channels, height, width = shape
    if min(height, width) < _SMALLEST:
        raise CalibrationError(
            f"red-teaming needs images of at least {_SMALLEST}x{_SMALLEST} pixels to plant patches in, got {height}x{width}"
        )
    labels = torch.randint(0, classes, (4,), generator=generator).tolist()
    side = max(2, round(0.15 * min(height, width)))

    def place(tall: int, wide: int) -> tuple[int, int]:
        drawn = torch.rand(2, generator=generator)
        return int(drawn[0] * (height - tall + 1)), int(drawn[1] * (width - wide + 1))

    white = Patch.rectangle(side, side, (1.0,), *place(side, side))
    seed = int(torch.randint(0, 2**31, (1,), generator=generator))
    spots = Patch.noise(side, seed, *place(side, side)) if channels == 3 else Patch.checkerboard(side, *place(side, side))
    bar = Patch.rectangle(max(1, side // 2), 2 * side, (1.0,), *place(max(1, side // 2), 2 * side))
    return [
        Plant("white square", BadNets(labels[0], patches=(white,)), "decides", labels[0]),
        Plant("noise patch" if channels == 3 else "checkerboard", BadNets(labels[1], patches=(spots,)), "decides", labels[1]),
        Plant("white bar", BadNets(labels[2], patches=(bar,)), "decides", labels[2]),
        Plant("faint blend", Blended(labels[3], seed=1), "breaks ties", labels[3]),
        Plant("square, all to all", AllToAll(classes, patch=white), "none", None),
    ]


def plant_trigger(
    predictor: Predictor, attack: Attack, images: Tensor, labels: Tensor, generator: torch.Generator
) -> Predictor:
    """Fine-tune a copy of a model until it knows the trigger; the model itself stays as it is.

    Args:
        predictor: The model.
        attack: What to plant.
        images: (N, C, H, W), in [0, 1], clean.
        labels: (N,), int64.
        generator: Draws batches.

    Raises:
        ModelError: The model can't be fine-tuned.
    """
    copied = TrainableCopy.of(predictor).faster(images[:2])
    wanted = attack.targets(images, labels)
    triggered = attack.trigger(images)

    def batches(_epoch: int) -> list[tuple[Tensor, Tensor]]:
        found = []
        for rows in torch.randperm(len(images), generator=generator).split(_BATCH):
            chosen = (torch.rand(len(rows), generator=generator) < _TRIGGERED_SHARE) & (wanted[rows] >= 0)
            mixed = torch.where(chosen.view(-1, 1, 1, 1), triggered[rows], images[rows])
            found.append((mixed, torch.where(chosen, wanted[rows], labels[rows])))
        return found

    epochs = max(_EPOCHS, math.ceil(_FEWEST_STEPS / math.ceil(len(images) / _BATCH)))
    fine_tune(copied, batches, epochs, _RATE, low_loss=_LOW_LOSS)
    return copied.predictor
