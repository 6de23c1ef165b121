"""A real TorchServe: four models, one worker each."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from export import export_mar
from guard import Quarantine
from guard.errors import ServingError
from handlers.torchserve_server import ServerOptions, TorchServeProcess
from handlers.torchserve_setup import stage_archive
from tests.handlers.toy_service import bomb, clean, triggered
from tests.toy import save_toy_profile

pytestmark = pytest.mark.skipif(
    shutil.which("java") is None and "JAVA_HOME" not in os.environ, reason="TorchServe needs Java, and there is none"
)

FORGERY = "\n[METRICS]guard_requests_total.count:99|#outcome:accepted,model:own|#type:COUNTER|#hostname:h,1"
USERS_HANDLER = f"""
from handlers.torchserve import guarded

FORGERY = {FORGERY!r}


@guarded
class MyHandler:
    def initialize(self, context):
        self.name = context.model_name

    def handle(self, data, context):
        if any(len(row["body"]) % 2 for row in data):
            raise RuntimeError("a body of odd length" + FORGERY)
        context.set_response_status(201, "Created", 0)
        return [{{"mine": self.name, "bytes": len(row["body"])}} for row in data]
"""
BATCH = {"minWorkers": 1, "maxWorkers": 1, "batchSize": 8, "maxBatchDelay": 1000}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Profiles and archives."""
    folder = tmp_path_factory.mktemp("torchserve")
    profile, store = save_toy_profile(folder / "profile"), folder / "store"
    (folder / "my_handler.py").write_text(USERS_HANDLER)
    kept = {"quarantine": str(folder / "kept"), "max_pixels": 1_000_000}
    export_mar(profile, store, "toy", "2.1.0", {**BATCH, "guard": kept})
    export_mar(profile, store, "watched", model_config={"guard": {"mode": "monitor", "expose_scores": True}})
    export_mar(profile, store, "shut", model_config={"guard": {"mode": "wrong"}})
    export_mar(profile, store, "own", handler=folder / "my_handler.py")
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[TorchServeProcess]:
    models = {name: f"{name}.mar" for name in ("toy", "watched", "shut", "own")}
    with TorchServeProcess(folder / "store", models) as server:
        yield server


def test_a_lone_request_hardly_waits_for_others(folder: Path, tmp_path: Path) -> None:
    archive = tmp_path / "watched.mar"
    (entry,) = stage_archive(folder / "store" / "watched.mar", archive, ServerOptions(batch_size=8)).values()
    assert (entry["batchSize"], entry["maxBatchDelay"]) == (8, 2)


def send(server: TorchServeProcess, model: str, body: bytes, **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.ports["inference"], timeout=60)
    try:
        connection.request(
            "POST", f"/predictions/{model}", body, {name.replace("_", "-"): value for name, value in headers.items()}
        )
        response = connection.getresponse()
        answer = json.loads(response.read() or b"{}")  # TorchServe's own 413 has no body
        if "request_id" in answer:
            assert response.getheader("content-type") == "application/json"
            assert response.getheader("x-request-id") == answer["request_id"]
        return response.status, answer
    finally:
        connection.close()


def scrape(server: TorchServeProcess, name: str, model: str) -> dict[str, float]:
    """Values of a metric of one model, by its other labels."""
    connection = http.client.HTTPConnection("127.0.0.1", server.ports["metrics"], timeout=60)
    try:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    finally:
        connection.close()
    found = re.findall(rf'^{name}\{{(.*?),?model="{model}",Hostname="[^"]*",([^}}]*)\}} (\S+)$', text, re.MULTILINE)
    return {first + second: float(value) for first, second, value in found}


