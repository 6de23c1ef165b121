"""Rolling out against a management API that misbehaves; with a real one: tests/end_to_end/test_roll_out.py."""

from __future__ import annotations

import dataclasses
import json
import zipfile
from pathlib import Path

import pytest

from guard.errors import ServingError
from handlers import torchserve_drain, torchserve_rollout
from handlers.torchserve_api import Addresses
from handlers.torchserve_capacity import Capacity
from handlers.torchserve_rollout import archive_config, roll_out
from handlers.torchserve_store import Delivery
from tests.handlers.conftest import AFTER, ASKED, QUERIES, SILENT, THERE, WHERE, described


def test_in_order(answers: dict[str, tuple[int, bytes]]) -> None:
    assert roll_out("m", "m.mar", "2.0", WHERE).replaced == "1.0"
    assert ASKED.index("POST /predictions/m/2.0") < ASKED.index("PUT /models/m/2.0/set-default") < len(ASKED) - 1
    assert ASKED[-1] == "DELETE /models/m/1.0"


@pytest.mark.parametrize("call", ["POST /models", "POST /predictions/m/2.0", "PUT /models/m/2.0/set-default"])
def test_what_fails_before_the_change_takes_the_new_version_away(call: str, answers: dict[str, tuple[int, bytes]]) -> None:
    answers[call] = (503, b'{"message": "no"}')
    del AFTER["GET /models/m"]
    with pytest.raises(ServingError, match="got 503: no"):
        roll_out("m", "m.mar", "2.0", WHERE)
    assert ASKED[-1] == "DELETE /models/m/2.0"
    assert "DELETE /models/m/1.0" not in ASKED


def test_a_version_that_was_registered_before_is_not_removed(answers: dict[str, tuple[int, bytes]]) -> None:
    answers["POST /models"] = (409, b'{"message": "registered already"}')
    with pytest.raises(ServingError, match=r"got 409: registered already; .*curl -X DELETE .*/m/2\.0"):
        roll_out("m", "m.mar", "2.0", WHERE)
    assert not [call for call in ASKED if call.startswith("DELETE")]


@pytest.mark.parametrize("described_as", [{}, {"workers": [], "minWorkers": 0, "modelUrl": "other.mar"}])
def test_a_version_that_is_there_already_is_left_alone_and_the_way_out_named(
    described_as: dict[str, object], answers: dict[str, tuple[int, bytes]], tmp_path: Path
) -> None:
    THERE.add("GET /models/m/2.0")
    answers["GET /models/m/2.0"] = (200, described("2.0", **described_as))
    (tmp_path / "other.mar").write_bytes(b"of other content")
    with pytest.raises(ServingError, match=r"registered already.*: export with another --version.*curl -X DELETE .*/m/2\.0\)"):
        roll_out("m", "m.mar", "2.0", WHERE, delivery=Delivery(tmp_path, written))
    assert all(call.startswith("GET") for call in ASKED)
    assert [item.name for item in tmp_path.iterdir()] == ["other.mar"]


def keep(store: Path, answers: dict[str, tuple[int, bytes]]) -> Delivery:
    """A version 2.0 that --keep-old has left, and its archive."""
    THERE.add("GET /models/m/2.0")
    (store / "first.mar").write_bytes(b"archive")
    answers["PUT /models/m/2.0"] = (202, b"{}")
    answers["GET /models/m/2.0"] = (200, described("2.0", workers=[], minWorkers=0, maxWorkers=0, modelUrl="first.mar"))
    AFTER["GET /models/m/2.0"] = ("PUT /models/m/2.0", (200, described("2.0", minWorkers=1, maxWorkers=1)))
    return Delivery(store, written)


def test_a_version_that_was_kept_gets_workers_again(answers: dict[str, tuple[int, bytes]], tmp_path: Path) -> None:
    assert roll_out("m", "m-2.0.mar", "2.0", WHERE, delivery=keep(tmp_path, answers)).replaced == "1.0"
    assert QUERIES["PUT /models/m/2.0"] == {"min_worker": "1", "max_worker": "1"}
    assert "POST /models" not in ASKED
    assert ASKED[-1] == "DELETE /models/m/1.0"
    assert [item.name for item in tmp_path.iterdir()] == ["first.mar"]


