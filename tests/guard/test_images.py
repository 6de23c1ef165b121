from __future__ import annotations

import math
from itertools import product
from typing import Any, cast, get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from guard.errors import InputError
from guard.images import Array, Container, DType, InputSpec, Layout, check_images

NORMALISED: dict[str, Any] = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.5)}


def exact_images(spec: InputSpec, count: int = 3) -> Tensor:
    """Images that uint8 holds exactly."""
    levels = torch.randint(0, 256, (count, *spec.shape), generator=torch.Generator().manual_seed(0))
    return levels.to(torch.float32) / 255.0


LAYOUTS = [
    (layout, channels)
    for layout, channels in product(get_args(Layout), (1, 3, 4))
    if channels == 1 or layout in ("NCHW", "NHWC")
]


@pytest.mark.parametrize(("layout", "channels"), LAYOUTS)
@pytest.mark.parametrize("container", get_args(Container))
@pytest.mark.parametrize("dtype", get_args(DType))
def test_from_model_undoes_to_model(layout: Layout, channels: int, container: Container, dtype: DType) -> None:
    spec = InputSpec(channels=channels, height=5, width=7, layout=layout, container=container, dtype=dtype)
    images = exact_images(spec)
    before = images.clone()
    batch = spec.to_model(images)
    shapes: dict[Layout, tuple[int, ...]] = {
        "NCHW": (3, channels, 5, 7), "NHWC": (3, 5, 7, channels), "NHW": (3, 5, 7), "flat": (3, 35),
    }  # fmt: skip
    assert tuple(batch.shape) == shapes[layout]
    assert isinstance(batch, np.ndarray) == (container == "numpy")
    assert str(batch.dtype).removeprefix("torch.") == dtype
    torch.testing.assert_close(spec.from_model(batch), images, atol=1e-7, rtol=0)
    assert torch.equal(images, before)


def test_axes_go_where_the_layout_says() -> None:
    image = torch.zeros(1, 3, 2, 4)
    image[0, 2, 1, 3] = 1.0
    nhwc = InputSpec(channels=3, height=2, width=4, layout="NHWC", container="numpy").to_model(image)
    assert nhwc[0, 1, 3, 2] == 1
    flat = InputSpec(channels=1, height=2, width=4, layout="flat").to_model(image[:, 2:])
    assert flat[0].tolist() == [0, 0, 0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("fields", [NORMALISED, {"mean": NORMALISED["mean"]}, {"std": NORMALISED["std"]}])
def test_normalisation_is_undone(layout: Layout, fields: dict[str, Any]) -> None:
    spec = InputSpec(channels=3, height=5, width=7, layout=layout, **fields)
    images = exact_images(spec)
    spec.check(spec.from_model(spec.to_model(images)))
    torch.testing.assert_close(spec.from_model(spec.to_model(images)), images, atol=1e-6, rtol=0)


def test_normalisation_by_hand() -> None:
    spec = InputSpec(channels=3, height=1, width=1, **NORMALISED)
    model = spec.to_model(torch.tensor([0.5, 0.5, 0.5]).reshape(1, 3, 1, 1))
    torch.testing.assert_close(torch.as_tensor(model).flatten(), torch.tensor([0.5, 0.0, -0.2]))


def test_uint8_rounds_and_clamps() -> None:
    spec = InputSpec(channels=1, height=1, width=4, dtype="uint8", container="numpy")
    batch = spec.to_model(torch.tensor([-0.00005, 0.5, 0.999, 1.00005]).reshape(1, 1, 1, 4))
    assert batch.flatten().tolist() == [0, 128, 255, 255]


@pytest.mark.parametrize("layout", get_args(Layout))
@pytest.mark.parametrize("container", get_args(Container))
def test_models_get_a_copy(layout: Layout, container: Container) -> None:
    spec = InputSpec(channels=1, height=3, width=3, layout=layout, container=container)
    images = exact_images(spec)
    before = images.clone()
    spec.to_model(images)[...] = 0
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    "batch",
    [
        np.full((2, 3, 4), 0.5, dtype=np.float16),
        np.full((2, 3, 4), 0.5, dtype=np.float64),
        np.full((2, 3, 4), 0.5, dtype=">f4"),
        np.full((2, 4, 3), 0.5, dtype=np.float32).transpose(0, 2, 1),
        np.full((2, 3, 4), 0.5, dtype=np.float32)[::-1, ::-1],
        torch.full((2, 3, 4), 0.5, dtype=torch.bfloat16),
        torch.full((2, 3, 4), 0.5, requires_grad=True),
    ],
)
def test_floats_of_every_kind_are_understood(batch: Array) -> None:
    images = InputSpec(channels=1, height=3, width=4, layout="NHW").from_model(batch)
    assert torch.equal(images, torch.full((2, 1, 3, 4), 0.5))


def test_read_only_arrays_are_read_without_a_warning() -> None:
    batch: NDArray[np.float32] = np.full((2, 3, 4), 0.5, dtype=np.float32)
    batch.flags.writeable = False
    assert InputSpec(channels=1, height=3, width=4, layout="NHW").from_model(batch).shape == (2, 1, 3, 4)


FLOATS = InputSpec(channels=3, height=4, width=5)


