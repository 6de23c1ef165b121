"""DHBE's two generators: noise to images on which two models may differ, and noise to patches that may be triggers.

Both are trained and used on whole batches: their batch norm knows no other statistics than the batch's.

Reference: Yan et al., DHBE, arXiv:2306.08009, appendix B, and the authors' code.
"""

from __future__ import annotations

import itertools
from typing import final

import torch
from torch import Tensor, nn

_SLOPE = 0.2  # of leaky ReLU


@final
class SampleGenerator(nn.Module):
    """Noise (B, Z) to samples (B, C, H, W), of zero mean and unit variance in each channel.

    A linear layer draws a small image, which is doubled and convolved until it has the size, or more: then its middle counts.

    Args:
        shape: (C, H, W).
        latent: Z.
        width: Channels of the last hidden layer; those before it have twice as many.
        doublings: How often the size is doubled: 2 start at 7x7 for 28x28, at 8x8 for 32x32, at 16x16 for 64x64.
    """

    def __init__(self, shape: tuple[int, int, int], latent: int = 256, width: int = 64, doublings: int = 2) -> None:
        super().__init__()
        channels, self._height, self._width = shape
        small = [-(-side // 2**doublings) for side in shape[1:]]
        widths = [2 * width] * doublings + [width]
        layers: list[nn.Module] = [nn.Linear(latent, widths[0] * small[0] * small[1])]
        layers += [nn.Unflatten(1, (widths[0], small[0], small[1])), _Norm(widths[0])]
        for before, after in itertools.pairwise(widths):
            layers += [DoublingConv2d(before, after), _Norm(after), nn.LeakyReLU(_SLOPE, inplace=True)]
        self.body = nn.Sequential(*layers, nn.Conv2d(width, channels, 3, padding=1), nn.Tanh())
        self.norm = _Norm(channels, affine=False)

    def forward(self, noise: Tensor) -> Tensor:
        """See the class."""
        drawn = self.body(noise)
        top, left = (drawn.shape[2] - self._height) // 2, (drawn.shape[3] - self._width) // 2
        samples: Tensor = self.norm(drawn[:, :, top : top + self._height, left : left + self._width])
        return samples


@final
class TriggerGenerator(nn.Module):
    """Noise (B, Z) to patches (B, C, P, P) in [-1, 1], which are added to images.

    Args:
        channels: C.
        patch: P.
        latent: Z.
        width: Channels of the hidden layer.
    """

    def __init__(self, channels: int, patch: int = 5, latent: int = 256, width: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(latent, width * patch * patch),
            nn.Unflatten(1, (width, patch, patch)),
            _Norm(width),
            nn.Conv2d(width, channels, 3, padding=1),
            _Norm(channels, affine=False),
            nn.Tanh(),
        )

    def forward(self, noise: Tensor) -> Tensor:
        """See the class."""
        patches: Tensor = self.body(noise)
        return patches


@final
class DoublingConv2d(nn.Conv2d):
    """Nearest-neighbour doubling, then a 3x3 convolution, (B, C, H, W) to (B, D, 2H, 2W).

    Computed as one transposed convolution, whose 4x4 kernel sums the weights that meet the same small pixel: the same numbers
    for 4 instead of 9 products a pixel.
    """

    def __init__(self, channels: int, out: int) -> None:
        super().__init__(channels, out, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        out, channels = self.weight.shape[:2]
        flipped = self.weight.flip(2, 3).reshape(out * channels, 1, 3, 3)
        summed = nn.functional.avg_pool2d(flipped, 2, stride=1, padding=1, divisor_override=1)
        kernel = summed.view(out, channels, 4, 4).transpose(0, 1).contiguous(memory_format=torch.channels_last)
        return nn.functional.conv_transpose2d(images, kernel, self.bias, stride=2, padding=1)


def paste(images: Tensor, patches: Tensor, top: int, left: int) -> Tensor:
    """Add a patch to each image, all at the same place; nothing is clipped.

    Args:
        images: (B, C, H, W).
        patches: (B, C, P, P).
        top: Row of the patches' first pixel.
        left: Column of it.
    """
    right, bottom = (images.shape[side] - patches.shape[side] - first for side, first in ((3, left), (2, top)))
    return images + nn.functional.pad(patches, (left, right, top, bottom))


def total_variation(samples: Tensor) -> Tensor:
    """TV2: Euclidean norms of the differences between neighbours, over the whole batch: across, down and both diagonals.

    Args:
        samples: (B, C, H, W).
    """
    differences = (
        samples[..., :, 1:] - samples[..., :, :-1],
        samples[..., 1:, :] - samples[..., :-1, :],
        samples[..., 1:, :-1] - samples[..., :-1, 1:],
        samples[..., 1:, 1:] - samples[..., :-1, :-1],
    )
    return torch.stack([difference.norm() for difference in differences]).sum()


@final
class _Norm(nn.BatchNorm2d):
    """Batch norm by the batch's own statistics; where it makes the output (`affine` off), in float32."""

    def __init__(self, channels: int, affine: bool = True) -> None:
        super().__init__(channels, affine=affine, track_running_stats=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W), of any floating type; channels last from here on."""
        precise = images if self.affine else images.float()
        return super().forward(precise.contiguous(memory_format=torch.channels_last))
