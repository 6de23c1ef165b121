"""Images as everything in here sees them, and how a user's world maps to that.

Inside, images are float32 tensors (B, C, H, W), RGB, in [0, 1], before the model's own normalisation. All blending and
filtering happens in that pixel space. An `InputSpec` says how a particular model's inputs map to it.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from guard.choices import check_choice
from guard.errors import InputError

Layout = Literal["NCHW", "NHWC", "NHW", "flat"]
"""Axis order: `NHW` has no channel axis (grey only), `flat` is one row of features per image (grey only)."""

DType = Literal["uint8", "float32"]
"""Value range of the model's input: `uint8` is 0..255, `float32` is 0..1."""

Container = Literal["numpy", "torch"]
Array = NDArray[np.generic] | Tensor

_Size = Annotated[int, msgspec.Meta(le=2**31 - 1)]  # of more pixels, sizes in bytes would not be numbers to reckon with

_RANGE_SLACK = 1e-4
_WIDEST = 8  # bytes of a number that PyTorch has a type for


class InputSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a model takes: size, axis order, value type, normalisation.

    Args:
        channels: 1 (grey) or 3 (RGB); other counts work for arrays, not for image files.
        height: Pixels.
        width: Pixels.
        layout: Axis order of the model's input.
        dtype: `uint8` for 0..255, `float32` for 0..1.
        container: Array library that the model takes.
        mean: Per channel, subtracted from images in [0, 1]; empty for none. Only with `float32`.
        std: Per channel, divides after the mean; empty for none. Only with `float32`.
        class_names: In label order; empty when unknown.
        resize: Bring images of another size to this one (bilinear) instead of refusing them.

    Raises:
        InputError: The fields contradict each other.
    """

    channels: _Size
    height: _Size
    width: _Size
    layout: Layout = "NCHW"
    dtype: DType = "float32"
    container: Container = "torch"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    class_names: tuple[str, ...] = ()
    resize: bool = False

    def __post_init__(self) -> None:
        """Refuse contradictions once, here."""
        for name, value, known in (
            ("layout", self.layout, Layout), ("dtype", self.dtype, DType), ("container", self.container, Container)
        ):  # fmt: skip
            check_choice(name, value, known)
        if min(self.channels, self.height, self.width) < 1:
            raise InputError(f"expected a positive image shape C,H,W, got {','.join(map(str, self.shape))}")
        if self.layout in ("NHW", "flat") and self.channels != 1:
            raise InputError(f"layout {self.layout} is for grey images, got {self.channels} channels: use NCHW or NHWC")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values and len(values) != self.channels:
                raise InputError(f"expected {self.channels} values of {name}, one per channel, got {len(values)}")
            if values and self.dtype == "uint8":
                raise InputError(f"{name} applies to float inputs; a model that takes uint8 normalises by itself")
        if any(not np.isfinite(value) for value in (*self.mean, *self.std)) or any(value <= 0 for value in self.std):
            raise InputError(f"expected finite mean and positive std, got mean {self.mean}, std {self.std}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return (self.channels, self.height, self.width)

    def label_name(self, index: int) -> str:
        """The class's name, or its index as text when names are unknown."""
        return self.class_names[index] if 0 <= index < len(self.class_names) else str(index)

    def check(self, images: Tensor) -> None:
        """Raise unless `images` is a batch that this specification describes.

        Args:
            images: (B, C, H, W), float32, in [0, 1].

        Raises:
            InputError: Wrong shape, type or range, NaN or infinite values, or an empty batch.
        """
        check_images(images)
        if tuple(images.shape[1:]) != self.shape:
            got = ", ".join(map(str, images.shape[1:]))
            expected = ", ".join(map(str, self.shape))
            raise InputError(f"expected images of shape ({expected}), got ({got}): resize or convert them first")

    def to_model(self, images: Tensor, *, keep: bool = True) -> Array:
        """Map images to what the model takes.

        Args:
            images: (B, C, H, W), float32, in [0, 1].
            keep: They are needed afterwards, and models may work in place: the result shares no memory with them.

        Returns:
            The same images in the model's layout, type, normalisation and array library.
        """
        batch = images
        if self.mean:
            batch = batch - batch.new_tensor(self.mean).view(1, -1, 1, 1)
        if self.std:
            batch = batch / batch.new_tensor(self.std).view(1, -1, 1, 1)
        if self.dtype == "uint8":
            batch = batch.mul(255.0).round_().clamp_(0, 255).to(torch.uint8)
        if self.layout == "NHWC":
            batch = batch.permute(0, 2, 3, 1).contiguous()
        elif self.layout == "NHW":
            batch = batch[:, 0]
        elif self.layout == "flat":
            batch = batch.flatten(1)
        if keep and batch.untyped_storage().data_ptr() == images.untyped_storage().data_ptr():
            batch = batch.clone()
        return batch.cpu().numpy() if self.container == "numpy" else batch

    def from_model(self, batch: Array) -> Tensor:
        """Map what the model takes back to images: the inverse of `to_model`.

        Args:
            batch: A batch as the user's predict function takes it.

        Returns:
            (B, C, H, W), float32, in [0, 1].

        Raises:
            InputError: Wrong number of axes, shape or type.
        """
        expected_axes = {"NCHW": 4, "NHWC": 4, "NHW": 3, "flat": 2}[self.layout]
        if not isinstance(batch, (np.ndarray, Tensor)) or batch.ndim != expected_axes:
            got = f"{type(batch).__name__} of shape {tuple(getattr(batch, 'shape', ()))}"
            raise InputError(f"expected a {self.layout} array with {expected_axes} axes, got {got}: add a batch axis?")
        tensor = _to_tensor(batch)
        if self.dtype == "uint8" and tensor.dtype != torch.uint8:
            raise InputError(f"expected uint8 values 0..255, got {batch.dtype}: convert the batch to uint8")
        if self.dtype == "float32" and not tensor.dtype.is_floating_point:
            raise InputError(f"expected floating-point values, got {batch.dtype}: divide by 255 first")
        images = tensor.to(torch.float32)
        if self.layout == "NHWC":
            images = images.permute(0, 3, 1, 2).contiguous()
        elif self.layout == "NHW":
            images = images.unsqueeze(1)
        elif self.layout == "flat":
            if images.shape[1] != self.height * self.width:
                raise InputError(f"expected rows of {self.height * self.width} values, got {images.shape[1]}")
            images = images.reshape(-1, 1, self.height, self.width)
        if self.dtype == "uint8":
            return images / 255.0
        if images.ndim == 4 and images.shape[1] == self.channels:
            if self.std:
                images = images * images.new_tensor(self.std).view(1, -1, 1, 1)
            if self.mean:
                images = images + images.new_tensor(self.mean).view(1, -1, 1, 1)
        if tensor.dtype in (torch.float16, torch.bfloat16):  # which black and white need not survive
            within, slack = images.clamp(0.0, 1.0), torch.finfo(tensor.dtype).eps
            images = torch.where((images - within).abs() <= slack, within, images)
        return images


