"""`.npz` sets, plain and as WebP strips, come back; others are refused."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from benchmarks.datasets import read_raw_set
from benchmarks.formats.npz import write_npz
from guard.errors import InputError

COLOUR = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
LABELS = np.array([0, 9, 1, 2, 3, 4], dtype=np.uint8)


def strips(images: NDArray[np.uint8], each: int) -> dict[str, NDArray[np.generic]]:
    packed = []
    for start in range(0, len(images), each):
        buffer = io.BytesIO()
        Image.fromarray(images[start : start + each].reshape(-1, 32, 3)).save(buffer, "WEBP", lossless=True, exact=True)
        packed.append(buffer.getvalue())
    offsets = np.cumsum([0, *map(len, packed)])
    data = np.frombuffer(b"".join(packed), np.uint8)
    return {"x_train_webp": data, "x_train_offsets": offsets, "x_train_shape": np.array(images.shape)}


def plain() -> dict[str, NDArray[np.generic]]:
    return {"x_train": COLOUR[:4], "y_train": LABELS[:4], "x_test": COLOUR[4:], "y_test": LABELS[4:, None]}


def test_a_plain_file_comes_back_and_can_be_written_again(tmp_path: Path) -> None:
    np.savez(tmp_path / "cifar10.npz", allow_pickle=False, **plain())
    first = read_raw_set("cifar10", tmp_path)
    assert first is not None
    second = read_raw_set("cifar10", write_npz(first, tmp_path / "new").parent)
    assert second is not None
    for raw in (first, second):
        assert np.array_equal(raw.train.x, COLOUR[:4])
        assert np.array_equal(raw.test.x, COLOUR[4:])
        assert (raw.train.y.tolist(), raw.test.y.tolist()) == ([0, 9, 1, 2], [3, 4])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["cifar10.npz"]


def test_webp_strips_come_back_exactly(tmp_path: Path) -> None:
    arrays = plain()
    del arrays["x_train"]
    np.savez(
        tmp_path / "gtsrb.webp.npz",
        allow_pickle=False,
        **arrays,
        **strips(COLOUR[:4], 3),
        track_train=np.array([0, 0, 1, 2], dtype=np.uint8),
    )
    raw = read_raw_set("gtsrb", tmp_path)
    assert raw is not None
    assert np.array_equal(raw.train.x, COLOUR[:4])
    assert raw.tracks is not None
    assert raw.tracks.tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"y_test": None}, "add y_test"),
        ({"y_train": LABELS[:3]}, "expected 4 whole-number labels"),
        ({"y_train": LABELS[:4] + np.uint8(1)}, "labels 0 to 9, got 1 to 10"),
        ({"y_train": LABELS[:4].astype(np.float32)}, "whole-number labels"),
        ({"x_train": COLOUR[:4] / 255.0}, "uint8, got"),
        ({"x_train": COLOUR[:4, :28, :28, 0]}, r"images \(N, 32, 32, 3\)"),
        ({"x_train": COLOUR[:0], "y_train": LABELS[:0]}, "expected cifar10 images"),
        ({"track_train": np.array([1])}, "as track_train"),
        ({"x_train_webp": np.array([1, 2], dtype=np.uint8)}, "expected x_train_webp as WebP strips"),
        ({**strips(COLOUR[:4], 2), "x_train_shape": np.array([4, 31, 32, 3])}, "expected x_train_webp as WebP strips"),
    ],
)
def test_other_arrays_are_refused(changed: dict[str, NDArray[np.generic] | None], words: str, tmp_path: Path) -> None:
    arrays = {name: array for name, array in {**plain(), **changed}.items() if array is not None}
    np.savez(tmp_path / "cifar10.npz", allow_pickle=False, **arrays)
    with pytest.raises(InputError, match=words) as caught:
        read_raw_set("cifar10", tmp_path)
    assert "\n" not in str(caught.value)


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cifar10.npz"
    np.savez(path, allow_pickle=False, **plain())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"cifar10\.npz"):
        read_raw_set("cifar10", tmp_path)
