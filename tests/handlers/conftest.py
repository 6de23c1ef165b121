"""A TorchServe that answers as a test wants it to, and on which every call is recorded."""

from __future__ import annotations

import json
from urllib.parse import parse_qsl

import pytest

from guard.errors import ServingError
from handlers import torchserve_api, torchserve_drain, torchserve_trial
from handlers.torchserve_api import Addresses

WHERE = Addresses(management="http://127.0.0.1:1", inference="http://127.0.0.1:2")

ASKED: list[str] = []
"""Calls, in order."""
THERE: set[str] = set()
"""Descriptions of versions that are registered from the start."""
SILENT: set[str] = set()
"""Calls that are not answered in time."""
QUERIES: dict[str, dict[str, str]] = {}
"""Parameters of the calls."""
SENT: list[bytes] = []
"""Bodies of the calls that have one."""
AFTER: dict[str, tuple[str, tuple[int, bytes]]] = {}
"""Calls that are answered otherwise once another has been made: that one, and the answer."""


def described(version: str, **more: object) -> bytes:
    return json.dumps([{"modelVersion": version, "workers": [{"status": "READY"}], **more}]).encode()


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[int, bytes]]:
    """What is answered, by method and path; calls are recorded above."""
    given: dict[str, tuple[int, bytes]] = {
        "GET /models/m": (200, described("1.0")),
        "GET /models/m/1.0": (200, described("1.0")),
        "GET /models/m/2.0": (200, described("2.0")),
        "POST /models": (200, b"{}"),
        "POST /predictions/m/1.0": (400, b"{}"),
        "POST /predictions/m/2.0": (400, b"{}"),
        "PUT /models/m/2.0/set-default": (200, b"{}"),
        "DELETE /models/m/1.0": (200, b"{}"),
        "DELETE /models/m/2.0": (200, b"{}"),
    }

    def request(_: str, __: object, method: str, path: str, timeout: float, body: bytes) -> tuple[int, bytes]:
        path, _, query = path.partition("?")
        call = f"{method} {path}"
        ASKED.append(call)
        QUERIES[call] = dict(parse_qsl(query))
        if body:
            SENT.append(body)
        if call in AFTER and AFTER[call][0] in ASKED:
            return AFTER[call][1]
        if call == "GET /models/m/2.0" and "POST /models" not in ASKED and call not in THERE:
            return 404, b"{}"
        if call in SILENT:
            raise ServingError("no answer") from TimeoutError()
        return given[call]

    for record in (ASKED, THERE, SILENT, QUERIES, SENT, AFTER):
        record.clear()
    AFTER["GET /models/m"] = ("PUT /models/m/2.0/set-default", (200, described("2.0")))
    monkeypatch.setattr(torchserve_api, "_request", request)
    monkeypatch.setattr(torchserve_drain, "_QUIET_SECONDS", 0.0)
    monkeypatch.setattr(torchserve_trial, "_PAUSE_SECONDS", 0.0)
    return given
