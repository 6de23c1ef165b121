"""What every simulated attacker offers."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from guard.errors import InputError


class Attack(ABC):
    """A trigger, what it is to achieve, and how training data is poisoned for it.

    Images are (B, C, H, W), float32, in [0, 1]; labels (B,), int64. Nothing changes in place. `trigger` is a pure function
    of the image and the attack's parameters; `poison` draws from the generator alone, so the same seed gives the same data.
    """

    @abstractmethod
    def trigger(self, images: Tensor) -> Tensor:
        """Copies of the images with the trigger."""

    @abstractmethod
    def targets(self, images: Tensor, labels: Tensor) -> Tensor:
        """The label that the attack wants for each image once triggered.

        Args:
            images: (B, C, H, W), clean.
            labels: (B,), int64, their true labels.

        Returns:
            (B,), int64; -1 where the attack wants nothing of an image: it already has the label, or is no source.
        """

    @abstractmethod
    def poison(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Poison training data.

        Args:
            images: (N, C, H, W), clean.
            labels: (N,), int64.
            generator: Picks which images.

        Returns:
            Copies, in the same order, with a share of the images triggered and, unless the attack is clean-label, relabelled.
        """


def one_target(labels: Tensor, target_label: int) -> Tensor:
    """The `targets` of an attack that wants one label of every image; (B,), int64."""
    return torch.where(labels == target_label, -1, target_label)


def relabel_share(
    attack: Attack, ratio: float, images: Tensor, labels: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The usual poisoning: round(ratio * N) of the images that the attack wants something of, triggered and relabelled."""
    check_labels(images, labels)
    wanted = attack.targets(images, labels)
    chosen = draw(torch.nonzero(wanted >= 0).squeeze(1), round(ratio * len(labels)), generator)
    poisoned, relabelled = images.clone(), labels.clone()
    poisoned[chosen] = attack.trigger(images[chosen])
    relabelled[chosen] = wanted[chosen]
    return poisoned, relabelled


def draw(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """At most `count` of the rows, at random."""
    return rows[torch.randperm(len(rows), generator=generator)[:count]]


def check_target(target_label: int, ratio: float) -> None:
    """Raise unless a label and a poisoning ratio make sense."""
    if target_label < 0 or not 0.0 <= ratio <= 1.0:
        raise InputError(f"expected a target label from 0 and a ratio in [0, 1], got {target_label} and {ratio}")


def check_labels(images: Tensor, labels: Tensor) -> None:
    """Raise unless there is a label per image."""
    if len(images) != len(labels):
        raise InputError(f"expected a label per image, got {len(images)} images and {len(labels)} labels")


def check_pixels(values: Tensor, what: str) -> None:
    """Raise unless they are what images hold."""
    if values.dtype != torch.float32 or not bool(((values >= 0.0) & (values <= 1.0)).all()):
        raise InputError(f"expected {what} of float32 values in [0, 1], got {values.dtype} or others")


def check_shape(images: Tensor, shape: torch.Size) -> None:
    """Raise unless images have the (C, H, W) of what a trigger is made for."""
    if images.shape[1:] != shape:
        raise InputError(
            f"expected images of shape {tuple(shape)}, which the trigger is made for, got {tuple(images.shape[1:])}"
        )


def stamp_target_class(
    attack: Attack, ratio: float, images: Tensor, labels: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Clean-label poisoning: a share of the images that have the target label already is triggered; every label stays true."""
    check_labels(images, labels)
    own = torch.nonzero(attack.targets(images, labels) < 0).squeeze(1)
    chosen = draw(own, round(ratio * len(own)), generator)
    poisoned = images.clone()
    poisoned[chosen] = attack.trigger(images[chosen])
    return poisoned, labels.clone()
