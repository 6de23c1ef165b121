"""Bilinear scaling of images. Small ones are scaled by two matrix products, which costs a third of the general way."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import interpolate

_SMALL = 64  # pixels; the general way is faster on larger images


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Scale images to a size.

    Args:
        images: (B, C, H, W), float32.
        height: Pixels.
        width: Pixels.
    """
    tall, wide = int(images.shape[-2]), int(images.shape[-1])
    if max(tall, wide, height, width) > _SMALL:
        return interpolate(images, size=(height, width), mode="bilinear", align_corners=False)
    return _weights(tall, height).to(images.device) @ images @ _weights(wide, width).T.to(images.device)


def blur_by_scaling(images: Tensor, height: int, width: int) -> Tensor:
    """Scale images to a smaller size, and back to their own.

    Args:
        images: (B, C, H, W), float32.
        height: Pixels.
        width: Pixels.
    """
    tall, wide = int(images.shape[-2]), int(images.shape[-1])
    if max(tall, wide) > _SMALL:
        return resize(resize(images, height, width), tall, wide)
    return _there_and_back(tall, height).to(images.device) @ images @ _there_and_back(wide, width).T.to(images.device)


@functools.lru_cache(maxsize=256)
def _weights(before: int, after: int) -> Tensor:
    """(after, before): each new pixel as a mean of old ones."""
    with torch.inference_mode(False):  # it is kept, and may be needed outside of that mode
        unit = torch.eye(before, dtype=torch.float32).view(before, 1, 1, before)
        return interpolate(unit, size=(1, after), mode="bilinear", align_corners=False).view(before, after).T.contiguous()


@functools.lru_cache(maxsize=256)
def _there_and_back(side: int, between: int) -> Tensor:
    with torch.inference_mode(False):
        return _weights(between, side) @ _weights(side, between)
