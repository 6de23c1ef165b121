"""When the workers of an old version may be ended, by a management API that misbehaves."""

from __future__ import annotations

import json
import time

import pytest

from guard.errors import ServingError
from handlers import torchserve_drain
from handlers.torchserve_rollout import roll_out
from tests.handlers.conftest import ASKED, SILENT, WHERE, described


def test_an_old_version_that_still_has_requests_is_not_taken_away(
    answers: dict[str, tuple[int, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchserve_drain, "_QUIET_SECONDS", 0.05)
    monkeypatch.setattr(torchserve_drain, "_POLL_SECONDS", 0.01)
    busy = json.loads(described("1.0"))
    busy[0]["jobQueueStatus"] = {"pendingRequests": 5}
    answers["GET /models/m/1.0"] = (200, json.dumps(busy).encode())
    with pytest.raises(ServingError, match=r"m 2\.0 serves now, but 1\.0 could not be ended .*5 of them queued"):
        roll_out("m", "m.mar", "2.0", WHERE, timeout=0.2)
    assert not [call for call in ASKED if call.startswith("DELETE")]


def test_a_worker_that_is_busy_for_longer_than_the_caller_waits_is_left(answers: dict[str, tuple[int, bytes]]) -> None:
    SILENT.add("POST /predictions/m/1.0")
    with pytest.raises(ServingError, match=r"m 2\.0 serves now, but 1\.0 could not be ended \(after 5 s its worker was still"):
        roll_out("m", "m.mar", "2.0", WHERE, drain_timeout=5)
    assert not [call for call in ASKED if call.startswith("DELETE")]
    ASKED.clear()
    roll_out("m", "m.mar", "2.0", WHERE)  # by then TorchServe has given up what it was at
    assert ASKED[-1] == "DELETE /models/m/1.0"


def test_of_several_workers_one_may_still_be_busy(answers: dict[str, tuple[int, bytes]]) -> None:
    two = {"modelVersion": "1.0", "workers": [{"status": "READY"}] * 2}
    answers["GET /models/m/1.0"] = (200, json.dumps([two]).encode())
    started = time.monotonic()
    roll_out("m", "m.mar", "2.0", WHERE, drain_timeout=0.5)
    assert time.monotonic() - started >= 0.5
    assert ASKED[-1] == "DELETE /models/m/1.0"


def test_without_workers_nothing_is_waited_for(answers: dict[str, tuple[int, bytes]]) -> None:
    answers["GET /models/m/1.0"] = (200, b'[{"modelVersion": "1.0", "workers": []}]')
    roll_out("m", "m.mar", "2.0", WHERE)
    assert ASKED[-1] == "DELETE /models/m/1.0"
    assert "POST /predictions/m/1.0" not in ASKED


def test_a_full_queue_is_no_answer_of_a_worker(answers: dict[str, tuple[int, bytes]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchserve_drain, "_MARGIN_SECONDS", 0.05)
    monkeypatch.setattr(torchserve_drain, "_POLL_SECONDS", 0.01)
    answers["POST /predictions/m/1.0"] = (503, b'{"code": 503, "type": "ServiceUnavailableException", "message": "full"}')
    with pytest.raises(ServingError, match="its worker was still busy"):
        roll_out("m", "m.mar", "2.0", WHERE, drain_timeout=0.1)
    answers["GET /models/m/1.0"] = (200, described("1.0").replace(b"READY", b"UNLOADED"))
    ASKED.clear()
    assert roll_out("m", "m.mar", "2.0", WHERE, drain_timeout=0.1).replaced == "1.0"  # its worker died: nothing is at work
