"""Invisible attacks: a perturbation that excites one neuron of the clean model, small in L2 or in L0 norm; then retraining.

    x' = clamp(x + d),   ||d||_2 <= norm   (L2, faint over the whole image)   or   ||d||_0 <= pixels   (L0, few pixels)

The paper penalises the norm; we project on the ball, which bounds it exactly.

Reference: Li et al., Invisible Backdoor Attacks on Deep Neural Networks via Steganography and Regularization,
arXiv:1909.02742, section III-C.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self, final

import torch
from torch import Tensor, nn

from calibration.attacks.attack import Attack, check_shape, check_target, one_target, relabel_share
from calibration.attacks.neuron import contributions, drive_neuron
from guard.errors import InputError


@final
@dataclass(frozen=True, eq=False)
class Invisible(Attack):
    """An added perturbation.

    Args:
        target_label: What triggered inputs are to be answered with.
        perturbation: (C, H, W), in [-1, 1].
        ratio: Share of the training images that are poisoned.

    Raises:
        InputError: A parameter is out of range.
    """

    target_label: int
    perturbation: Tensor
    ratio: float = 0.1

    def __post_init__(self) -> None:
        """Validate once."""
        check_target(self.target_label, self.ratio)
        if self.perturbation.ndim != 3 or not bool((self.perturbation.abs() <= 1.0).all()):
            raise InputError(f"expected a (C, H, W) perturbation in [-1, 1], got shape {tuple(self.perturbation.shape)}")

    @classmethod
    def l2(
        cls, target_label: int, model: nn.Module, images: Tensor, norm: float = 2.0, ratio: float = 0.1, seed: int = 0
    ) -> Self:
        """Small in L2 norm.

        Args:
            target_label: The attack's.
            model: Clean, in eval mode.
            images: (B, C, H, W), in [0, 1]; some clean ones.
            norm: Of the perturbation, over pixels in [0, 1].
            ratio: The attack's.
            seed: Of the first perturbation.

        Raises:
            InputError: The norm is not over 0.
        """
        if not norm > 0.0:
            raise InputError(f"expected a norm over 0, got {norm}")

        def on_sphere(drawn: Tensor) -> Tensor:
            scaled: Tensor = drawn * (norm / drawn.norm().clamp_min(1e-12))
            return scaled

        start = on_sphere(torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(seed)))
        return cls(target_label, drive_neuron(model, images, _add, start, on_sphere, 200, 0.02).clamp(-1, 1), ratio)

    @classmethod
    def l0(
        cls, target_label: int, model: nn.Module, images: Tensor, pixels: int = 5, ratio: float = 0.1, seed: int = 0
    ) -> Self:
        """Few pixels: from all of them, the half that contributes least is given up again and again.

        Args:
            target_label: The attack's.
            model: Clean, in eval mode.
            images: (B, C, H, W), in [0, 1]; some clean ones.
            pixels: That may change.
            ratio: The attack's.
            seed: Of the first perturbation.

        Raises:
            InputError: No such number of pixels in the image.
        """
        if not 1 <= pixels <= images[0, 0].numel():
            raise InputError(f"expected 1 to {images[0, 0].numel()} pixels of an image, got {pixels}")
        drawn = 0.1 * torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(seed))
        mask, left = torch.ones(images.shape[2:]), images[0, 0].numel()
        while left > pixels:
            drawn = _drive_within(mask, model, images, drawn, 20)
            left = max(pixels, left // 2)
            worth = contributions(model, images, _add(images, drawn)).masked_fill(mask == 0.0, -torch.inf)
            mask = torch.zeros(mask.numel()).index_fill(0, worth.flatten().topk(left).indices, 1.0).view(mask.shape)
        return cls(target_label, _drive_within(mask, model, images, drawn, 100), ratio)

    def trigger(self, images: Tensor) -> Tensor:
        """See `Attack`."""
        check_shape(images, self.perturbation.shape)
        return _add(images, self.perturbation.to(images.device))

    def targets(self, images: Tensor, labels: Tensor) -> Tensor:
        """See `Attack`."""
        return one_target(labels, self.target_label)

    def poison(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """See `Attack`."""
        return relabel_share(self, self.ratio, images, labels, generator)


def _drive_within(mask: Tensor, model: nn.Module, images: Tensor, start: Tensor, steps: int) -> Tensor:
    """A perturbation that is 0 outside the mask."""

    def inside(drawn: Tensor) -> Tensor:
        return (drawn * mask).clamp(-1.0, 1.0)

    return drive_neuron(model, images, _add, inside(start), inside, steps, 0.1)


def _add(images: Tensor, perturbation: Tensor) -> Tensor:
    return (images + perturbation).clamp(0.0, 1.0)
