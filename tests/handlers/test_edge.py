"""An edge server's answers: who is served, what is announced, and where paths lead."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from pathlib import Path

import httpx
import msgspec
import pytest

from guard.errors import EdgeError
from handlers.edge import BearerToken
from handlers.edge_protocol import open_sealed
from tests.handlers.toy_edge import NOBODY, TOKEN, edge_server, requested, sent_files
from tests.handlers.toy_service import call, chunk, drive

ROUTES = [
    ("POST", "/v1/jobs"),
    ("GET", f"/v1/jobs/{NOBODY}"),
    ("DELETE", f"/v1/jobs/{NOBODY}"),
    ("POST", f"/v1/jobs/{NOBODY}/start"),
    ("PUT", f"/v1/jobs/{NOBODY}/files/clean.npz"),
    ("GET", f"/v1/jobs/{NOBODY}/files/model.pt2"),
    ("GET", "/elsewhere"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_nothing_is_answered_or_read_without_the_token(tmp_path: Path, method: str, path: str) -> None:
    wrong: list[list[tuple[bytes, bytes]]] = [
        [],
        [(b"authorization", b"Bearer " + b"x" * len(TOKEN))],
        [(b"authorization", TOKEN.encode())],
        [(b"authorization", f"Basic {TOKEN}".encode())],
        [(b"authorization", f"Bearer {TOKEN}".encode()), (b"authorization", b"Bearer other")],
    ]
    with edge_server(tmp_path) as edge:
        for headers in wrong:
            sent = drive(edge.app, [], path, headers, method)  # a client that never sends its body
            assert sent[0]["status"] == 401
            assert (b"www-authenticate", b"Bearer") in sent[0]["headers"]
            assert (b"connection", b"close") in sent[0]["headers"]


def test_ping_needs_no_token(tmp_path: Path) -> None:
    with edge_server(tmp_path) as edge:
        (answer,) = call(edge.app, httpx.Request("GET", "http://test/ping"))
    assert answer.json() == {"status": "Healthy"}


@pytest.mark.parametrize("token", ["", "short", "x" * 15, "with blanks in between", "umläute-umläute-umläute"])
def test_a_token_that_is_too_weak_is_refused(token: str) -> None:
    with pytest.raises(EdgeError, match="at least 16"):
        BearerToken(lambda *_: contextlib.nullcontext(), token=token)  # type: ignore[arg-type]


def test_a_job_from_its_announcement_to_its_result(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    files = sent_files()
    with edge_server(tmp_path) as edge:
        job = edge.create(requested(files))
        for number, (name, data) in enumerate(files.items()):
            assert edge.status(job).missing == tuple(files)[number:]
            assert edge.send("PUT", f"/v1/jobs/{job}/files/{name}", data).status_code == 204
        assert edge.send("GET", f"/v1/jobs/{job}/files/model.pt2").status_code == 409
        assert edge.send("POST", f"/v1/jobs/{job}/start").status_code == 202
        status = edge.ended(job)
        assert status.state == "done"
        assert status.result is not None
        manifest = open_sealed(TOKEN, status.result)
        assert [item.name for item in manifest.files] == ["model.pt2", "profile/guard.json", "repair.json"]
        assert {item.name for item in manifest.sent} == set(files)
        for item in manifest.files:
            data = edge.send("GET", f"/v1/jobs/{job}/files/{item.name}").content
            assert (len(data), hashlib.sha256(data).hexdigest()) == (item.size, item.sha256)
        assert edge.send("GET", f"/v1/jobs/{job}/files/model.pt2").content == files["model.pt2"][::-1]
        assert not edge.store.sent(job).exists()  # private, and needed no longer
        assert edge.send("POST", f"/v1/jobs/{job}/start").json()["state"] == "done"  # again does no harm
        assert edge.send("DELETE", f"/v1/jobs/{job}").status_code == 204
        assert edge.send("GET", f"/v1/jobs/{job}").status_code == 404
        assert not edge.store.folder(job).exists()
    assert TOKEN not in caplog.text


@pytest.mark.parametrize(
    "name", ["../job.json", "/etc/passwd", "model.pkl", "clean.npz/../x", "", "model.PT2", "quarantine.npz\n"]
)
def test_only_known_names_are_taken(tmp_path: Path, name: str) -> None:
    files = sent_files()
    body = msgspec.json.encode(requested(files)).replace(b'"quarantine.npz"', json.dumps(name).encode())
    with edge_server(tmp_path) as edge:
        assert edge.send("POST", "/v1/jobs", body).status_code == 400
        job = edge.create(requested(files))
        assert edge.send("PUT", f"/v1/jobs/{job}/files/job.json", b"x").status_code == 404


@pytest.mark.parametrize(
    "change",
    [
        lambda body: b"[" * 50_000,
        lambda body: b"{}",
        lambda body: body.replace(b"codefend", b"../../x"),
        lambda body: body.replace(b'"size":', b'"size":-'),
        lambda body: body.replace(b'"method"', b'"secret":1,"method"'),
        lambda body: body.replace(b'"quarantine.npz"', b'"clean.npz"'),
        lambda body: body.replace(b'"model.pt2"', b'"model.safetensors"'),
    ],
)
def test_a_job_that_makes_no_sense_is_refused(tmp_path: Path, change: object) -> None:
    assert callable(change)
    with edge_server(tmp_path) as edge:
        answer = edge.send("POST", "/v1/jobs", change(msgspec.json.encode(requested(sent_files()))))
        assert answer.status_code == 400
        assert "Traceback" not in answer.text
        assert list((tmp_path / "jobs").iterdir()) == []


def test_other_paths_lead_nowhere(tmp_path: Path) -> None:
    with edge_server(tmp_path) as edge:
        job = edge.started()
        edge.ended(job)
        for place in (tmp_path, tmp_path / "jobs"):  # where a path that leads out would find something
            (place / "job.json").write_bytes((edge.store.folder(job) / "job.json").read_bytes())
        for name in ("../job.json", "..%2fjob.json", "profile/../../job.json", "/etc/passwd", "log", "profile"):
            sent = drive(
                edge.app, [chunk(b"")], f"/v1/jobs/{job}/files/{name}", [(b"authorization", f"Bearer {TOKEN}".encode())], "GET"
            )
            assert sent[0]["status"] == 404, name
        for other in ("..", ".", "a" * 33, job.upper(), f"{job}\n"):
            sent = drive(edge.app, [chunk(b"")], f"/v1/jobs/{other}", [(b"authorization", f"Bearer {TOKEN}".encode())], "GET")
            assert sent[0]["status"] == 404, other
        assert edge.send("PATCH", f"/v1/jobs/{job}").status_code == 405


def test_a_factory_is_run_only_when_it_is_allowed(tmp_path: Path) -> None:
    files = sent_files()
    files["model.safetensors"] = files.pop("model.pt2")
    with edge_server(tmp_path, factories=("mine:net",)) as edge:
        refused = edge.send("POST", "/v1/jobs", msgspec.json.encode(requested(files, "os:abort")))
        assert [refused.status_code, "--allow-factory os:abort" in refused.text] == [403, True]
        assert edge.create(requested(files, "mine:net"))
