from __future__ import annotations

import asyncio
import json
import logging
import time
from dataclasses import replace

import anyio
import httpx
import msgspec
import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from torch import Tensor

from guard import Guard, Limits, Policy, Predictor
from guard.predictors import wrap
from handlers.asgi import create_app
from handlers.prometheus import PrometheusMetrics
from handlers.service import ImageService
from tests.handlers.toy_service import (
    GONE,
    TIMEOUT,
    black,
    bomb,
    call,
    chunk,
    clean,
    drive,
    nan_when_dark,
    post,
    toy_guard,
    toy_service,
    triggered,
)
from tests.toy import SIDE, SPEC, ToyNet

LIMIT = 1000


def files(*bodies: bytes) -> list[tuple[str, tuple[str, bytes]]]:
    return [("file", (f"{row}.png", body)) for row, body in enumerate(bodies)]


def test_the_answers() -> None:
    app = create_app({"toy": toy_service(limits=Limits(max_bytes=100_000))})
    bodies = {200: clean(1), 422: triggered(), 400: b"junk", 413: bomb()}
    for status, body in bodies.items():
        answer = post(app, body)
        assert answer.status_code == status
        assert answer.json()["request_id"] == answer.headers["x-request-id"]
    assert post(app, clean(1)).json()["label"] == "north-east"
    assert post(app, b"").status_code == 400
    assert post(app, clean()[:50]).status_code == 400
    assert post(app, bytes(100_001)).status_code == 413


def test_a_failing_model_answers_503() -> None:
    app = create_app({"toy": toy_service(toy_guard(answers=nan_when_dark))})
    assert [post(app, body).status_code for body in (black(), clean())] == [503, 200]


def test_monitor_mode_answers_200() -> None:
    app = create_app({"toy": toy_service(toy_guard(Policy(mode="monitor")))})
    assert post(app, triggered()).json()["verdict"] == "accepted"


def test_one_file_is_answered_like_a_plain_body() -> None:
    app = create_app({"toy": toy_service()})
    for body in (clean(1), triggered(), b"junk", b""):
        plain, form = post(app, body), post(app, files=files(body))
        assert form.status_code == plain.status_code
        assert {**form.json(), "request_id": ""} == {**plain.json(), "request_id": ""}


def test_several_files_are_answered_one_by_one() -> None:
    app = create_app({"toy": toy_service(toy_guard(answers=nan_when_dark), Limits(max_bytes=LIMIT))})
    answer = post(app, files=files(clean(0), triggered(), b"junk", black(), bytes(LIMIT + 1), clean(3)))
    assert answer.status_code == 207
    predictions = answer.json()["predictions"]
    assert [item["status"] for item in predictions] == [200, 422, 400, 503, 413, 200]
    assert [predictions[row]["label_index"] for row in (0, 5)] == [0, 3]
    assert [item["request_id"] for item in predictions] == [f"{answer.headers['x-request-id']}-{row}" for row in range(6)]


def test_files_are_bounded_in_number_and_bytes() -> None:
    app = create_app({"toy": toy_service()}, max_files=2, max_batch_bytes=2000)
    assert post(app, files=files(clean(), clean())).status_code == 207
    assert post(app, files=files(clean(), clean(), clean())).status_code == 413
    assert post(app, files=files(bytes(2000))).status_code == 413


def test_files_are_bounded_in_pixels_where_all_sizes_are_decoded() -> None:
    """Sixty-four images at the limit of one would be a minute's work, whatever the latency budget."""

    def answered(resize: bool) -> list[int]:
        spec = msgspec.structs.replace(SPEC, resize=resize)
        service = toy_service(Guard(Predictor(wrap(ToyNet()), spec, 4, "logits"), []), Limits(max_pixels=SIDE * SIDE))
        several = files(clean(), b"junk", *[clean()] * 4)
        return [item["status"] for item in post(create_app({"toy": service}), files=several).json()["predictions"]]

    assert answered(resize=True) == [200, 400, 200, 200, 200, 413]
    assert answered(resize=False) == [200, 400, 200, 200, 200, 200]


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=X", b"x"),
        ("multipart/form-data; boundary=X", b"--X--\r\n"),
        ("multipart/form-data; boundary=X", b'--X\r\nContent-Disposition: form-data; name="a"\r\n\r\n1'),
    ],
)
def test_malformed_multipart_is_400(content_type: str, body: bytes) -> None:
    answer = post(create_app({"toy": toy_service()}), body, headers={"content-type": content_type})
    assert answer.status_code == 400
    assert answer.json()["reason"] == "bad-input"


