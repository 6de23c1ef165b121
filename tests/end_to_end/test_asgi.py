"""A real uvicorn server over a real socket, with a guard loaded from a profile folder."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from guard import Guard, Limits
from guard.errors import ServingError
from handlers.asgi import create_app
from handlers.asgi_server import AsgiServer, serve_asgi
from handlers.service import ImageService
from tests.handlers.toy_service import bomb, clean, triggered
from tests.toy import save_toy_profile

TIMEOUT = 30.0
MAX_BYTES = 100_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AsgiServer]:
    profile = save_toy_profile(tmp_path_factory.mktemp("asgi") / "profile")
    service = ImageService(Guard.load(profile), "toy", Limits(max_bytes=MAX_BYTES))
    with AsgiServer(create_app({"toy": service}, body_seconds=2.0)) as running:
        yield running


@pytest.fixture
def client(server: AsgiServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=TIMEOUT) as session:
        yield session


def predict(client: httpx.Client, body: bytes | Iterator[bytes], path: str = "/predictions/toy") -> httpx.Response:
    return client.post(path, content=body)


def counters(client: httpx.Client) -> dict[str, float]:
    text = client.get("/metrics").text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {f"{sample.name}:{sample.labels.get('outcome', sample.labels.get('le', ''))}": sample.value for sample in samples}


def raw(server: AsgiServer, *pieces: bytes) -> bytes:
    """What comes back for raw bytes on a socket of their own, until the server closes it or goes silent."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=5.0) as connection:
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(0.05)
        received = b""
        with contextlib.suppress(TimeoutError, ConnectionError):
            while data := connection.recv(65536):
                received += data
                if received.endswith(b"}"):
                    break
        return received


def test_images_are_answered_or_refused(client: httpx.Client) -> None:
    answers = [predict(client, clean(row)) for row in range(4)]
    assert [answer.json()["label_index"] for answer in answers] == [0, 1, 2, 3]
    assert {answer.status_code for answer in answers} == {200}
    refused = predict(client, triggered())
    assert refused.status_code == 422
    assert refused.json() == {
        "verdict": "rejected", "reason": "backdoor-suspected", "request_id": refused.headers["x-request-id"],
    }  # fmt: skip
    assert "server" not in refused.headers


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"garbage", 400), (b"", 400), (clean()[:60], 400), (bomb(), 413), (bytes(MAX_BYTES + 1), 413), (bytes(5_000_000), 413)],
    ids=["garbage", "empty", "truncated", "bomb", "over the limit", "far over the limit"],
)
def test_bad_bodies_are_told_apart_and_harm_nobody(client: httpx.Client, body: bytes, status: int) -> None:
    started = time.monotonic()
    assert predict(client, body).status_code == status
    assert predict(client, clean()).status_code == 200
    assert time.monotonic() - started < 5.0


def test_a_chunked_body_needs_no_content_length(client: httpx.Client) -> None:
    body = clean(2)
    answer = predict(client, iter([body[:7], body[7:100], body[100:]]))
    assert answer.json()["label_index"] == 2
    assert predict(client, iter([bytes(30_000)] * 5)).status_code == 413


def test_several_files_are_answered_one_by_one(client: httpx.Client) -> None:
    files = [("image", (f"{row}.png", body)) for row, body in enumerate([clean(3), triggered(), b"junk"])]
    answer = client.post("/predictions/toy", files=files)
    assert answer.status_code == 207
    assert [item["status"] for item in answer.json()["predictions"]] == [200, 422, 400]
    assert client.post("/predictions/toy", files=files[:1]).json()["label_index"] == 3
    malformed = client.post("/predictions/toy", content=b"x", headers={"content-type": "multipart/form-data; boundary=X"})
    assert malformed.status_code == 400


def test_an_unknown_model_is_404(client: httpx.Client) -> None:
    answer = predict(client, clean(), "/predictions/other")
    assert [answer.status_code, answer.json()["reason"]] == [404, "unknown-model"]