@pytest.mark.parametrize(
    ("spec", "batch", "message"),
    [
        (FLOATS, np.zeros((3, 4, 5), np.float32), "expected a NCHW array with 4 axes.*add a batch axis"),
        (FLOATS, [[1.0]], "got list"),
        (FLOATS, None, "got NoneType"),
        (FLOATS, np.zeros((1, 3, 4, 5), np.uint8), "floating-point.*divide by 255"),
        (FLOATS, torch.zeros(1, 3, 4, 5, dtype=torch.int64), "floating-point"),
        (FLOATS, np.zeros((1, 3, 4, 5), np.complex64), "array of numbers, got complex64"),
        (FLOATS, np.full((1, 3, 4, 5), "a"), "array of numbers"),
        (FLOATS, np.full((1, 3, 4, 5), None), "array of numbers, got object"),
        (InputSpec(channels=1, height=4, width=5, layout="flat"), np.zeros((2, 19), np.float32), "rows of 20 values, got 19"),
        (InputSpec(channels=1, height=4, width=5, layout="NHW"), np.zeros((4, 5), np.float32), "3 axes"),
        (InputSpec(channels=1, height=4, width=5, dtype="uint8"), np.zeros((1, 1, 4, 5), np.float32), "uint8 values"),
        (InputSpec(channels=1, height=4, width=5, dtype="uint8"), np.zeros((1, 1, 4, 5), np.int16), "uint8 values"),
    ],
)
def test_batches_that_are_not_what_the_model_takes(spec: InputSpec, batch: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        spec.from_model(batch)


@pytest.mark.parametrize("shape", [(2, 1, 4, 5), (2, 4, 5, 3), (2, 3, 5, 4)])
def test_wrong_shapes_are_refused_after_conversion(shape: tuple[int, ...]) -> None:
    spec = InputSpec(channels=3, height=4, width=5, **NORMALISED)
    with pytest.raises(InputError, match="expected images of shape"):
        spec.check(spec.from_model(np.full(shape, 0.5, np.float32)))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.full((1, 3, 4, 5), math.nan), "NaN or Inf"),
        (torch.full((1, 3, 4, 5), math.inf), "NaN or Inf"),
        (torch.full((1, 3, 4, 5), -math.inf), "NaN or Inf"),
        (torch.full((1, 3, 4, 5), 1.1), r"in \[0, 1\], got 1.1 to 1.1"),
        (torch.full((1, 3, 4, 5), -0.1), r"in \[0, 1\]"),
        (torch.zeros(0, 3, 4, 5), r"empty batch \(B = 0\)"),
        (torch.zeros(3, 4, 5), "add a batch axis"),
        (torch.zeros(1, 1, 3, 4, 5), "expected images"),
        (torch.zeros(1, 1, 4, 5), r"shape \(3, 4, 5\), got \(1, 4, 5\)"),
        (torch.zeros(1, 3, 5, 4), r"shape \(3, 4, 5\)"),
        (torch.zeros(1, 3, 0, 5), "with pixels"),
        (torch.zeros(1, 3, 4, 5).to_sparse(), "dense"),
        (torch.zeros(1, 3, 4, 5, dtype=torch.float64), "float32"),
        (torch.zeros(1, 3, 4, 5, dtype=torch.uint8), "divide uint8 by 255"),
        (np.zeros((1, 3, 4, 5), np.float32), "got ndarray"),
        (None, "got NoneType"),
    ],
)
def test_images_that_are_none(images: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        FLOATS.check(images)


def test_one_bad_pixel_anywhere_is_seen() -> None:
    for bad in (math.nan, math.inf, -1.0, 2.0):
        images = torch.full((5, 3, 4, 5), 0.5)
        images[4, 2, 3, 4] = bad
        with pytest.raises(InputError):
            check_images(images)


def test_rounding_noise_and_gradients_are_tolerated() -> None:
    check_images(torch.tensor([-1e-5, 1 + 1e-5]).reshape(1, 1, 1, 2))
    check_images(torch.zeros(1, 1, 2, 2, requires_grad=True))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"channels": 0}, "positive image shape"),
        ({"height": -1}, "positive image shape"),
        ({"layout": "NHW"}, "grey images"),
        ({"layout": "flat"}, "grey images"),
        ({"layout": "nhwc"}, "expected layout to be one of NCHW, NHWC, NHW, flat, got 'nhwc'"),
        ({"dtype": "float64"}, "expected dtype to be one of"),
        ({"container": "jax"}, "expected container to be one of"),
        ({"mean": (0.5,)}, "3 values of mean"),
        ({"std": (1.0, 1.0)}, "3 values of std"),
        ({"std": (1.0, 1.0, 0.0)}, "positive std"),
        ({"std": (1.0, 1.0, math.nan)}, "positive std"),
        ({"mean": (0.0, 0.0, math.inf)}, "finite mean"),
        ({"mean": (0.5, 0.5, 0.5), "dtype": "uint8"}, "normalises by itself"),
    ],
)
def test_contradictory_specs(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        InputSpec(**{"channels": 3, "height": 4, "width": 5, **fields})


def test_labels_have_names_or_numbers() -> None:
    spec = InputSpec(channels=1, height=1, width=1, class_names=("cat", "dog"))
    assert [spec.label_name(index) for index in (-1, 0, 1, 2)] == ["-1", "cat", "dog", "2"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_black_and_white_survive_half_precision(dtype: torch.dtype) -> None:
    spec = InputSpec(channels=3, height=4, width=4, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    images = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4), torch.full((3, 4, 4), 0.3)])
    batch = cast(Tensor, spec.to_model(images)).to(dtype)
    found = spec.from_model(batch)
    spec.check(found)
    torch.testing.assert_close(found, images, atol=torch.finfo(dtype).eps, rtol=0.0)
    with pytest.raises(InputError, match=r"in \[0, 1\]"):
        spec.check(spec.from_model(batch * 2.0))


def test_extended_precision_is_taken() -> None:
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    spec = InputSpec(channels=1, height=8, width=8)
    torch.testing.assert_close(spec.from_model(images.numpy().astype(np.longdouble)), images)