def test_other_paths_and_methods_are_refused_as_json_without_the_clients_text() -> None:
    app = create_app({"toy": toy_service()})
    for path in ("/predictions/secret", "/secret", "/predictions/toy/secret", "/"):
        answer = post(app, clean(), path=path)
        assert answer.status_code == 404
        assert answer.json()["request_id"] == answer.headers["x-request-id"]
        assert "secret" not in answer.text
    (refused,) = call(app, httpx.Request("GET", "http://test/predictions/toy"))
    assert [refused.status_code, refused.headers["allow"]] == [405, "POST"]
    assert refused.json()["reason"] == "method-not-allowed"


def test_ping_and_metrics() -> None:
    metrics = PrometheusMetrics()
    app = create_app({"toy": toy_service(), "other": toy_service()}, metrics)
    post(app, triggered())
    post(app, files=files(clean(), b"junk"), path="/predictions/other")
    ping, text = call(app, httpx.Request("GET", "http://test/ping"), httpx.Request("GET", "http://test/metrics"))
    assert ping.json() == {"status": "Healthy"}
    lines = text.text.splitlines()
    assert 'guard_requests_total{model="toy",outcome="rejected"} 1.0' in lines
    assert 'guard_requests_total{model="other",outcome="accepted"} 1.0' in lines
    assert 'guard_requests_total{model="other",outcome="invalid"} 1.0' in lines
    assert 'guard_requests_total{model="other",outcome="rejected"} 0.0' in lines
    assert text.headers["content-type"] == metrics.render()[1]


def asked_by(client: str | None, headers: dict[str, str] | None = None, *, public: bool = False) -> int:
    """The status of `/metrics` for a client at this address."""

    async def run() -> int:
        transport = httpx.ASGITransport(_from(client, create_app({"toy": toy_service()}, public_metrics=public)))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as session:
            answer = await session.get("/metrics", headers=headers)
            assert ("guard_forward_passes_total" in answer.text) == (answer.status_code == 200)
            return answer.status_code

    return asyncio.run(asyncio.wait_for(run(), TIMEOUT))


def _from(client: str | None, app: ASGIApp) -> ASGIApp:
    async def called(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "client": None if client is None else (client, 1)}, receive, send)

    return called


def test_metrics_are_for_this_machine_alone() -> None:
    """They are exact: their differences around one request are the score that its answer hides."""
    for client in ("127.0.0.1", "127.8.9.10", "::1", "::ffff:127.0.0.1"):
        assert asked_by(client) == 200
    for other in ("10.0.0.7", "192.0.2.1", "fe80::1%eth0", "::ffff:10.0.0.7", "localhost", "", None):
        assert asked_by(other) == 403
        assert asked_by(other, public=True) == 200


@pytest.mark.parametrize("name", ["X-Forwarded-For", "x-forwarded-host", "Forwarded", "X-Real-IP", "Via"])
def test_a_proxy_on_this_machine_does_not_make_metrics_public(name: str) -> None:
    assert asked_by("127.0.0.1", {name: "127.0.0.1"}) == 403
    assert asked_by("127.0.0.1", {name: "127.0.0.1"}, public=True) == 200


def test_the_request_id_is_never_the_clients() -> None:
    answer = post(create_app({"toy": toy_service()}), clean(), headers={"x-request-id": "mine\tforged"})
    assert "mine" not in answer.text + answer.headers["x-request-id"]


def status(messages: list[Message]) -> object:
    return messages[0]["status"]


def test_a_body_over_the_limit_is_not_kept() -> None:
    app = create_app({"toy": toy_service(limits=Limits(max_bytes=LIMIT))})
    sent = drive(app, [chunk(bytes(600), True), chunk(bytes(600), True), chunk(bytes(600), False)])
    assert status(sent) == 413
    assert (b"connection", b"close") not in sent[0]["headers"]
    lying = drive(app, [chunk(bytes(LIMIT + 1))], headers=[(b"content-length", b"10")])
    assert status(lying) == 413