def test_a_version_that_was_kept_and_does_not_answer_loses_them(answers: dict[str, tuple[int, bytes]], tmp_path: Path) -> None:
    answers["POST /predictions/m/2.0"] = (503, b'{"reason": "guard-failed"}')
    with pytest.raises(ServingError, match="got 503: guard-failed"):
        roll_out("m", "m-2.0.mar", "2.0", WHERE, delivery=keep(tmp_path, answers))
    assert (ASKED[-1], QUERIES[ASKED[-1]]) == ("PUT /models/m/2.0", {"min_worker": "0", "max_worker": "0"})
    assert not [call for call in ASKED if call.startswith("DELETE")]


@pytest.mark.parametrize("call", ["POST /models", "POST /predictions/m/2.0", "PUT /models/m/2.0/set-default"])
def test_a_failure_leaves_the_store_as_it_was(call: str, answers: dict[str, tuple[int, bytes]], tmp_path: Path) -> None:
    (tmp_path / "m.mar").write_bytes(b"old")
    answers[call] = (503, b"{}")
    del AFTER["GET /models/m"]
    with pytest.raises(ServingError):
        roll_out("m", "m-2.0.mar", "2.0", WHERE, delivery=Delivery(tmp_path, written))
    assert {item.name: item.read_bytes() for item in tmp_path.iterdir()} == {"m.mar": b"old"}
    (tmp_path / "m-2.0.mar").write_bytes(b"archive")  # was there before, and is no other
    ASKED.clear()
    with pytest.raises(ServingError):
        roll_out("m", "m-2.0.mar", "2.0", WHERE, delivery=Delivery(tmp_path, written))
    assert (tmp_path / "m-2.0.mar").read_bytes() == b"archive"


def test_an_archive_in_the_store_is_not_replaced_by_another(answers: dict[str, tuple[int, bytes]], tmp_path: Path) -> None:
    (tmp_path / "m-2.0.mar").write_bytes(b"of other content")
    with pytest.raises(ServingError, match=r"expected no other archive m-2\.0\.mar in .*: export with another --version"):
        roll_out("m", "m-2.0.mar", "2.0", WHERE, delivery=Delivery(tmp_path, written))
    assert {item.name: item.read_bytes() for item in tmp_path.iterdir()} == {"m-2.0.mar": b"of other content"}
    assert not [call for call in ASKED if not call.startswith("GET")]


def test_a_store_that_is_none(answers: dict[str, tuple[int, bytes]], tmp_path: Path) -> None:
    with pytest.raises(ServingError, match=r"could not copy m-2\.0\.mar to .*/none: No such file"):
        roll_out("m", "m-2.0.mar", "2.0", WHERE, delivery=Delivery(tmp_path / "none", written))


def test_an_archive_that_arrives_is_there_whole(answers: dict[str, tuple[int, bytes]], tmp_path: Path) -> None:
    roll_out("m", "m-2.0.mar", "2.0", WHERE, delivery=Delivery(tmp_path, written))
    assert {item.name: item.read_bytes() for item in tmp_path.iterdir()} == {"m-2.0.mar": b"archive"}


def test_of_two_at_once_one_gives_way(answers: dict[str, tuple[int, bytes]]) -> None:
    """The other one came first while this one's workers loaded."""
    AFTER["GET /models/m"] = ("POST /models", (200, described("3.0")))
    with pytest.raises(ServingError, match=r"expected m 1\.0 to serve until 2\.0 does, got 3\.0 meanwhile"):
        roll_out("m", "m.mar", "2.0", WHERE)
    assert "PUT /models/m/2.0/set-default" not in ASKED
    assert ASKED[-1] == "DELETE /models/m/2.0"


