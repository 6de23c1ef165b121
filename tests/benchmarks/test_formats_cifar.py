"""CIFAR's two versions, written here byte by byte: both give the same images, and no pickle is ever run.

The pickles are assembled from opcodes as Python 2's numpy wrote them in the official files, and as Python 3's writes them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.datasets import SetName, read_raw_set
from benchmarks.formats.pickled_data import NotPlainDataError, read_pickled_data
from benchmarks.formats.raw_set import RawSet
from guard.errors import InputError

Batch = tuple[NDArray[np.uint8], list[int]]

FILES: dict[SetName, tuple[str, ...]] = {
    "cifar10": (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"),
    "cifar100": ("train", "test"),
}
MOST = {"cifar10": 10, "cifar100": 100}


def batches(name: SetName) -> list[Batch]:
    """Three images for each file: (3, 3072) and labels, the highest one among them."""
    generator = np.random.default_rng(7)
    return [
        (
            generator.integers(0, 256, (3, 3072), dtype=np.uint8),
            [0, *generator.integers(0, MOST[name], 1).tolist(), MOST[name] - 1],
        )
        for _ in FILES[name]
    ]


def text(value: str) -> bytes:
    """A Python 2 string."""
    return b"U" + bytes((len(value),)) + value.encode()


def whole(value: int) -> bytes:
    return b"K" + bytes((value,))


def python_2(pixels: NDArray[np.uint8], labels: list[int], key: str = "labels", by_column: bool = False) -> bytes:
    """As `cPickle.dump(batch, file, 2)` of a numpy of that time wrote it, with its memo."""
    shape = b"".join(b"M" + struct.pack("<H", size) for size in pixels.shape) + b"\x86q\x0a"
    values = pixels.tobytes("F" if by_column else "C")
    dtype = (
        b"cnumpy\ndtype\nq\x0bU\x02u1q\x0cK\x00K\x01\x87q\x0dRq\x0e(K\x03U\x01|q\x0fNNN"
        + b"J\xff\xff\xff\xff" * 2
        + b"K\x00tq\x10b"
    )
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x06cnumpy\nndarray\nq\x07K\x00\x85q\x08U\x01bq\x09\x87Rq\x11"
        b"(K\x01"
        + shape
        + dtype
        + (b"\x88" if by_column else b"\x89")
        + b"T"
        + struct.pack("<i", len(values))
        + values
        + b"q\x12tq\x13b"
    )
    items = text("batch_label") + b"q\x02" + text("training batch 1 of 5") + b"q\x03"
    items += text(key) + b"q\x04]q\x05(" + b"".join(map(whole, labels)) + b"e"
    items += text("data") + b"q\x14" + array
    items += text("filenames") + b"q\x15]q\x16(" + b"".join(text(f"{number}.png") for number in labels) + b"e"
    return b"\x80\x02}q\x01(" + items + b"u."


def python_3(pixels: NDArray[np.uint8], labels: list[int], key: str = "labels") -> bytes:
    """As `pickle.dump({b"data": ..., b"labels": ...}, file, 4)` of today's numpy writes it."""

    def name(value: str) -> bytes:
        return b"\x8c" + bytes((len(value),)) + value.encode() + b"\x94"

    def key_of(value: str) -> bytes:
        return b"C" + bytes((len(value),)) + value.encode() + b"\x94"

    array = name("numpy._core.multiarray") + name("_reconstruct") + b"\x93\x94" + name("numpy") + name("ndarray") + b"\x93\x94"
    array += (
        b"K\x00\x85\x94C\x01b\x94\x87\x94R\x94(K\x01"
        + b"".join(b"M" + struct.pack("<H", size) for size in pixels.shape)
        + b"\x86\x94"
    )
    array += b"h\x05" + name("dtype") + b"\x93\x94" + name("u1") + b"\x89\x88\x87\x94R\x94(K\x03" + name("|") + b"NNN"
    array += (
        b"J\xff\xff\xff\xff" * 2 + b"K\x00t\x94b\x89B" + struct.pack("<I", pixels.nbytes) + pixels.tobytes() + b"\x94t\x94b"
    )
    body = b"}\x94(" + key_of("data") + array + key_of(key) + b"]\x94(" + b"".join(map(whole, labels)) + b"eu."
    return b"\x80\x04\x95" + struct.pack("<Q", len(body)) + body


