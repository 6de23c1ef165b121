"""Bytes of an image file to one image tensor, without trusting them.

The header is checked against the pixel limit before a single pixel is decoded: 17 KB of PNG can hold 144 megapixels.
"""

from __future__ import annotations

import io
from typing import Literal

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile
from torch import Tensor

from guard.errors import ImageError, InputError, TooLargeError, WrongSizeError, one_line
from guard.headers import check_header
from guard.images import InputSpec

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "PPM")
"""Formats that are decoded. Anything else (TIFF, PSD, ...) widens the attack surface and is refused."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm")
"""Names by which those are found in a folder."""

_BITS, _GREY, _RGB = 8, 0, 2  # of a PNG's header

_NAMES = "JPEG, PNG, BMP, GIF, WebP or PPM"


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one request may cost before it is looked at.

    Args:
        max_bytes: Size of an encoded image.
        max_pixels: Width times height, read from the header before decoding; up to Pillow's own limit, 178 million.

    Raises:
        InputError: More pixels than Pillow decodes.
    """

    max_bytes: int = 10 * 1024 * 1024
    max_pixels: int = 16_000_000

    def __post_init__(self) -> None:
        """Refuse what could not be kept."""
        if Image.MAX_IMAGE_PIXELS is not None and self.max_pixels > (most := 2 * Image.MAX_IMAGE_PIXELS):
            raise InputError(f"expected max_pixels of at most {most}, Pillow's own limit, got {self.max_pixels}: give it less")


def decode_image(data: bytes | bytearray | memoryview, spec: InputSpec, limits: Limits | None = None) -> Tensor:
    """Decode one image file and bring it to the model's channels and size.

    Grey becomes RGB and RGB becomes grey (ITU-R 601 luma) as the model needs; palettes and CMYK become RGB; 16-bit grey
    keeps its precision; an alpha channel is dropped when it is opaque throughout and refused otherwise, because what
    lies under transparency is not what a person sees. The first frame of an animation counts.

    Args:
        data: The encoded file.
        spec: The model's input.
        limits: Byte and pixel limits; the defaults when None.

    Returns:
        (C, H, W), float32, in [0, 1].

    Raises:
        ImageError: Not an image, truncated, or not convertible to the model's channels and size.
        TooLargeError: Over a limit.
    """
    limits = limits or Limits()
    if len(data) == 0:
        raise ImageError(f"expected an image ({_NAMES}), got 0 bytes")
    if len(data) > limits.max_bytes:
        raise TooLargeError(f"expected at most {limits.max_bytes} bytes, got {len(data)}: send a smaller image")
    check_header(bytes(data))
    image = _open(data, limits)
    if image.size != (spec.width, spec.height) and not spec.resize:
        width, height = image.size
        raise WrongSizeError(f"expected {spec.width}x{spec.height} pixels, got {width}x{height}: resize the image first")
    try:
        image.load()
    except Exception as error:  # Pillow's readers raise whatever they stumble over
        raise ImageError(f"expected a complete image, got one that can't be decoded ({one_line(error)})") from error
    if "transparency" in image.info and _is_of_another_depth(bytes(data[:26])):
        raise ImageError("expected an opaque image, got one with a transparent colour: flatten it onto a background")
    return torch.from_numpy(_to_array(image, spec)).permute(2, 0, 1).contiguous()


def count_pixels(data: bytes | bytearray | memoryview, limits: Limits | None = None) -> int:
    """Width times height of an image file, by its header alone.

    Raises:
        ImageError: Not an image.
        TooLargeError: Over a limit.
    """
    check_header(bytes(data))
    width, height = _open(data, limits or Limits()).size
    return width * height


def _open(data: bytes | bytearray | memoryview, limits: Limits) -> ImageFile.ImageFile:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooLargeError(f"expected at most {limits.max_pixels} pixels, got far more: send a smaller image") from error
    except Exception as error:  # Pillow's readers raise whatever they stumble over
        raise ImageError(f"expected an image ({_NAMES}), got {len(data)} bytes that are none") from error
    width, height = image.size
    if width * height > limits.max_pixels:
        raise TooLargeError(f"expected at most {limits.max_pixels} pixels, got {width}x{height}: send a smaller image")
    return image


def _is_of_another_depth(header: bytes) -> bool:
    """Of a PNG whose transparent colour is told in its own depth, which Pillow compares with pixels of 8 bits."""
    depth, colours = header[24], header[25]
    return header.startswith(b"\x89PNG") and depth != _BITS and colours in (_GREY, _RGB)


def _to_array(image: Image.Image, spec: InputSpec) -> NDArray[np.float32]:
    """(H, W, C) in [0, 1], at the model's size."""
    if spec.channels not in (1, 3):
        raise ImageError(
            f"expected arrays with {spec.channels} channels for this model, got an image file: call it with arrays"
        )
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):  # which Pillow scales to 16 bits
        grey = np.asarray(image).astype(np.float32) / 65535.0
        return _fit(np.repeat(grey[:, :, None], spec.channels, axis=2), spec)
    if image.mode in ("I", "F"):
        raise ImageError(f"expected 8-bit or 16-bit grey or colour, got 32-bit pixels (mode {image.mode}): convert the image")
    if image.mode == "1":
        image = image.convert("L")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            raise ImageError("expected an opaque image, got one with transparent pixels: flatten it onto a background")
        image = image.convert("RGB")
    wanted: Literal["L", "RGB"] = "L" if spec.channels == 1 else "RGB"
    if image.mode != wanted:
        image = image.convert(wanted)
    pixels = np.asarray(image, dtype=np.float32) / np.float32(255.0)
    return _fit(pixels.reshape(image.height, image.width, spec.channels), spec)


def _fit(pixels: NDArray[np.float32], spec: InputSpec) -> NDArray[np.float32]:
    if pixels.shape[:2] == (spec.height, spec.width):
        return np.ascontiguousarray(pixels)
    planes = [
        np.asarray(Image.fromarray(pixels[:, :, channel]).resize((spec.width, spec.height), Image.Resampling.BILINEAR))
        for channel in range(pixels.shape[2])
    ]
    fitted: NDArray[np.float32] = np.clip(np.stack(planes, axis=2), np.float32(0.0), np.float32(1.0))
    return fitted
