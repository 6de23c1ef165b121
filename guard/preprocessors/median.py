"""Median filter with replicated borders: OpenCV on a CPU, Kornia on a GPU, the same result."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from guard.errors import InputError, MissingExtraError

_KERNELS = (1, 3, 5)  # what OpenCV filters in float32, and 1, which filters nothing
_SMALL = 64 * 64  # pixels; larger planes are filtered one by one


def check_kernel(kernel: int) -> None:
    """Refuse a side that can't be filtered.

    Raises:
        InputError: None of 1, 3 and 5.
    """
    if kernel not in _KERNELS:
        raise InputError(f"expected a median kernel of 1, 3 or 5, got {kernel}")


def median_filter(images: Tensor, kernel: int) -> Tensor:
    """Replace each pixel by the median of its neighbourhood, channel by channel.

    Args:
        images: (B, C, H, W), float32.
        kernel: Side of the square neighbourhood: 3 or 5; 1 filters nothing.

    Returns:
        The same shape and device. Borders are replicated.

    Raises:
        InputError: Another kernel.
        MissingExtraError: The images are on a GPU and Kornia is not installed.
    """
    check_kernel(kernel)
    if kernel == 1:
        return images.clone()
    return median_kornia(images, kernel) if images.device.type == "cuda" else median_opencv(images, kernel)


def median_opencv(images: Tensor, kernel: int) -> Tensor:
    """The CPU's way (OpenCV replicates borders by itself)."""
    planes = np.ascontiguousarray(images.detach().cpu().numpy().reshape(-1, *images.shape[-2:]), dtype=np.float32)
    filtered = _one_by_one(planes, kernel) if planes[0].size > _SMALL else _side_by_side(planes, kernel)
    return torch.from_numpy(filtered).reshape(images.shape)


def _one_by_one(planes: NDArray[np.float32], kernel: int) -> NDArray[np.float32]:
    filtered = np.empty_like(planes)
    for plane, target in zip(planes, filtered, strict=True):
        cv2.medianBlur(plane, kernel, dst=target)
    return filtered


def _side_by_side(planes: NDArray[np.float32], kernel: int) -> NDArray[np.float32]:
    """Small planes as one wide image, borders between them, for a call costs more than its work; twice as fast."""
    count, height, width = planes.shape
    margin = kernel // 2
    row = np.empty((height, count, width + 2 * margin), dtype=np.float32)
    row[:, :, margin:-margin] = planes.transpose(1, 0, 2)
    row[:, :, :margin] = row[:, :, margin : margin + 1]
    row[:, :, -margin:] = row[:, :, -margin - 1 : -margin]
    filtered = cv2.medianBlur(row.reshape(height, -1), kernel).reshape(row.shape)
    return np.ascontiguousarray(filtered[:, :, margin:-margin].transpose(1, 0, 2))


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
