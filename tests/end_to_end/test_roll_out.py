"""A real TorchServe takes new versions while its workers are busy."""

from __future__ import annotations

import http.client
import json
import math
import os
import shutil
import time
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from guard.errors import ServingError
from handlers.torchserve_server import ServerOptions, TorchServeProcess
from tests.handlers.toy_service import clean
from tests.toy import save_toy_profile

pytestmark = pytest.mark.skipif(
    shutil.which("java") is None and "JAVA_HOME" not in os.environ, reason="TorchServe needs Java, and there is none"
)

SLOW_HANDLER = """
import time


class Handler:
    def initialize(self, context):
        self.version = context.manifest["model"]["modelVersion"]
        if self.version == "2.0":
            time.sleep(3)

    def handle(self, data, context):
        time.sleep(max(float(bytes(next(iter(row.values()), b"")) or b"0") for row in data))
        return [{"version": self.version} for _ in data]
"""
"""Takes as many seconds as the body says; the new version is slow to load as well."""
GUARDED_HANDLER = """
from handlers.torchserve import guarded


@guarded
class Handler:
    def initialize(self, context):
        self.version = context.manifest["model"]["modelVersion"]

    def handle(self, data, context):
        return [{{"version": {version}}} for _ in data]
"""
WORKS, RAISES = GUARDED_HANDLER.format(version="self.version"), GUARDED_HANDLER.format(version="self.typo")
SECONDS = 3  # longer than the old version's queue has to be empty


def archive(path: Path, version: str, config: Mapping[str, object] | None = None) -> Path:
    path.parent.mkdir(exist_ok=True)
    model = {"modelName": path.stem, "handler": "slow_handler.py", "modelVersion": version}
    model |= {} if config is None else {"configFile": "model-config.yaml"}
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("MAR-INF/MANIFEST.json", json.dumps({"runtime": "python", "model": model, "archiverVersion": "0.12.0"}))
        made.writestr("slow_handler.py", SLOW_HANDLER)
        made.writestr("model-config.yaml", json.dumps(config))
    return path


def guarded_archive(path: Path, profile: Path, version: str, handler: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    model = {"modelName": "toy", "handler": "own_handler.py", "modelVersion": version}
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("MAR-INF/MANIFEST.json", json.dumps({"runtime": "python", "model": model, "archiverVersion": "0.12.0"}))
        made.writestr("own_handler.py", handler)
        for item in profile.iterdir():
            made.write(item, item.name)
    return path


def ask(port: int, method: str, path: str, body: bytes = b"") -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, body, {"content-type": "application/octet-stream"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    except TimeoutError:
        return 0, "no answer"
    finally:
        connection.close()


def ask_when_replaced(server: TorchServeProcess, name: str) -> tuple[int, Any]:
    """A slow request that the old version gets at the last moment."""
    deadline = time.monotonic() + 60
    while ask(server.ports["management"], "GET", f"/models/{name}")[1][0]["modelVersion"] == "1.0":
        assert time.monotonic() < deadline, server.log()
        time.sleep(0.05)
    return ask(server.ports["inference"], "POST", f"/predictions/{name}/1.0", str(SECONDS).encode())


def longest_wait(server: TorchServeProcess, name: str) -> float:
    """Of clients that come one after the other, each by a connection of its own, until the new version answers."""
    longest, version = 0.0, "1.0"
    while version == "1.0":
        started = time.monotonic()
        status, answer = ask(server.ports["inference"], "POST", f"/predictions/{name}")
        longest, version = max(longest, time.monotonic() - started), answer["version"] if status == 200 else str(status)
        time.sleep(0.05)
    return longest if version == "2.0" else math.inf


def test_a_busy_worker_finishes_before_it_is_ended(tmp_path: Path) -> None:
    """One worker, and two of which one is idle: TorchServe says of neither whether it is busy."""
    shared = {"batchSize": 4, "maxBatchDelay": 3, "responseTimeout": SECONDS + 2}
    workers = {"one": 1, "two": 2}
    for name, count in workers.items():
        archive(tmp_path / "store" / f"{name}.mar", "1.0", {"minWorkers": count, "maxWorkers": count, **shared})
    models = {name: f"{name}.mar" for name in workers}
    with TorchServeProcess(tmp_path / "store", models, ServerOptions(model_api=True)) as server, ThreadPoolExecutor(6) as pool:

        def rolled_out(name: str, count: int) -> None:
            busy, waits = pool.submit(ask_when_replaced, server, name), pool.submit(longest_wait, server, name)
            assert server.roll_out(name, archive(tmp_path / "next" / f"{name}.mar", "2.0")).replaced == "1.0"
            assert busy.result() == (200, {"version": "1.0"})
            assert waits.result() < 3, "clients were held up while the new version loaded"
            assert ask(server.ports["inference"], "POST", f"/predictions/{name}") == (200, {"version": "2.0"})
            assert ask(server.ports["management"], "GET", f"/models/{name}/1.0")[0] == 404
            after = ask(server.ports["management"], "GET", f"/models/{name}")[1][0]
            assert [after[key] for key in ("minWorkers", "batchSize", "maxBatchDelay", "responseTimeout")] == [
                count, shared["batchSize"], shared["maxBatchDelay"], shared["responseTimeout"],
            ]  # fmt: skip
            assert len(after["workers"]) == count

        list(pool.map(rolled_out, workers, workers.values()))


@pytest.mark.slow
def test_a_version_that_works_on_no_image_changes_nothing_and_one_that_does_can_be_taken_back(tmp_path: Path) -> None:
    profile, image = save_toy_profile(tmp_path / "profile"), clean()
    first = guarded_archive(tmp_path / "store" / "toy.mar", profile, "1.0", WORKS)

    def version() -> Any:
        return ask(server.ports["inference"], "POST", "/predictions/toy", image)

    def registered() -> dict[str, int]:
        found = ask(server.ports["management"], "GET", "/models/toy/all")[1]
        return {item["modelVersion"]: len(item["workers"]) for item in found}

    def stored() -> dict[str, bytes]:
        return {item.name: item.read_bytes() for item in server.store.iterdir()}

    with TorchServeProcess(tmp_path / "store", {"toy": "toy.mar"}, ServerOptions(model_api=True)) as server:
        assert version() == (200, {"version": "1.0"})
        before = stored()
        with pytest.raises(ServingError, match=r"expected toy 2\.0 to answer, got 503"):
            server.roll_out("toy", guarded_archive(tmp_path / "raises" / "toy.mar", profile, "2.0", RAISES))
        assert (version(), registered(), stored()) == ((200, {"version": "1.0"}), {"1.0": 1}, before)
        second = guarded_archive(tmp_path / "next" / "toy.mar", profile, "2.0", WORKS)
        done = server.roll_out("toy", second, keep_old=True, drain_timeout=5)
        assert (done.replaced, done.tried, version(), registered()) == (
            "1.0",
            4,
            (200, {"version": "2.0"}),
            {"1.0": 0, "2.0": 1},
        )
        other = guarded_archive(tmp_path / "other" / "toy.mar", profile, "1.0", RAISES)
        with pytest.raises(ServingError, match=r"registered already, from an archive of other content: .*curl -X DELETE"):
            server.roll_out("toy", other, drain_timeout=5)
        done = server.roll_out("toy", first, drain_timeout=5)
        assert (done.replaced, version(), registered()) == ("2.0", (200, {"version": "1.0"}), {"1.0": 1})
