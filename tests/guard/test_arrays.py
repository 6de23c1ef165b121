"""Archives of arrays that are damaged, or declare what nobody has."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from guard.arrays import read_arrays
from guard.errors import InputError


def with_header(header: str) -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


HEADERS = {
    "more than there is memory": "{'descr': '<f8', 'fortran_order': False, 'shape': (10000000000000,)}",
    "more than there are numbers": "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000000000000000000000,)}",
    "brackets": "((((",
    "objects": "{'descr': '|O', 'fortran_order': False, 'shape': (1,)}",
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_means_nothing_is_one_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", with_header(HEADERS[name]))
    with pytest.raises(InputError, match=r"expected an \.npz of plain arrays, got x\.npz"):
        read_arrays(path)


@pytest.mark.parametrize(("offset", "value"), [(6, 1), (8, 99)], ids=["encrypted", "an unknown compression"])
def test_an_entry_that_cannot_be_read_is_one_line(offset: int, value: int, tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, x=np.zeros(3))
    data = bytearray(path.read_bytes())
    data[offset] = value
    directory = data.index(b"PK\x01\x02")
    data[directory + offset + 2] = value
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"expected an \.npz"):
        read_arrays(path)
