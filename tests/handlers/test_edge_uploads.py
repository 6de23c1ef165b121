"""Files on their way to an edge server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import msgspec
import pytest

from handlers import edge, edge_worker
from tests.handlers.toy_edge import AUTHORISED, SLEEPS, Edge, edge_server, requested, running, sent_files
from tests.handlers.toy_service import TIMEOUT, call, chunk, drive


@pytest.mark.parametrize("cut", [0, 1, 100])
def test_a_truncated_file_is_refused_and_not_kept(tmp_path: Path, cut: int) -> None:
    files = sent_files()
    with edge_server(tmp_path) as edge:
        job = edge.create(requested(files))
        answer = edge.send("PUT", f"/v1/jobs/{job}/files/clean.npz", files["clean.npz"][:cut])
        assert [answer.status_code, answer.json()["reason"]] == [422, "truncated"]
        assert list(edge.store.sent(job).iterdir()) == []
        assert "clean.npz" in edge.status(job).missing
        refused = edge.send("POST", f"/v1/jobs/{job}/start")
        assert [refused.status_code, refused.json()["reason"]] == [409, "files-missing"]


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    files = sent_files()
    with edge_server(tmp_path) as edge:
        job = edge.create(requested(files))
        answer = edge.send("PUT", f"/v1/jobs/{job}/files/clean.npz", files["clean.npz"][:-1] + b"x")
        assert [answer.status_code, answer.json()["reason"]] == [422, "damaged"]
        assert list(edge.store.sent(job).iterdir()) == []


def test_more_than_was_declared_is_refused_whatever_content_length_says(tmp_path: Path) -> None:
    files = sent_files()
    size = len(files["clean.npz"])
    with edge_server(tmp_path) as edge:
        path = f"/v1/jobs/{edge.create(requested(files))}/files/clean.npz"
        token = [(b"authorization", AUTHORISED["authorization"].encode())]
        for headers in (token, [*token, (b"content-length", b"10")], [*token, (b"content-length", b"%d" % size)]):
            sent = drive(edge.app, [chunk(bytes(size), True), chunk(b"x", True)], path, headers, "PUT")
            assert sent[0]["status"] == 413
        assert not [*tmp_path.rglob("*.part"), *tmp_path.rglob("clean.npz")]


def test_a_client_that_falls_silent_is_cut_off(tmp_path: Path) -> None:
    with edge_server(tmp_path, seconds=0.05) as edge:
        path = f"/v1/jobs/{edge.create(requested(sent_files()))}/files/clean.npz"
        sent = drive(edge.app, [chunk(b"x", True)], path, [(b"authorization", AUTHORISED["authorization"].encode())], "PUT")
    assert sent[0]["status"] == 408


def test_no_file_is_taken_once_a_job_was_started(tmp_path: Path) -> None:
    with edge_server(tmp_path, running(SLEEPS)) as edge:
        job = edge.started()
        answer = edge.send("PUT", f"/v1/jobs/{job}/files/clean.npz", sent_files()["clean.npz"])
        assert [answer.status_code, answer.json()["reason"]] == [409, "not-receiving"]


def test_an_upload_that_goes_on_is_never_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge, "_NOTE_SECONDS", 0.0)
    monkeypatch.setattr(edge_worker, "_LOOK_SECONDS", TIMEOUT)  # we look
    files = sent_files()
    with edge_server(tmp_path) as server:
        job = server.create(requested(files))

        async def pieces() -> AsyncIterator[bytes]:
            for start in range(0, len(files["clean.npz"]), 200):
                server.store._write(msgspec.structs.replace(server.store.get(job), changed=0.0))  # hours go by
                yield files["clean.npz"][start : start + 200]
                server.store.expire()

        assert _put(server, job, "clean.npz", pieces()).status_code == 204
        assert "clean.npz" not in server.status(job).missing


@pytest.mark.parametrize("name", ["model.pt2", "clean.npz"])
def test_an_upload_to_a_job_that_goes_meanwhile_is_told_so(tmp_path: Path, name: str) -> None:
    """Also of an archive, which would seem to be none."""
    with edge_server(tmp_path) as server:
        job = server.create(requested(sent_files()))

        async def pieces() -> AsyncIterator[bytes]:
            yield sent_files()[name]
            server.store.delete(job)

        answer = _put(server, job, name, pieces())
        assert [answer.status_code, answer.json()["reason"]] == [404, "unknown-job"]
        server.store.expire()
        assert not server.store.folder(job).exists()


def _put(server: Edge, job: str, name: str, pieces: AsyncIterator[bytes]) -> httpx.Response:
    """Send a file piece by piece; what a piece's source does after it is done when it has arrived."""
    request = httpx.Request("PUT", f"http://test/v1/jobs/{job}/files/{name}", content=pieces, headers=AUTHORISED)
    return call(server.app, request)[0]
