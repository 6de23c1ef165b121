"""GTSRB's official folders: PPM images and, beside them, a CSV of sizes, signs' boxes and classes.

J. Stallkamp et al., "Man vs. computer", Neural Networks 32, 2012; https://benchmark.ini.rub.de/gtsrb_dataset.html
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.formats.raw_set import KINDS, Labelled, RawSet, SetName, labelled
from guard.errors import InputError

_TRAIN_NAME = re.compile(r"(\d{5})_\d{5}\.ppm")
_BOX = ("Roi.X1", "Roi.Y1", "Roi.X2", "Roi.Y2")
_SIDE = KINDS["gtsrb"].shape[0]

_Row = dict[str, str]


def read_gtsrb(name: SetName, folder: Path) -> RawSet | None:
    """Read `GTSRB/Final_Training/Images` and `GTSRB/Final_Test/Images`, cropped to the signs and brought to 32x32.

    Returns:
        None when there are no training folders.

    Raises:
        InputError: A file is missing, damaged, or not what its CSV says.
    """
    places = [folder / place / "Final_Training" / "Images" for place in ("GTSRB", ".")]
    place = next((place for place in places if place.is_dir()), None)
    if place is None:
        return None
    root = place.parent.parent
    train, tracks = _training(name, place)
    return RawSet(name, str(root), train, _test(name, root), tracks=tracks)


def _training(name: SetName, place: Path) -> tuple[Labelled, NDArray[np.int64]]:
    images, labels, tracks = [], [], []
    for item in sorted(item for item in place.iterdir() if item.is_dir() and re.fullmatch(r"\d{5}", item.name)):
        for row in sorted(_rows(item / f"GT-{item.name}.csv"), key=lambda row: row["Filename"]):
            if _number(row, "ClassId", item) != int(item.name):
                raise InputError(
                    f"expected class {int(item.name)} in {item}, got {row['ClassId']} for {row['Filename']}: mend it"
                )
            images.append(_image(item, row))
            labels.append(int(item.name))
            tracks.append(_track(item, row["Filename"]))
    if not images:
        raise InputError(f"expected class folders 00000 to 00042 with images in {place}, got none: unpack the archive again")
    return labelled(name, np.stack(images), np.array(labels), str(place)), np.array(tracks, dtype=np.int64)


def _test(name: SetName, root: Path) -> Labelled:
    table, place = _test_table(root), root / "Final_Test" / "Images"
    rows = _rows(table)
    if not rows:
        raise InputError(f"expected images listed in {table}, got none: unpack GTSRB_Final_Test_GT.zip")
    labels = np.array([_number(row, "ClassId", place) for row in rows])
    return labelled(name, np.stack([_image(place, row) for row in rows]), labels, str(place))


def _test_table(root: Path) -> Path:
    """Its archive unpacks to the root, but most people move it to the images."""
    places = [root / "Final_Test" / "Images", root / "Final_Test", root, root.parent]
    tables = [place / "GT-final_test.csv" for place in places]
    return next((table for table in tables if table.is_file()), tables[0])


def _rows(path: Path) -> list[_Row]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, delimiter=";", restval=""))
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"expected {path.name} in {path.parent}, got none that reads: unpack the archive again") from error
    if rows and not {"Filename", "ClassId"} <= rows[0].keys():
        raise InputError(f"expected columns Filename and ClassId, divided by ';', got {', '.join(map(str, rows[0]))} in {path}")
    return rows


def _number(row: _Row, column: str, place: Path) -> int:
    if not re.fullmatch(r"\d{1,6}", row[column]):
        raise InputError(
            f"expected a whole number as {column} of {row['Filename']}, got {row[column]!r} in {place}: mend the CSV"
        )
    return int(row[column])


def _track(place: Path, file: str) -> int:
    match = _TRAIN_NAME.fullmatch(file)
    if match is None:
        raise InputError(f"expected names TRACK_FRAME.ppm, five digits each, got {file} in {place}: keep the official names")
    return int(match[1])


def _image(place: Path, row: _Row) -> NDArray[np.uint8]:
    path = place / Path(row["Filename"]).name
    try:
        with Image.open(path, formats=["PPM"]) as opened:
            image = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"expected a PPM image {path}, got none that reads: unpack the archive again") from error
    if row.keys() >= {"Width", "Height", *_BOX}:
        size = (_number(row, "Width", place), _number(row, "Height", place))
        left, upper, right, lower = (_number(row, column, place) for column in _BOX)
        if image.size != size or not (left < right <= size[0] and upper < lower <= size[1]):
            raise InputError(
                f"expected {path} of size {size} and a sign inside it, as its CSV says, got size {image.size} and "
                f"{(left, upper, right, lower)}: use the official images, not resized ones"
            )
        image = image.crop((left, upper, right, lower))
    return np.asarray(image.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR))
