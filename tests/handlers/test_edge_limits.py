"""What an edge server does not take, and how the device is told."""

from __future__ import annotations

import errno
import io
import os
import zipfile
from pathlib import Path

import msgspec
import numpy as np
import pytest

from handlers.edge_limits import EdgeLimits
from tests.handlers.toy_edge import archive, edge_server, requested, sent_files

END_OF_A_LARGER_ONE = b"PK\6\7" + bytes(12) + b"\1\0\0\0" + b"PK\5\6" + bytes(18)
"""Of an archive in Zip64: what must stand before lies before the file's begin, which is an OSError to zipfile, too."""


def test_sizes_are_bounded_per_file_per_job_and_unpacked(tmp_path: Path) -> None:
    files = sent_files()
    sizes = [len(data) for data in files.values()]
    for number, limits in enumerate((EdgeLimits(max_bytes=max(sizes) - 1), EdgeLimits(max_job_bytes=sum(sizes) - 1))):
        with edge_server(tmp_path / str(number), limits=limits) as edge:
            answer = edge.send("POST", "/v1/jobs", msgspec.json.encode(requested(files)))
            assert [answer.status_code, answer.json()["reason"]] == [413, "too-large"]
    buffer = tmp_path / "bomb.npz"
    np.savez_compressed(buffer, x=np.zeros((100, 100, 100), np.uint8))
    files["clean.npz"] = buffer.read_bytes()
    with edge_server(tmp_path / "bomb", limits=EdgeLimits(max_bytes=100_000)) as edge:
        answer = edge.send("PUT", f"/v1/jobs/{edge.create(requested(files))}/files/clean.npz", files["clean.npz"])
        assert [answer.status_code, "unpack" in answer.text] == [413, True]


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("model.pt2", archive(m__data__sample_inputs__model=b"pickled"), "pickled"),
        ("model.pt2", b"no archive", "bad-file"),
        ("clean.npz", b"no archive", "bad-file"),
        ("clean.npz", END_OF_A_LARGER_ONE, "bad-file"),
    ],
)
def test_pickles_and_what_is_no_archive_are_refused(tmp_path: Path, name: str, data: bytes, reason: str) -> None:
    files = {**sent_files(), name: data}
    with edge_server(tmp_path) as edge:
        job = edge.create(requested(files))
        answer = edge.send("PUT", f"/v1/jobs/{job}/files/{name}", data)
        assert [answer.status_code, answer.json()["reason"]] == [422, reason]
        assert list(edge.store.sent(job).iterdir()) == []


class Failing(io.FileIO):
    """A file on a disk that fails when it is read."""

    code = errno.EIO

    def read(self, size: int | None = -1, /) -> bytes:
        raise OSError(self.code, os.strerror(self.code))


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("when", ["opened", "read"])
def test_a_disk_that_fails_is_no_broken_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, when: str) -> None:
    """The device may send it again as it is; zipfile itself takes one that can't be read for a broken one."""
    files, whole = sent_files(), zipfile.ZipFile

    def opened(path: Path) -> zipfile.ZipFile:
        if when == "opened":
            raise OSError(code, os.strerror(code), str(path))
        with Failing(path) as file:
            file.code = code
            return whole(file)

    with edge_server(tmp_path) as edge:
        job = edge.create(requested(files))
        with monkeypatch.context() as patched:
            patched.setattr(zipfile, "ZipFile", opened)
            answer = edge.send("PUT", f"/v1/jobs/{job}/files/clean.npz", files["clean.npz"])
        assert [answer.status_code, answer.json()["reason"]] == [503, "edge-failed"]
        assert list(edge.store.sent(job).iterdir()) == []
        assert edge.send("PUT", f"/v1/jobs/{job}/files/clean.npz", files["clean.npz"]).status_code == 204
