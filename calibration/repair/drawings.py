"""Drawings: images of nothing, to ask a model with where there are none of its own.

Scenes are clouds (noise whose spectrum falls like a natural image's) with shapes laid over one another, flat or clouded (dead
leaves), and strokes. Edges, colours and textures of all sizes are in them, which is most of what the first layers of a vision
model look for. Figures are a bright stroke or shape or two on black, as digits are.

Which of them resemble a model's images, it says itself: of those that don't, it gives most one label.

Reference: Baradad et al., Learning to see by looking at noise, NeurIPS 2021, arXiv:2106.05963.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Self, final

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calibration.repair.dhbe_settings import ALIKE

_FINER = 3  # drawn so many times as large
_MOST_SHAPES = 25
_STROKED = 0.3  # of the scenes
_SHIFT = 0.25  # of a side
_CONTRAST, _BRIGHTNESS = (0.4, 1.6), 0.2
_ASKED = 512
_GREY_GROUND, _COLOURED, _FILLED, _LAID_OVER, _BLURRED = 0.3, 0.3, 0.2, 0.3, 0.5  # of the figures
_THINNEST, _THICKEST = 1.0 / 32.0, 1.0 / 5.0  # strokes of figures: of a side

_Image = NDArray[np.float32]
Kind = Literal["scenes", "figures"]


@final
class Drawings:
    """A stock of drawings, of which each draw varies some: mirrored, shifted, of other contrast and (scenes) brightness.

    Args:
        shape: (C, H, W).
        count: Of the stock.
        seed: Of the stock.
        kind: Of drawings.
    """

    def __init__(self, shape: tuple[int, int, int], count: int, seed: int, kind: Kind = "scenes") -> None:
        generator = np.random.default_rng(seed)
        draw = _scene if kind == "scenes" else _figures
        self.kind = kind
        self.stock = torch.stack([torch.from_numpy(draw(shape, generator)) for _ in range(count)])

    @classmethod
    def suited(cls, alike: Callable[[Tensor], float], shape: tuple[int, int, int], count: int, seed: int) -> Self:
        """Scenes, unless a model can't tell them apart; then figures, if these it tells apart better.

        Args:
            alike: The share of images, (B, C, H, W), in [0, 1], that the model gives the foremost label.
            shape: (C, H, W).
            count: Of the stock.
            seed: Of the stock.
        """
        scenes = cls(shape, count, seed)
        share = alike(scenes.stock[:_ASKED])
        if share < ALIKE:
            return scenes
        figures = cls(shape, count, seed, "figures")
        return figures if alike(figures.stock[:_ASKED]) < share else scenes

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, C, H, W), float32, in [0, 1]."""
        images = self.stock[torch.randint(len(self.stock), (count,), generator=generator)]
        mirrored = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
        images = torch.where(mirrored, images.flip(3), images)
        most = [int(_SHIFT * side) for side in images.shape[2:]]
        shifts = [int(torch.randint(-side, side + 1, (), generator=generator)) for side in most]
        images = torch.roll(images, shifts, (2, 3))
        contrast, brightness = torch.rand(2, count, 1, 1, 1, generator=generator)
        low, high = _CONTRAST
        contrast = low + (high - low) * contrast
        varied = (images - 0.5) * contrast + 0.5 + _BRIGHTNESS * (2.0 * brightness - 1.0)
        if self.kind == "figures":  # black stays black
            varied = images * contrast
        return torch.clamp(varied, 0.0, 1.0)


def _scene(shape: tuple[int, int, int], generator: np.random.Generator) -> _Image:
    """(C, H, W), float32, in [0, 1]."""
    channels, height, width = shape
    tall, wide = _FINER * height, _FINER * width

    def cloud() -> _Image:
        return _resized(_cloud(shape, generator), tall, wide, cv2.INTER_LINEAR)

    drawing = cloud()
    for _ in range(int(generator.integers(_MOST_SHAPES))):
        mask = _shape(tall, wide, generator)
        flat = generator.uniform(0.0, 1.0, channels).astype(np.float32)
        drawing = np.where(mask[..., None] > 0, flat if generator.random() < 0.5 else cloud(), drawing)
    if generator.random() < _STROKED:
        colour = generator.uniform(0.0, 1.0, channels).astype(np.float32)
        drawing = np.where(_strokes(tall, wide, generator)[..., None] > 0, colour, drawing)
    return np.ascontiguousarray(_resized(drawing, height, width, cv2.INTER_AREA).transpose(2, 0, 1))