def test_a_declared_body_over_the_limit_is_refused_unread() -> None:
    app = create_app({"toy": toy_service(limits=Limits(max_bytes=LIMIT))})
    sent = drive(app, [], headers=[(b"content-length", b"1001"), (b"expect", b"100-continue")])
    assert status(sent) == 413
    assert (b"connection", b"close") in sent[0]["headers"]


def test_a_client_that_never_stops_sending_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("handlers.exchange._LINGER_SECONDS", 0.05)
    app = create_app({"toy": toy_service(limits=Limits(max_bytes=LIMIT))})
    sent = drive(app, [chunk(bytes(LIMIT + 1), True)])
    assert status(sent) == 413
    assert (b"connection", b"close") in sent[0]["headers"]


def test_a_client_that_is_too_slow_is_cut_off() -> None:
    app = create_app({"toy": toy_service()}, body_seconds=0.05)
    sent = drive(app, [chunk(b"x", True)])
    assert status(sent) == 400
    assert (b"connection", b"close") in sent[0]["headers"]


@pytest.mark.parametrize("value", [b"-1", b"1e3", b"", b"\xb2", b"0x10", b"9" * 5000, b"1,1"])
def test_a_malformed_content_length_is_400(value: bytes) -> None:
    sent = drive(create_app({"toy": toy_service()}), [chunk(clean())], headers=[(b"content-length", value)])
    assert status(sent) == 400


def test_a_content_length_that_does_not_hold_is_400() -> None:
    app = create_app({"toy": toy_service()})
    for value in (b"5000", b"1"):
        assert status(drive(app, [chunk(clean())], headers=[(b"content-length", value)])) == 400
    twice = [(b"content-length", b"5"), (b"content-length", b"6")]
    assert status(drive(app, [chunk(clean())], headers=twice)) == 400


def test_a_client_that_leaves_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    app = create_app({"toy": toy_service()})
    with caplog.at_level(logging.INFO):
        assert drive(app, [chunk(b"x", True), GONE]) == []
        assert drive(app, [GONE]) == []
    assert caplog.records == []


def test_a_body_in_many_chunks_is_one_image() -> None:
    messages = [chunk(bytes([byte]), True) for byte in clean(2)] + [chunk(b"")]
    sent = drive(create_app({"toy": toy_service()}), messages)
    assert json.loads(sent[1]["body"])["label_index"] == 2


def test_anything_unexpected_is_503(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("secret\nline")

    monkeypatch.setattr(ImageService, "__call__", broken)
    answer = post(create_app({"toy": toy_service()}), clean())
    assert answer.status_code == 503
    assert answer.json() == {"verdict": "rejected", "reason": "guard-failed", "request_id": answer.headers["x-request-id"]}
    (record,) = caplog.records
    assert "secret line" in record.getMessage()


def test_an_answer_that_is_no_json_is_503(caplog: pytest.LogCaptureFixture) -> None:
    guard = toy_guard()
    nameless = msgspec.structs.replace(guard.predictor.spec, class_names=("\ud800",) * 4)
    service = toy_service(Guard(replace(guard.predictor, spec=nameless), guard.detectors))
    answer = post(create_app({"toy": service}), clean())
    assert [answer.status_code, answer.json()["reason"]] == [503, "guard-failed"]
    assert "UnicodeEncodeError" in caplog.text


def test_the_loop_answers_while_guards_run_and_no_more_run_than_allowed() -> None:
    running: list[int] = [0, 0]

    def slow(images: Tensor) -> Tensor:
        running[0] += 1
        running[1] = max(running)
        time.sleep(0.2)
        running[0] -= 1
        logits: Tensor = ToyNet()(images)
        return logits

    app = create_app({"toy": toy_service(toy_guard(answers=slow))}, limiter=anyio.CapacityLimiter(1))
    order: list[str] = []

    async def send(client: httpx.AsyncClient, method: str, path: str, body: bytes) -> int:
        answer = await client.request(method, path, content=body)
        order.append(path)
        return answer.status_code

    async def run() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            slow_ones = [asyncio.create_task(send(client, "POST", "/predictions/toy", clean(row))) for row in range(3)]
            await asyncio.sleep(0.05)
            fast = await send(client, "GET", "/ping", b"")
            return [fast, *await asyncio.gather(*slow_ones)]

    assert asyncio.run(asyncio.wait_for(run(), TIMEOUT)) == [200, 200, 200, 200]
    assert order[0] == "/ping"
    assert running[1] == 1