def _to_tensor(batch: Array) -> Tensor:
    if isinstance(batch, Tensor):
        return batch.detach()
    if batch.dtype.kind not in "fiub":
        raise InputError(f"expected an array of numbers, got {batch.dtype}: convert the batch")
    if batch.dtype.kind == "f" and batch.dtype.itemsize > _WIDEST:
        batch = batch.astype(np.float64)
    native = np.ascontiguousarray(batch, dtype=batch.dtype.newbyteorder("="))
    return torch.from_numpy(native if native.flags.writeable else native.copy())


def check_images(images: Tensor) -> None:
    """Raise unless `images` is a non-empty float32 batch (B, C, H, W) of finite values in [0, 1].

    Raises:
        InputError: It says what arrived instead.
    """
    if not isinstance(images, Tensor):
        raise InputError(f"expected images as a tensor (B, C, H, W), got {type(images).__name__}")
    if images.ndim != 4:
        hint = ": add a batch axis" if images.ndim == 3 else ""
        raise InputError(f"expected images (B, C, H, W), got {tuple(images.shape)}{hint}")
    if images.shape[0] == 0:
        raise InputError("expected at least one image, got an empty batch (B = 0): skip the call when there is nothing")
    if images.numel() == 0 or images.layout != torch.strided:
        raise InputError(f"expected dense images with pixels, got {tuple(images.shape)}, {images.layout}")
    if images.dtype != torch.float32:
        raise InputError(f"expected float32 images in [0, 1], got {images.dtype}: convert, and divide uint8 by 255")
    low, high = (float(value) for value in torch.aminmax(images.detach()))
    if not (np.isfinite(low) and np.isfinite(high)):
        raise InputError("expected finite pixel values, got NaN or Inf: drop or repair those images")
    if low < -_RANGE_SLACK or high > 1.0 + _RANGE_SLACK:
        raise InputError(f"expected pixel values in [0, 1], got {low:.4g} to {high:.4g}: undo normalisation, scale to 0..1")