def _figures(shape: tuple[int, int, int], generator: np.random.Generator) -> _Image:
    """(C, H, W), float32, in [0, 1], black mostly."""
    channels, height, width = shape
    tall, wide = _FINER * height, _FINER * width

    def colour() -> _Image:
        grey = generator.uniform(0.5, 1.0)
        mixed = generator.uniform(0.3, 1.0, channels) if generator.random() < _COLOURED else np.full(channels, grey)
        return np.asarray(mixed, dtype=np.float32)

    ground = generator.exponential(0.05) if generator.random() < _GREY_GROUND else 0.0
    drawing = np.full((tall, wide, channels), min(ground, 0.3), np.float32)
    for _ in range(1 + int(generator.random() < _LAID_OVER)):
        if generator.random() < _FILLED:
            clouds = _resized(_cloud(shape, generator), tall, wide, cv2.INTER_LINEAR)
            mask, content = _shape(tall, wide, generator), colour() if generator.random() < 0.5 else clouds
        else:
            mask, content = _bent(tall, wide, generator), colour()
        drawing = np.where(mask[..., None] > 0, content, drawing)
    if generator.random() < _BLURRED:
        blurred = cv2.GaussianBlur(drawing, (0, 0), _FINER * generator.uniform(0.2, 1.5))
        drawing = np.asarray(blurred, dtype=np.float32).reshape(drawing.shape)
    return np.ascontiguousarray(_resized(drawing, height, width, cv2.INTER_AREA).transpose(2, 0, 1))


def _resized(image: _Image, height: int, width: int, how: int) -> _Image:
    """(H, W, C) to other H and W; OpenCV drops a single channel."""
    resized = np.asarray(cv2.resize(image, (width, height), interpolation=how), dtype=np.float32)
    return resized.reshape(height, width, image.shape[2])


def _cloud(shape: tuple[int, int, int], generator: np.random.Generator) -> _Image:
    """(H, W, C): noise with a spectrum of 1 / f^a, its channels mixed, around some colour."""
    channels, height, width = shape
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    size = (channels, height, width // 2 + 1)
    spectrum = (generator.normal(size=size) + 1j * generator.normal(size=size)) / frequency ** generator.uniform(0.7, 2.2)
    noise = np.fft.irfft2(spectrum, s=(height, width)).transpose(1, 2, 0)
    mixed = noise @ (0.3 * generator.normal(size=(channels, channels)) + generator.uniform(0.3, 1.0))
    strength = generator.uniform(0.02, 0.25) / (mixed.std() + 1e-6)
    cloud: _Image = np.clip(generator.uniform(0.0, 1.0, channels) + strength * mixed, 0.0, 1.0).astype(np.float32)
    return cloud


def _shape(height: int, width: int, generator: np.random.Generator) -> NDArray[np.uint8]:
    """(H, W): 1 in an ellipse, a rectangle or a polygon; small ones are frequent, as those far away are in a scene."""
    mask = np.zeros((height, width), np.uint8)
    x, y = int(generator.integers(width)), int(generator.integers(height))
    radius = 2 + int(min(0.6 * min(height, width), _FINER / generator.uniform(0.03, 1.0)))
    flat = generator.uniform(0.3, 1.0)
    kind = generator.integers(3)
    if kind == 0:
        axes = (radius, max(2, int(radius * flat)))
        cv2.ellipse(mask, (x, y), axes, generator.uniform(0.0, 180.0), 0.0, 360.0, 1, -1)
        return mask
    if kind == 1:
        box = cv2.boxPoints(((float(x), float(y)), (2.0 * radius, 2.0 * radius * flat), generator.uniform(0.0, 90.0)))
        corners = box.astype(np.int32)
    else:
        angles = np.sort(generator.uniform(0.0, 2.0 * np.pi, int(generator.integers(3, 7))))
        corners = np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], axis=1).astype(np.int32)
    cv2.fillPoly(mask, [corners], 1)
    return mask


def _strokes(height: int, width: int, generator: np.random.Generator) -> NDArray[np.uint8]:
    """(H, W): 1 on a bent line or two, as of handwriting."""
    mask = np.zeros((height, width), np.uint8)
    for _ in range(int(generator.integers(1, 3))):
        steps = generator.normal(0.0, 0.2, (int(generator.integers(3, 7)), 2)).cumsum(axis=0)
        points = (np.array([width, height]) * (0.5 + steps)).astype(np.int32)
        cv2.polylines(mask, [points], False, 1, int(generator.integers(2, 5)) * _FINER // 2)
    return mask


def _bent(height: int, width: int, generator: np.random.Generator) -> NDArray[np.uint8]:
    """(H, W): 1 on a bent line in the middle, thin or thick, angular or round, closed or not."""
    points = generator.normal(size=(int(generator.integers(3, 8)), 2)).cumsum(axis=0)
    low, high = points.min(axis=0), points.max(axis=0)
    points = (points - (low + high) / 2.0) / max(1e-6, float((high - low).max())) * generator.uniform(0.4, 0.95)
    if generator.random() < 0.5:
        for _ in range(3):  # Chaikin's corners
            ends, before, after = points[[0, -1]], points[:-1], points[1:]
            cut = np.stack([0.75 * before + 0.25 * after, 0.25 * before + 0.75 * after], axis=1).reshape(-1, 2)
            points = np.concatenate([ends[:1], cut, ends[1:]])
    thick = np.exp(generator.uniform(np.log(_THINNEST), np.log(_THICKEST)))
    mask = np.zeros((height, width), np.uint8)
    line = (np.array([width, height]) * (0.5 + points + generator.normal(0.0, 0.05, 2))).astype(np.int32)
    cv2.polylines(mask, [line], bool(generator.random() < 0.2), 1, max(1, round(thick * min(height, width))))
    return mask