def write_python(name: SetName, folder: Path, assemble: Callable[..., bytes] = python_2) -> Path:
    place = folder / {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[name]
    place.mkdir()
    for file, batch in zip(FILES[name], batches(name), strict=True):
        (place / file).write_bytes(assemble(*batch, key="fine_labels" if name == "cifar100" else "labels"))
    return place


def write_binary(name: SetName, folder: Path) -> Path:
    place = folder / {"cifar10": "cifar-10-batches-bin", "cifar100": "cifar-100-binary"}[name]
    place.mkdir()
    for file, (pixels, labels) in zip(FILES[name], batches(name), strict=True):
        coarse = b"\x13" if name == "cifar100" else b""
        records = [coarse + bytes((label,)) + row.tobytes() for row, label in zip(pixels, labels, strict=True)]
        (place / f"{file}.bin").write_bytes(b"".join(records))
    return place


def read(name: SetName, folder: Path) -> RawSet:
    raw = read_raw_set(name, folder)
    assert raw is not None
    return raw


def check(name: SetName, raw: RawSet) -> None:
    """Channel c, row h, column w of an image is its byte 1024 c + 32 h + w."""
    wanted = batches(name)
    assert raw.train.y.tolist() == [label for _, labels in wanted[:-1] for label in labels]
    assert raw.test.y.tolist() == wanted[-1][1]
    assert len(raw.train) == 3 * (len(wanted) - 1)
    for channel, row, column in ((0, 0, 0), (1, 0, 31), (2, 31, 5)):
        byte = 1024 * channel + 32 * row + column
        assert raw.test.x[:, row, column, channel].tolist() == wanted[-1][0][:, byte].tolist()
        assert raw.train.x[:3, row, column, channel].tolist() == wanted[0][0][:, byte].tolist()


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("write", [write_binary, write_python])
def test_images_and_labels_come_back(name: SetName, write: Callable[[SetName, Path], Path], tmp_path: Path) -> None:
    place = write(name, tmp_path)
    check(name, read(name, tmp_path))
    check(name, read(name, place))  # the unpacked folder itself will do


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_batches_saved_again_by_python_3_come_back(name: SetName, tmp_path: Path) -> None:
    write_python(name, tmp_path, python_3)
    check(name, read(name, tmp_path))


def test_an_array_by_columns_comes_back() -> None:
    pixels, labels = batches("cifar10")[0]
    assert np.array_equal(read_pickled_data(python_2(pixels, labels, by_column=True))["data"], pixels)


def test_bytes_that_python_3_spells_as_text_come_back() -> None:
    called = b"c_codecs\nencode\nq\x01X\x04\x00\x00\x00a\xc3\xbfbq\x02X\x06\x00\x00\x00latin1q\x03\x86q\x04R"
    assert read_pickled_data(b"\x80\x02}q\x00X\x01\x00\x00\x00k" + called + b"s.") == {"k": b"a\xffb"}


def in_a_batch(value: bytes) -> bytes:
    """A batch that is whole, but for one more item."""
    return python_2(*batches("cifar10")[0])[:-2] + text("more") + value + b"u."


COMMAND = "touch MARKER"
HOSTILE = {
    "global": b"cos\nsystem\n(COMMANDtR",
    "posix": b"cposix\nsystem\n(COMMANDtR",
    "stack global": b"U\x02osU\x06system\x93(COMMANDtR",
    "eval": b"cbuiltins\neval\n(COMMANDtR",
    "popped again": b"cos\nsystem\n(COMMANDtR0N",
    "inst": b"(COMMANDios\nsystem\n",
    "obj": b"(cos\nsystem\nCOMMANDo",
    "newobj": b"cos\nsystem\n(COMMANDt\x81",
    "numpy's own": b"cnumpy\nload\n(COMMANDtR",
    "numpy's eval": b"cnumpy.testing\nrundocs\n(COMMANDtR",
    "dotted": b"U\x05numpyU\x0cndarray.dump\x93(COMMANDtR",
    "extension": b"\x82\x01(COMMANDtR",
    "persistent": b"COMMANDQ",
    "a numpy function called": b"cnumpy\nndarray\n(COMMANDtR",
    "an array of objects": b"cnumpy\ndtype\n(U\x02O8K\x00K\x01tR",
    "another codec": b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x05\x00\x00\x00rot13tR",
}


@pytest.mark.parametrize("payload", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_pickle_is_refused_and_never_run(payload: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place = write_python("cifar10", tmp_path)
    (place / "data_batch_3").write_bytes(in_a_batch(payload.replace(b"COMMAND", text(COMMAND))))
    with pytest.raises(InputError, match=r"expected a CIFAR batch, got .*data_batch_3") as caught:
        read_raw_set("cifar10", tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "MARKER").exists()


def test_the_batch_around_the_hostile_items_is_whole() -> None:
    assert read_pickled_data(in_a_batch(b"N"))["more"] is None


def test_no_cut_or_changed_byte_gets_past_the_reader() -> None:
    pixels, labels = batches("cifar10")[0]
    whole_batch = python_2(pixels, labels)
    body = whole_batch.index(pixels.tobytes())
    for end in [*range(body + 1), *range(body + pixels.nbytes, len(whole_batch))]:
        with pytest.raises(NotPlainDataError):
            read_pickled_data(whole_batch[:end])
    generator = np.random.default_rng(1)
    places = [*range(body), *range(body + pixels.nbytes, len(whole_batch))]
    for _ in range(3_000):
        changed = bytearray(whole_batch)
        changed[int(generator.choice(places))] = int(generator.integers(256))
        try:
            read_pickled_data(bytes(changed))
        except NotPlainDataError:
            continue


@pytest.mark.parametrize(("start", "end"), [(b"}", b"Ns"), (b"cnumpy\ndtype\n", b"R"), (b"cnumpy\ndtype\n", b"b")])
def test_tuples_too_deep_for_the_stack_are_refused(start: bytes, end: bytes) -> None:
    with pytest.raises(NotPlainDataError):
        read_pickled_data(b"\x80\x02" + start + b")" + b"\x85" * 200_000 + end + b".")


@pytest.mark.parametrize("shape", [b"K\x03M\x00\x0d\x86", b"J\xff\xff\xff\xffM\x00\x0c\x86", b"K\x01" * 9 + b"t", b")\x85"])
def test_a_shape_that_does_not_fit_is_refused(shape: bytes) -> None:
    whole_batch = python_2(*batches("cifar10")[0])
    right = b"M\x03\x00M\x00\x0c\x86"
    assert right in whole_batch
    changed = whole_batch.replace(right, b"(" * shape.endswith(b"t") + shape)
    with pytest.raises(NotPlainDataError):
        read_pickled_data(changed)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "damaged opcodes"),
        (b"no pickle at all", "expected a CIFAR batch"),
        (b"\x80\x02]q\x01.", "a list, not a dict"),
        (b"\x80\x02}q\x01.", "with data"),
        (python_2(batches("cifar10")[0][0][:, :100], [0, 1, 2]), "with data"),
        (python_2(batches("cifar10")[0][0], [0, 1]), "expected 3 whole-number labels"),
        (python_2(batches("cifar10")[0][0], [0, 1, 10]), "expected cifar10 labels 0 to 9"),
        (python_2(batches("cifar10")[0][0], [0, 1, 2], key="fine_labels"), "with labels"),
    ],
)
def test_a_bad_batch_says_what_is_wrong(data: bytes, words: str, tmp_path: Path) -> None:
    place = write_python("cifar10", tmp_path)
    (place / "test_batch").write_bytes(data)
    with pytest.raises(InputError, match=words) as caught:
        read_raw_set("cifar10", tmp_path)
    assert "test_batch" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"\0" * 3072, b"\0" * 3074, b"\x0a" + b"\0" * 3072])
def test_a_bad_binary_batch_says_which(data: bytes, tmp_path: Path) -> None:
    place = write_binary("cifar10", tmp_path)
    (place / "data_batch_5.bin").write_bytes(data)
    with pytest.raises(InputError, match="data_batch_5"):
        read_raw_set("cifar10", tmp_path)


@pytest.mark.parametrize("write", [write_binary, write_python])
def test_a_missing_batch_is_named(write: Callable[[SetName, Path], Path], tmp_path: Path) -> None:
    next(write("cifar10", tmp_path).glob("data_batch_2*")).unlink()
    with pytest.raises(InputError, match="data_batch_2"):
        read_raw_set("cifar10", tmp_path)