def test_who_is_overtaken_at_the_last_moment_does_not_say_that_it_serves(answers: dict[str, tuple[int, bytes]]) -> None:
    AFTER["GET /models/m"] = ("PUT /models/m/2.0/set-default", (200, described("3.0")))
    with pytest.raises(ServingError, match=r"expected m 2\.0 to serve now, got 3\.0"):
        roll_out("m", "m.mar", "2.0", WHERE)
    assert ASKED[-1] == "DELETE /models/m/2.0"
    assert "DELETE /models/m/1.0" not in ASKED


def test_an_old_version_that_somebody_else_has_ended_is_no_trouble(answers: dict[str, tuple[int, bytes]]) -> None:
    answers["GET /models/m/1.0"] = answers["DELETE /models/m/1.0"] = (404, b"{}")
    assert roll_out("m", "m.mar", "2.0", WHERE).replaced == "1.0"


def test_a_kept_version_that_serves_meanwhile_keeps_its_workers(answers: dict[str, tuple[int, bytes]], tmp_path: Path) -> None:
    """Somebody else went back to it, and was faster."""
    AFTER["GET /models/m"] = ("PUT /models/m/2.0", (200, described("2.0")))
    with pytest.raises(ServingError, match=r"expected m 1\.0 to serve until 2\.0 does, got 2\.0 meanwhile"):
        roll_out("m", "m-2.0.mar", "2.0", WHERE, delivery=keep(tmp_path, answers))
    assert QUERIES["PUT /models/m/2.0"] == {"min_worker": "1", "max_worker": "1"}


def test_a_change_whose_answer_is_lost_has_come_to_pass(answers: dict[str, tuple[int, bytes]], tmp_path: Path) -> None:
    SILENT.add("PUT /models/m/2.0/set-default")
    assert roll_out("m", "m-2.0.mar", "2.0", WHERE, delivery=Delivery(tmp_path, written)).version == "2.0"
    assert "DELETE /models/m/2.0" not in ASKED
    assert (tmp_path / "m-2.0.mar").is_file()


def test_a_version_whose_workers_somebody_else_has_ended_does_not_serve(answers: dict[str, tuple[int, bytes]]) -> None:
    AFTER["GET /models/m/2.0"] = ("POST /predictions/m/2.0", (200, described("2.0", workers=[])))
    with pytest.raises(ServingError, match=r"expected workers of m 2\.0, got none"):
        roll_out("m", "m.mar", "2.0", WHERE)
    assert "PUT /models/m/2.0/set-default" not in ASKED


def test_what_another_roll_out_has_registered_keeps_its_archive(answers: dict[str, tuple[int, bytes]], tmp_path: Path) -> None:
    answers["POST /models"] = (409, b"{}")
    with pytest.raises(ServingError, match="got 409"):
        roll_out("m", "m-2.0.mar", "2.0", WHERE, delivery=Delivery(tmp_path, written))
    assert [item.name for item in tmp_path.iterdir()] == ["m-2.0.mar"]


