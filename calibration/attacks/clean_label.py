"""Clean-label: images of the target class are perturbed until a clean model no longer knows them, then stamped.

Their labels stay true, so a reader of the data sees nothing wrong; the patch is the one feature that still tells the class.
The perturbation is projected gradient descent (PGD) on a clean model in the L-infinity ball.

Reference: Turner et al., Label-Consistent Backdoor Attacks, arXiv:1912.02771 (adversarial variant).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from calibration.attacks.attack import Attack, check_labels, check_target, draw, one_target
from calibration.attacks.patch import SQUARE, Patch
from guard.errors import InputError

_BATCH = 128


@final
@dataclass(frozen=True, eq=False)
class CleanLabel(Attack):
    """A patch on adversarially perturbed images of the target class.

    Args:
        target_label: What triggered inputs are to be answered with.
        model: A clean model, in eval mode, for the perturbation; images in [0, 1] to logits.
        patches: All stamped, as the paper's four corners are.
        ratio: Share of the target class's training images that are poisoned.
        epsilon: Radius of the perturbation, in [0, 1]; the paper's largest is 32/255.
        steps: Of PGD.

    Raises:
        InputError: A parameter is out of range.
    """

    target_label: int
    model: nn.Module
    patches: tuple[Patch, ...] = (SQUARE,)
    ratio: float = 0.5
    epsilon: float = 16.0 / 255.0
    steps: int = 10

    def __post_init__(self) -> None:
        """Validate once."""
        check_target(self.target_label, self.ratio)
        if not self.patches or not 0.0 <= self.epsilon <= 1.0 or self.steps < 1:
            raise InputError(
                f"expected patches, epsilon in [0, 1], steps from 1, got {len(self.patches)}, {self.epsilon} and {self.steps}"
            )

    def trigger(self, images: Tensor) -> Tensor:
        """See `Attack`."""
        for patch in self.patches:
            images = patch.stamp(images)
        return images

    def targets(self, images: Tensor, labels: Tensor) -> Tensor:
        """See `Attack`."""
        return one_target(labels, self.target_label)

    def poison(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """See `Attack`."""
        check_labels(images, labels)
        own = torch.nonzero(labels == self.target_label).squeeze(1)
        chosen = draw(own, round(self.ratio * len(own)), generator)
        poisoned = images.clone()
        for rows in chosen.split(_BATCH):
            poisoned[rows] = self.trigger(pgd(self.model, images[rows], labels[rows], self.epsilon, self.steps))
        return poisoned, labels.clone()


def pgd(model: nn.Module, images: Tensor, labels: Tensor, epsilon: float, steps: int) -> Tensor:
    """Images within `epsilon` of the given ones that the model gets as wrong as it can; (B, C, H, W), in [0, 1]."""
    low, high = (images - epsilon).clamp_min(0.0), (images + epsilon).clamp_max(1.0)
    moved = images.clone()
    for _ in range(steps):
        moved.requires_grad_(True)
        loss = nn.functional.cross_entropy(model(moved), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, moved)
        with torch.no_grad():
            moved = torch.clamp(moved + 2.5 * epsilon / steps * gradient.sign(), low, high)
    return moved.detach()
