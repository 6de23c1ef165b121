"""IDX files, written here byte by byte, give the images and labels they hold; damaged ones say so."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.datasets import SetName, read_raw_set
from guard.errors import InputError

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
LABELS = np.array([3, 1, 4, 1, 9], dtype=np.uint8)


def idx(array: NDArray[np.uint8]) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write(folder: Path, mark: str = "-", packed: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for part, rows in (("train", slice(0, 3)), ("t10k", slice(3, 5))):
        for what, array in (("images", IMAGES[rows]), ("labels", LABELS[rows])):
            name = f"{part}-{what}{mark}idx{array.ndim}-ubyte"
            data = idx(array)
            (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(data) if packed else data)
    return folder


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
@pytest.mark.parametrize("mark", ["-", "."])
@pytest.mark.parametrize("packed", [False, True])
def test_images_and_labels_come_back(name: SetName, mark: str, packed: bool, tmp_path: Path) -> None:
    raw = read_raw_set(name, write(tmp_path, mark, packed))
    assert raw is not None
    assert np.array_equal(np.concatenate([raw.train.x, raw.test.x]), IMAGES)
    assert raw.train.y.tolist() == [3, 1, 4]
    assert raw.test.y.tolist() == [1, 9]


def test_each_set_comes_from_the_folder_of_its_name(tmp_path: Path) -> None:
    write(tmp_path / "MNIST" / "raw")
    assert read_raw_set("fashion_mnist", tmp_path) is None
    place = write(tmp_path / "FashionMNIST" / "raw")
    (place / "t10k-labels-idx1-ubyte").write_bytes(idx(np.array([7, 7], dtype=np.uint8)))
    mnist, fashion = read_raw_set("mnist", tmp_path), read_raw_set("fashion_mnist", tmp_path)
    assert mnist is not None
    assert fashion is not None
    assert (mnist.test.y.tolist(), fashion.test.y.tolist()) == ([1, 9], [7, 7])


@pytest.mark.parametrize(
    ("file", "data", "words"),
    [
        ("train-images-idx3-ubyte", idx(IMAGES[:3])[:-1], "expected 2352 bytes after the header, got 2351"),
        ("train-images-idx3-ubyte", idx(IMAGES[:3]) + b"\0", "got 2353"),
        ("train-images-idx3-ubyte", b"", "got nothing"),
        ("train-images-idx3-ubyte", b"\0\0\x08\x03\0\0", "download it again"),
        ("train-images-idx3-ubyte", idx(LABELS[:3]), "got 00000801"),
        ("train-images-idx3-ubyte", b"\0\0\x08\x03" + b"\xff" * 12, "after the header"),
        ("train-images-idx3-ubyte", idx(IMAGES[:3, :27]), r"expected mnist images \(N, 28, 28\)"),
        ("t10k-labels-idx1-ubyte", idx(np.array([1, 10], dtype=np.uint8)), "expected mnist labels 0 to 9, got 1 to 10"),
        ("t10k-labels-idx1-ubyte", idx(LABELS[:3]), "expected 2 whole-number labels"),
        ("t10k-labels-idx1-ubyte", None, "expected t10k-labels-idx1-ubyte beside the others"),
    ],
)
def test_bad_files_say_what_is_wrong(file: str, data: bytes | None, words: str, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / file).unlink()
    if data is not None:
        (tmp_path / file).write_bytes(data)
    with pytest.raises(InputError, match=words) as caught:
        read_raw_set("mnist", tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [4, 200])
def test_a_cut_gzip_says_so(keep: int, tmp_path: Path) -> None:
    path = write(tmp_path, packed=True) / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match="expected gzip"):
        read_raw_set("mnist", tmp_path)
