"""Median filter with replicated borders: OpenCV on a CPU, Kornia on a GPU, the same result."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import Tensor

from guard.errors import InputError, MissingExtraError

_KERNELS = (3, 5)  # what OpenCV filters in float32


def median_filter(images: Tensor, kernel: int) -> Tensor:
    """Replace each pixel by the median of its neighbourhood, channel by channel.

    Args:
        images: (B, C, H, W), float32.
        kernel: Side of the square neighbourhood: 3 or 5.

    Returns:
        The same shape and device. Borders are replicated.

    Raises:
        InputError: Another kernel.
        MissingExtraError: The images are on a GPU and Kornia is not installed.
    """
    if kernel not in _KERNELS:
        raise InputError(f"expected a median kernel of 3 or 5, got {kernel}")
    return median_kornia(images, kernel) if images.device.type == "cuda" else median_opencv(images, kernel)


def median_opencv(images: Tensor, kernel: int) -> Tensor:
    """The CPU's way, for one plane after another (OpenCV replicates borders by itself)."""
    planes = np.ascontiguousarray(images.detach().cpu().numpy().reshape(-1, *images.shape[-2:]), dtype=np.float32)
    filtered = np.empty_like(planes)
    for plane, target in zip(planes, filtered, strict=True):
        cv2.medianBlur(plane, kernel, dst=target)
    return torch.from_numpy(filtered).reshape(images.shape)


def median_kornia(images: Tensor, kernel: int) -> Tensor:
    """The GPU's way; padded here, because Kornia's own border changed between versions."""
    try:
        from kornia.filters import median_blur
    except ImportError as error:
        raise MissingExtraError("kornia", "gpu") from error
    margin = kernel // 2
    padded = torch.nn.functional.pad(images, (margin,) * 4, mode="replicate")
    filtered: Tensor = median_blur(padded, (kernel, kernel))
    return filtered[..., margin:-margin, margin:-margin]
