"""GTSRB's official folders, small ones made here: cropped to the sign, in order, with tracks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.datasets import read_raw_set
from benchmarks.formats.raw_set import RawSet
from guard.errors import InputError

HEADER = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"
SIGN = (10, 200, 30)


def save(path: Path, value: tuple[int, int, int] = SIGN) -> None:
    """A 50x44 frame in red with a sign of one colour at columns 5 to 41 and rows 6 to 36."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (50, 44), (255, 0, 0))
    image.paste(value, (5, 6, 42, 37))
    image.save(path)


def write(folder: Path, test_table: str = "GTSRB/Final_Test/Images") -> Path:
    train, test = folder / "GTSRB" / "Final_Training" / "Images", folder / "GTSRB" / "Final_Test" / "Images"
    for label, files in ((3, ["00000_00000", "00000_00001", "00002_00000"]), (0, ["00000_00000"])):
        rows = [f"{file}.ppm;50;44;5;6;42;37;{label}" for file in reversed(files)]
        for file in files:
            save(train / f"{label:05d}" / f"{file}.ppm", (label, int(file[4]), int(file[-1])))
        (train / f"{label:05d}" / f"GT-{label:05d}.csv").write_text("\r\n".join([HEADER, *rows, ""]), encoding="utf-8")
    rows = []
    for number, label in enumerate((42, 7)):
        save(test / f"{number:05d}.ppm", (label, number, 99))
        rows.append(f"{number:05d}.ppm;50;44;5;6;42;37;{label}")
    (folder / test_table).mkdir(parents=True, exist_ok=True)
    (folder / test_table / "GT-final_test.csv").write_text("\n".join([HEADER, *rows]), encoding="utf-8")
    return folder


def read(folder: Path) -> RawSet:
    raw = read_raw_set("gtsrb", folder)
    assert raw is not None
    return raw


@pytest.mark.parametrize("test_table", ["GTSRB/Final_Test/Images", "GTSRB/Final_Test", "GTSRB", "."])
def test_signs_come_back_without_what_is_around_them(test_table: str, tmp_path: Path) -> None:
    raw = read(write(tmp_path, test_table))
    colours = [(0, 0, 0), (3, 0, 0), (3, 0, 1), (3, 2, 0)]
    assert raw.train.x.shape == (4, 32, 32, 3)
    assert all((image == colour).all() for image, colour in zip(raw.train.x, colours, strict=True))
    assert all((image == colour).all() for image, colour in zip(raw.test.x, [(42, 0, 99), (7, 1, 99)], strict=True))
    assert (raw.train.y.tolist(), raw.test.y.tolist()) == ([0, 3, 3, 3], [42, 7])
    assert raw.tracks is not None
    assert raw.tracks.tolist() == [0, 0, 0, 2]


def test_resizing_is_bilinear(tmp_path: Path) -> None:
    path = write(tmp_path) / "GTSRB" / "Final_Test" / "Images" / "00000.ppm"
    noise = np.random.default_rng(0).integers(0, 256, (44, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    wanted = Image.fromarray(noise[6:37, 5:42]).resize((32, 32), Image.Resampling.BILINEAR)
    assert np.array_equal(read(tmp_path).test.x[0], np.asarray(wanted))


def test_without_boxes_the_whole_image_counts(tmp_path: Path) -> None:
    table = write(tmp_path) / "GTSRB" / "Final_Test" / "Images" / "GT-final_test.csv"
    table.write_text("Filename;ClassId\n00000.ppm;42\n", encoding="utf-8")
    image = read(tmp_path).test.x[0]
    assert image[0, 0].tolist() == [255, 0, 0]
    assert image[16, 16].tolist() == [42, 0, 99]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("00000_00000.ppm;32;32;5;6;42;37;0", "not resized ones"),
        ("00000_00000.ppm;50;44;42;6;5;37;0", "a sign inside it"),
        ("00000_00000.ppm;50;44;5;6;51;37;0", "a sign inside it"),
        ("00000_00000.ppm;50;44;5;6;42;37;1", "expected class 0"),
        ("00000_00000.ppm;50;44;5;6;42;37;x", "expected a whole number as ClassId"),
        ("00000_00000.ppm;50;44;5;6", "expected a whole number as ClassId"),
        ("00000_00009.ppm;50;44;5;6;42;37;0", "expected a PPM image"),
        ("sign.ppm;50;44;5;6;42;37;0", "TRACK_FRAME"),
    ],
)
def test_a_row_that_does_not_fit_says_so(row: str, words: str, tmp_path: Path) -> None:
    place = write(tmp_path) / "GTSRB" / "Final_Training" / "Images" / "00000"
    save(place / "sign.ppm")
    (place / "GT-00000.csv").write_text(f"{HEADER}\n{row}\n", encoding="utf-8")
    with pytest.raises(InputError, match=words) as caught:
        read_raw_set("gtsrb", tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "data", "words"),
    [
        ("Final_Training/Images/00003/GT-00003.csv", None, "GT-00003.csv"),
        ("Final_Training/Images/00003/GT-00003.csv", b"Filename,ClassId\na,3\n", "divided by ';'"),
        ("Final_Training/Images/00003/GT-00003.csv", b"\xff\xfe\x00", "GT-00003.csv"),
        ("Final_Training/Images/00003/00002_00000.ppm", b"P6\n50 44\n255\ncut", "00002_00000.ppm"),
        ("Final_Training/Images/00003/00002_00000.ppm", b"", "00002_00000.ppm"),
        ("Final_Test/Images/GT-final_test.csv", None, "GT-final_test.csv"),
        ("Final_Test/Images/GT-final_test.csv", HEADER.encode(), "GT-final_test.csv"),
        ("Final_Test/Images/GT-final_test.csv", b"Filename;ClassId\n00000.ppm;43\n", "labels 0 to 42"),
    ],
)
def test_bad_files_are_named(file: str, data: bytes | None, words: str, tmp_path: Path) -> None:
    path = write(tmp_path) / "GTSRB" / file
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(InputError, match=words):
        read_raw_set("gtsrb", tmp_path)