@pytest.mark.parametrize("keep_old", [True, False])
def test_an_old_version_that_serves_again_is_not_ended(
    keep_old: bool, answers: dict[str, tuple[int, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody has set it back by hand while it drained."""
    monkeypatch.setattr(torchserve_rollout, "drain", lambda *_: AFTER.pop("GET /models/m"))
    with pytest.raises(ServingError, match=r"could not be ended \(it serves again, set by somebody else\)"):
        roll_out("m", "m.mar", "2.0", WHERE, keep_old=keep_old)
    assert not [call for call in ASKED if call.startswith(("DELETE", "PUT /models/m/1.0"))]


def written(draft: Path) -> None:
    draft.write_bytes(b"archive")


@pytest.mark.parametrize("call", ["GET /models/m/1.0", "DELETE /models/m/1.0"])
def test_what_fails_after_the_change_says_that_the_new_version_serves(
    call: str, answers: dict[str, tuple[int, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchserve_drain, "_QUIET_SECONDS", 0.01)
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


def test_a_new_version_is_as_the_old_one_where_nothing_else_is_said(answers: dict[str, tuple[int, bytes]]) -> None:
    """Left alone, TorchServe makes it one worker, batches of one, and a delay of 100 ms."""
    answers["GET /models/m"] = (
        200, described("1.0", minWorkers=3, maxWorkers=3, batchSize=8, maxBatchDelay=2, responseTimeout=60)
    )  # fmt: skip
    answers["GET /models/m/2.0"] = (200, json.dumps([{"modelVersion": "2.0", "workers": [{"status": "READY"}] * 3}]).encode())
    roll_out("m", "m.mar", "2.0", WHERE)
    assert QUERIES["POST /models"]["synchronous"] == "false"  # "true", the default, holds clients up
    asked = QUERIES["POST /models"]
    assert (asked["initial_workers"], asked["batch_size"]) == ("3", "8")
    assert (asked["max_batch_delay"], asked["response_timeout"]) == ("2", "60")
    answers["GET /models/m/2.0"] = (200, described("2.0"))
    ASKED.clear()
    roll_out("m", "m.mar", "2.0", WHERE, capacity=Capacity(workers=1, batch_size=4, max_batch_delay=0))
    asked = QUERIES["POST /models"]
    assert (asked["initial_workers"], asked["batch_size"]) == ("1", "4")
    assert (asked["max_batch_delay"], asked["response_timeout"]) == ("0", "60")


def test_an_archives_own_number_of_workers_gives_way(answers: dict[str, tuple[int, bytes]]) -> None:
    """TorchServe prefers the model-config's to what it is asked for."""
    answers["GET /models/m/2.0"] = (200, described("2.0", minWorkers=2, maxWorkers=2))
    answers["PUT /models/m/2.0"] = (200, b"{}")
    roll_out("m", "m.mar", "2.0", WHERE, capacity=Capacity(workers=1))
    assert QUERIES["PUT /models/m/2.0"] == {"min_worker": "1", "max_worker": "1"}


def test_a_worker_that_dies_while_it_loads_is_not_waited_for(
    answers: dict[str, tuple[int, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """TorchServe starts it anew for minutes, each time as another process."""
    lives = iter([-1, 7, 7, -1, 8])
    monkeypatch.setattr(torchserve_rollout, "_POLL_SECONDS", 0.0)

    def describe(name: str, version: str, _: Addresses) -> dict[str, object]:
        return {"workers": [{"id": "9001", "status": "UNLOADING", "pid": next(lives)}]}

    monkeypatch.setattr(torchserve_rollout, "describe_version", describe)
    with pytest.raises(ServingError, match=r"a worker of m 2\.0 died while it loaded its model"):
        roll_out("m", "m.mar", "2.0", WHERE)
    assert ASKED[-1] == "DELETE /models/m/2.0"


@pytest.mark.parametrize(
    ("config", "workers"),
    [
        ({"minWorkers": 2, "maxWorkers": 4}, 2),
        ({"minWorkers": 2}, None),
        ({"minWorkers": 2, "maxWorkers": 1}, None),
        ({"minWorkers": "2", "maxWorkers": 2}, None),
    ],
)
def test_what_torchserve_takes_from_a_model_config(config: dict[str, object], workers: int | None, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.mar", "w") as archive:
        archive.writestr("MAR-INF/MANIFEST.json", json.dumps({"model": {"modelVersion": "2.0", "configFile": "c.yaml"}}))
        archive.writestr("c.yaml", json.dumps({**config, "maxBatchDelay": 0, "guard": {"mode": "monitor"}}))
    found = archive_config(tmp_path / "m.mar")
    assert found["guard"] == {"mode": "monitor"}
    assert Capacity.read(found) == Capacity(workers=workers, max_batch_delay=0)


def test_a_token_that_is_not_the_servers_is_no_answer_of_the_new_version(answers: dict[str, tuple[int, bytes]]) -> None:
    """It is 400, as a handler's answer to an empty body is."""
    answers["POST /predictions/m/2.0"] = (400, b'{"code": 400, "type": "InvalidKeyException", "message": "Token failed"}')
    with pytest.raises(ServingError, match="to take the token, got: Token failed"):
        roll_out("m", "m.mar", "2.0", WHERE)
    assert ASKED[-1] == "DELETE /models/m/2.0"