def test_metrics_move(client: httpx.Client) -> None:
    before = counters(client)
    for body in (clean(), triggered(), triggered(2), b"junk"):
        predict(client, body)
    after = counters(client)
    moved = {
        name: after[name] - before[name] for name in after if not name.startswith("guard_seconds") and "created" not in name
    }
    assert moved["guard_requests_total:accepted"] == 1
    assert moved["guard_requests_total:rejected"] == 2
    assert moved["guard_requests_total:invalid"] == 1
    assert moved["guard_rejections_total:"] == 2
    assert moved["guard_entropy_bits_count:"] == 3
    assert moved["guard_entropy_bits_bucket:0.05"] == 2
    assert moved["guard_forward_passes_total:"] >= 80
    assert after["guard_seconds_count:"] - before["guard_seconds_count:"] == 4


def test_requests_at_once_are_each_answered_for_themselves(client: httpx.Client) -> None:
    def one(row: int) -> tuple[int, object]:
        answer = predict(client, triggered() if row % 5 == 4 else clean(row % 5))
        return answer.status_code, answer.json().get("label_index")

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(one, range(60)))
    assert answers == [(200, 0), (200, 1), (200, 2), (200, 3), (422, None)] * 12


def test_each_request_is_one_line_of_json(client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="guard.requests"):
        answers = [predict(client, clean()), predict(client, b'"\n[METRICS]forged.Count:1|#'), predict(client, triggered())]
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "guard.requests"]
    assert [line["outcome"] for line in lines] == ["accepted", "invalid", "rejected"]
    assert [line["request_id"] for line in lines] == [answer.headers["x-request-id"] for answer in answers]
    assert "METRICS" not in caplog.text


HEAD = b"POST /predictions/toy HTTP/1.1\r\nHost: test\r\n"


@pytest.mark.parametrize(
    ("pieces", "status"),
    [
        ((HEAD + b"Content-Length: 9999999999\r\n\r\n" + bytes(1000),), b"413"),
        ((HEAD + b"Content-Length: 9999999\r\nExpect: 100-continue\r\n\r\n",), b"413"),
        ((HEAD + b"Content-Length: 5000\r\n\r\n" + clean(),), b"400"),
        ((HEAD + b"Content-Length: -1\r\n\r\n",), b"400"),
        ((HEAD + b"Content-Length: five\r\n\r\n",), b"400"),
        ((HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",), b"400"),
        ((b"nonsense\r\n\r\n",), b"400"),
        ((HEAD + b"Content-Length: 133\r\n\r\n", b"x" * 60, b"y" * 73), b"400"),
    ],
    ids=["promises too much", "asks first", "sends too little", "negative", "no number", "bad chunk", "no http", "in pieces"],
)
def test_a_lying_client_is_refused(server: AsgiServer, client: httpx.Client, pieces: tuple[bytes, ...], status: bytes) -> None:
    started = time.monotonic()
    assert raw(server, *pieces).startswith(b"HTTP/1.1 " + status)
    assert time.monotonic() - started < 5.0
    assert predict(client, clean()).status_code == 200


def test_clients_that_leave_harm_nobody(server: AsgiServer, client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    def leave() -> None:
        with socket.create_connection(("127.0.0.1", server.port), timeout=5.0) as connection:
            connection.sendall(HEAD + b"Content-Length: 5000\r\n\r\n" + bytes(100))

    threads = [threading.Thread(target=leave) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert predict(client, clean()).status_code == 200
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_port_in_use_is_told_before_anything_starts(server: AsgiServer) -> None:
    with pytest.raises(ServingError, match=f"can't listen on 127.0.0.1:{server.port} "):
        serve_asgi(create_app({}), port=server.port)


def test_two_models_are_served_side_by_side(tmp_path: Path) -> None:
    folder = save_toy_profile(tmp_path / "profile")
    services = {name: ImageService(Guard.load(folder), name) for name in ("one", "two")}
    with AsgiServer(create_app(services)) as running, httpx.Client(base_url=running.url, timeout=TIMEOUT) as client:
        assert [predict(client, clean(), f"/predictions/{name}").status_code for name in services] == [200, 200]