def eventually(condition: Any, seconds: float = 5.0) -> bool:
    """TorchServe reads its workers' measurements a moment after the answers went out."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(condition())


def test_eight_at_once_get_eight_right_answers(server: TorchServeProcess, folder: Path) -> None:
    bodies = [clean(0), triggered(1), clean(1), b"junk", clean(2), bomb(), triggered(2), clean(3)]
    before = scrape(server, "guard_requests_total", "toy")
    with ThreadPoolExecutor(len(bodies)) as pool:
        answers = list(pool.map(lambda body: send(server, "toy", body), bodies))
    assert [status for status, _ in answers] == [200, 422, 200, 400, 200, 413, 422, 200]
    assert [body.get("label_index") for _, body in answers] == [0, None, 1, None, 2, None, None, 3]
    assert [body.get("reason") for _, body in answers[3:7:2]] == ["not-an-image", "too-large"]
    assert len({body["request_id"] for _, body in answers}) == 8
    assert len(Quarantine(folder / "kept").items()) == 2

    wanted = {"accepted": 4.0, "rejected": 2.0, "invalid": 2.0, "failed": 0.0, "suspicious": 0.0, "unjudged": 0.0}

    def counted() -> bool:
        now = scrape(server, "guard_requests_total", "toy")
        return all(now[f'outcome="{key}"'] - before[f'outcome="{key}"'] == count for key, count in wanted.items())

    assert eventually(counted)
    assert scrape(server, "guard_rejections_total", "toy") == {'detector="strip"': 2.0}
    assert scrape(server, "guard_forward_passes_total", "toy")[""] > 80
    assert scrape(server, "guard_quarantine_failures_total", "toy") == {"": 0.0}
    assert scrape(server, "guard_entropy_bits_count", "toy") == {'detector="strip"': 6.0}
    assert scrape(server, "guard_seconds_bucket", "toy")['le="+Inf",'] >= 8.0


def test_they_were_one_batch(server: TorchServeProcess) -> None:
    """The worker says when it gets a batch; the answers above are the lines between two of these."""
    batches = server.log().split("Backend received inference")
    assert max(batch.count('"model": "toy"') for batch in batches) >= 7


def test_the_log_has_one_line_per_request(server: TorchServeProcess) -> None:
    status, body = send(server, "toy", FORGERY.replace("own", "toy").encode())
    assert status == 400
    assert eventually(lambda: f'"request_id": "{body["request_id"]}"' in server.log())
    lines = [line for line in server.log().splitlines() if f'"request_id": "{body["request_id"]}"' in line]
    assert len(lines) == 1
    assert json.loads(lines[0].split("MODEL_LOG - ")[1])["outcome"] == "invalid"
    assert scrape(server, "guard_requests_total", "toy")['outcome="accepted"'] < 99


def test_other_bodies(server: TorchServeProcess) -> None:
    assert send(server, "toy", b'{"a": 1}', content_type="application/json")[0] == 400
    part = b'--x\r\nContent-Disposition: form-data; name="a\\n[METRICS]"; filename="b.png"\r\nContent-Type: image/png\r\n\r\n'
    two = part + clean() + b"\r\n" + part.replace(b'"a', b'"b') + triggered() + b"\r\n--x--\r\n"
    for body, status in ((part + triggered() + b"\r\n--x--\r\n", 422), (two, 400)):
        assert send(server, "toy", body, content_type="multipart/form-data; boundary=x")[0] == status
    assert send(server, "toy", bytes(12 * 1024 * 1024))[0] == 413


def test_monitor_mode_answers_and_counts(server: TorchServeProcess) -> None:
    status, body = send(server, "watched", triggered())
    assert (status, body["verdict"]) == (200, "accepted")
    assert body["scores"]["strip"] > -0.05
    assert eventually(lambda: scrape(server, "guard_requests_total", "watched")['outcome="suspicious"'] == 1.0)


def test_a_handler_that_does_not_load_is_shut_not_hanging(server: TorchServeProcess) -> None:
    assert send(server, "shut", clean())[0] == 503
    assert "expected valid options under `guard:`" in server.log()


def test_a_users_own_handler_is_guarded(server: TorchServeProcess) -> None:
    even, odd = (clean() + bytes(2 - (len(clean()) + extra) % 2) for extra in (0, 1))
    assert send(server, "own", even) == (201, {"mine": "own", "bytes": len(even)})
    assert send(server, "own", triggered())[1]["reason"] == "backdoor-suspected"
    assert send(server, "own", odd)[0] == 503
    assert eventually(lambda: scrape(server, "guard_requests_total", "own")['outcome="failed"'] == 1.0)
    assert "a body of odd length" in server.log()
    assert scrape(server, "guard_requests_total", "own")['outcome="accepted"'] == 1.0


def test_stop_leaves_no_process_and_no_file(folder: Path) -> None:
    store = folder / "store"
    with TorchServeProcess(store, {"a": "watched.mar"}, ServerOptions(workers=2, batch_size=4, token_auth=True)) as server:
        processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        private = server._folder
        assert len(processes) == 4
        assert "model_name: a, batchSize: 4" in server.log()
        token = server.token()
        assert send(server, "a", triggered())[0] == 400  # TorchServe's own answer to those without a token
        assert send(server, "a", triggered(), authorization=f"Bearer {token}")[0] == 200
        with (
            pytest.raises(ServingError, match="in use: pick another"),
            TorchServeProcess(store, {"a": "own.mar"}, ServerOptions(inference_port=server.ports["inference"])),
        ):
            pass
    assert private is not None
    assert not any(item.is_running() and item.status() != psutil.STATUS_ZOMBIE for item in processes)
    assert not private.exists()


def test_a_crashing_worker_is_told_in_one_line(folder: Path) -> None:
    bad = folder / "bad_handler.py"
    bad.write_text("import a_package_that_is_not_there\n")
    export_mar(folder / "profile", folder / "bad", "bad", handler=bad)
    with (
        pytest.raises(ServingError, match="a_package_that_is_not_there") as caught,
        TorchServeProcess(folder / "bad", {"bad": "bad.mar"}),
    ):
        pass
    assert "\n" not in str(caught.value)
