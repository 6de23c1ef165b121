"""Rolling out against a management API that misbehaves; with a real one: tests/end_to_end/test_loop.py."""

from __future__ import annotations

import dataclasses
import json

import pytest

from guard.errors import ServingError
from handlers import torchserve_rollout
from handlers.torchserve_rollout import Addresses, roll_out

WHERE = Addresses(management="http://127.0.0.1:1", inference="http://127.0.0.1:2")


def described(version: str) -> bytes:
    return json.dumps([{"modelVersion": version, "workers": [{"status": "READY"}]}]).encode()


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[int, bytes]]:
    """What is answered, by method and path; every call is recorded under `asked`."""
    given: dict[str, tuple[int, bytes]] = {
        "GET /models/m": (200, described("1.0")),
        "GET /models/m/1.0": (200, described("1.0")),
        "GET /models/m/2.0": (200, described("2.0")),
        "POST /models": (200, b"{}"),
        "POST /predictions/m/2.0": (400, b"{}"),
        "PUT /models/m/2.0/set-default": (200, b"{}"),
        "DELETE /models/m/1.0": (200, b"{}"),
        "DELETE /models/m/2.0": (200, b"{}"),
    }

    def request(_: str, __: object, method: str, path: str, ___: float) -> tuple[int, bytes]:
        call = f"{method} {path.partition('?')[0]}"
        ASKED.append(call)
        if call == "GET /models/m/2.0" and "POST /models" not in ASKED and call not in THERE:
            return 404, b"{}"
        return given[call]

    ASKED.clear()
    THERE.clear()
    monkeypatch.setattr(torchserve_rollout, "_request", request)
    monkeypatch.setattr(torchserve_rollout, "_QUIET_SECONDS", 0.0)
    return given


ASKED: list[str] = []
THERE: set[str] = set()
"""Descriptions of versions that are registered from the start."""


def test_in_order(answers: dict[str, tuple[int, bytes]]) -> None:
    assert roll_out("m", "m.mar", "2.0", WHERE).replaced == "1.0"
    assert ASKED.index("POST /predictions/m/2.0") < ASKED.index("PUT /models/m/2.0/set-default") < len(ASKED) - 1
    assert ASKED[-1] == "DELETE /models/m/1.0"


@pytest.mark.parametrize("call", ["POST /models", "POST /predictions/m/2.0", "PUT /models/m/2.0/set-default"])
def test_what_fails_before_the_change_takes_the_new_version_away(call: str, answers: dict[str, tuple[int, bytes]]) -> None:
    answers[call] = (503, b'{"message": "no"}')
    with pytest.raises(ServingError, match="got 503: no"):
        roll_out("m", "m.mar", "2.0", WHERE)
    assert ASKED[-1] == "DELETE /models/m/2.0"
    assert "DELETE /models/m/1.0" not in ASKED


def test_a_version_that_was_registered_before_is_not_removed(answers: dict[str, tuple[int, bytes]]) -> None:
    answers["POST /models"] = (409, b'{"message": "registered already"}')
    with pytest.raises(ServingError, match="got 409: registered already"):
        roll_out("m", "m.mar", "2.0", WHERE)
    assert not [call for call in ASKED if call.startswith("DELETE")]


@pytest.mark.parametrize("status", [404, 500])
def test_a_version_that_was_kept_survives_a_failure_to_register_it_again(
    status: int, answers: dict[str, tuple[int, bytes]]
) -> None:
    THERE.add("GET /models/m/2.0")
    answers["POST /models"] = (status, b'{"message": "no such archive"}')
    with pytest.raises(ServingError, match=f"got {status}: no such archive"):
        roll_out("m", "m.mar", "2.0", WHERE)
    assert not [call for call in ASKED if call.startswith("DELETE")]


@pytest.mark.parametrize("call", ["GET /models/m/1.0", "DELETE /models/m/1.0"])
def test_what_fails_after_the_change_says_that_the_new_version_serves(
    call: str, answers: dict[str, tuple[int, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchserve_rollout, "_QUIET_SECONDS", 0.01)
    answers[call] = (500, b"")
    with pytest.raises(ServingError, match=r"m 2\.0 serves now, but 1\.0 could not be ended .*500.*: end it by hand"):
        roll_out("m", "m.mar", "2.0", WHERE)
    assert "DELETE /models/m/2.0" not in ASKED


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}", b"[1]", b'[{"modelVersion": "1.0"}]'])
def test_other_servers_are_told(body: bytes, answers: dict[str, tuple[int, bytes]]) -> None:
    answers["GET /models/m"] = (200, body)
    with pytest.raises(ServingError, match="is this its management API"):
        roll_out("m", "m.mar", "2.0", WHERE)


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:99999", "http://[::1", "ftp://127.0.0.1", "127.0.0.1:8081", "http://a b:1", "http://127.0.0..1:8081"],
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(ServingError, match="expected"):
        roll_out("m", "m.mar", "2.0", Addresses(management=url, inference=url))


@pytest.mark.parametrize("token", ["two\nlines", "schlüssel"])
def test_tokens_that_no_header_can_hold(token: str) -> None:
    with pytest.raises(ServingError, match="expected a token of printable ASCII characters"):
        roll_out("m", "m.mar", "2.0", dataclasses.replace(WHERE, management_token=token))


def test_an_old_version_that_still_has_requests_is_not_taken_away(
    answers: dict[str, tuple[int, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchserve_rollout, "_QUIET_SECONDS", 0.05)
    monkeypatch.setattr(torchserve_rollout, "_POLL_SECONDS", 0.01)
    busy = json.loads(described("1.0"))
    busy[0]["jobQueueStatus"] = {"pendingRequests": 5}
    answers["GET /models/m/1.0"] = (200, json.dumps(busy).encode())
    with pytest.raises(ServingError, match=r"m 2\.0 serves now, but 1\.0 could not be ended .*5 of them queued"):
        roll_out("m", "m.mar", "2.0", WHERE, timeout=0.2)
    assert not [call for call in ASKED if call.startswith("DELETE")]
