"""SAT, GYM's stochastic affine transformation: a small random shift, rotation and scaling of each image.

    dst = A (src - c) + c + t,   A = s * R(angle),   c the image's centre

Border pixels are zero, interpolation is bilinear. Parameters are always drawn on the CPU, so that a seed means the same
transformation on every device; the warp is `grid_sample` on a CPU and Kornia's on a GPU.

Reference: Qiu et al., GYM (DeepSweep), arXiv:2012.07006.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from guard.errors import MissingExtraError


def draw_affine(
    count: int, height: int, width: int, shift: float, rotation: float, scale: float, generator: torch.Generator
) -> Tensor:
    """Draw transformations, each parameter uniformly; see `affine_matrices`.

    Args:
        count: B.
        height: Pixels.
        width: Pixels.
        shift: Largest shift as a share of the side, in both directions of both axes.
        rotation: Largest angle in degrees, in both directions.
        scale: Largest relative change of size, in both directions.
        generator: A CPU generator.

    Returns:
        (B, 2, 3), float64: pixel coordinates of the source to pixel coordinates of the result.
    """
    draws = torch.rand(count, 4, generator=generator, dtype=torch.float64)
    return affine_matrices(draws, height, width, shift, rotation, scale)


def affine_matrices(draws: Tensor, height: int, width: int, shift: float, rotation: float, scale: float) -> Tensor:
    """Transformations from uniform draws.

    Args:
        draws: (B, 4), float64, in [0, 1): of angle, size, shift along x and along y.
        height: See `draw_affine`.
        width: See there.
        shift: See there.
        rotation: See there.
        scale: See there.

    Returns:
        (B, 2, 3), float64, as there.
    """
    draws = draws * 2.0 - 1.0
    angle = torch.deg2rad(draws[:, 0] * rotation)
    size = 1.0 + draws[:, 1] * scale
    cosine, sine = size * torch.cos(angle), size * torch.sin(angle)
    centre_x, centre_y = (width - 1) / 2.0, (height - 1) / 2.0
    move_x = centre_x + draws[:, 2] * shift * width - cosine * centre_x - sine * centre_y
    move_y = centre_y + draws[:, 3] * shift * height + sine * centre_x - cosine * centre_y
    return torch.stack([cosine, sine, move_x, -sine, cosine, move_y], dim=1).reshape(-1, 2, 3)


def warp(images: Tensor, matrices: Tensor) -> Tensor:
    """Transform each image.

    Args:
        images: (B, C, H, W), float32.
        matrices: (B, 2, 3), as `draw_affine` gives them.

    Returns:
        The same shape and device.

    Raises:
        MissingExtraError: The images are on a GPU and Kornia is not installed.
    """
    if images.device.type == "cuda":
        return warp_kornia(images, matrices)
    height, width = int(images.shape[-2]), int(images.shape[-1])
    return torch.nn.functional.grid_sample(
        images, sampling_grid(matrices, height, width), mode="bilinear", padding_mode="zeros", align_corners=False
    )


def sampling_grid(matrices: Tensor, height: int, width: int) -> Tensor:
    """Where each pixel of the result comes from, in `grid_sample`'s units; (B, H, W, 2), float32.

    In NumPy, because so little arithmetic takes longer to be asked for in PyTorch than to be done.

    Args:
        matrices: (B, 2, 3), as `draw_affine` gives them.
        height: Pixels.
        width: Pixels.
    """
    a, b, move_x, c, d, move_y = matrices.to("cpu", torch.float64).numpy().reshape(-1, 6).T[:, :, None]
    x, y = np.arange(width) - move_x, np.arange(height) - move_y
    inverse = 1.0 / (a * d - b * c)
    grid = np.empty((len(matrices), height, width, 2), dtype=np.float32)
    from_x, from_y = d * inverse * x, -b * inverse * y
    grid[..., 0] = (from_x[:, None, :] + from_y[:, :, None]) * (2.0 / width) + (1.0 / width - 1.0)
    from_x, from_y = -c * inverse * x, a * inverse * y
    grid[..., 1] = (from_x[:, None, :] + from_y[:, :, None]) * (2.0 / height) + (1.0 / height - 1.0)
    return torch.from_numpy(grid)


def warp_torch(images: Tensor, matrices: Tensor) -> Tensor:
    """`affine_grid` + `grid_sample`, all in float64; `warp` differs from it by about 3e-6."""
    height, width = images.shape[-2:]
    square = torch.zeros(len(matrices), 3, 3, dtype=torch.float64)
    square[:, :2] = matrices.to("cpu", torch.float64)
    square[:, 2, 2] = 1.0
    to_pixels = torch.tensor(
        [[width / 2.0, 0.0, (width - 1) / 2.0], [0.0, height / 2.0, (height - 1) / 2.0], [0.0, 0.0, 1.0]],
        dtype=torch.float64,
    )
    theta = torch.linalg.inv(to_pixels) @ torch.linalg.inv(square) @ to_pixels
    grid = torch.nn.functional.affine_grid(theta[:, :2], list(images.shape), align_corners=False)
    moved = torch.nn.functional.grid_sample(
        images.double(), grid.to(images.device), mode="bilinear", padding_mode="zeros", align_corners=False
    )
    return moved.to(images.dtype)


def warp_kornia(images: Tensor, matrices: Tensor) -> Tensor:
    """Kornia's `warp_affine`, in float64 for the same reason."""
    try:
        from kornia.geometry.transform import warp_affine
    except ImportError as error:
        raise MissingExtraError("kornia", "gpu") from error
    height, width = int(images.shape[-2]), int(images.shape[-1])
    warped: Tensor = warp_affine(
        images.double(), matrices.to(images.device), (height, width), mode="bilinear", padding_mode="zeros", align_corners=True
    )
    return warped.to(images.dtype)
