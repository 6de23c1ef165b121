from __future__ import annotations

import importlib.util
import json
import os
import socket
import threading
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from guard.errors import MissingExtraError, ServingError
from handlers.torchserve_server import TorchServeProcess
from handlers.torchserve_setup import ServerOptions, environment, find_java, pick_ports, stage_store


def archive(path: Path, config: str | None = None) -> Path:
    model = {"modelVersion": "2.0"} if config is None else {"modelVersion": "2.0", "configFile": "c.yaml"}
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("MAR-INF/MANIFEST.json", json.dumps({"model": model}))
        made.writestr("weights", bytes(1000))
        if config is not None:
            made.writestr("c.yaml", config)
    return path


def test_options_reach_an_archive_without_a_config(tmp_path: Path) -> None:
    archive(tmp_path / "m.mar")
    entry = stage_store(tmp_path, {"a": "m.mar"}, ServerOptions(batch_size=8), tmp_path / "store")["a"]["2.0"]
    assert (entry["batchSize"], entry["minWorkers"], entry["marName"]) == (8, 1, "a.mar")
    assert (tmp_path / "store" / "a.mar").read_bytes() == (tmp_path / "m.mar").read_bytes()


@pytest.mark.parametrize("updates", [False, True])
def test_where_versions_change_the_store_holds_its_own_copy(tmp_path: Path, updates: bool) -> None:
    """The file that it came from is the next version by the time that this one is rolled out again."""
    first = archive(tmp_path / "m.mar").read_bytes()
    stage_store(tmp_path, {"a": "m.mar"}, ServerOptions(model_api=updates), tmp_path / "store")
    (tmp_path / "m.mar").write_bytes(b"the next")
    assert (tmp_path / "store" / "a.mar").read_bytes() == (first if updates else b"the next")


def test_options_win_over_an_archives_own_config(tmp_path: Path) -> None:
    before = archive(tmp_path / "m.mar", "batchSize: 2\nguard:\n  mode: monitor\n").read_bytes()
    stage_store(tmp_path, {"a": "m.mar"}, ServerOptions(batch_size=8, workers=3), tmp_path / "store")
    with zipfile.ZipFile(tmp_path / "store" / "a.mar") as staged:
        config = json.loads(staged.read("c.yaml"))
        assert staged.read("weights") == bytes(1000)
        assert len({item.date_time for item in staged.infolist()}) == 1  # not when: the same archive makes the same copy
    assert config == {"batchSize": 8, "minWorkers": 3, "maxWorkers": 3, "guard": {"mode": "monitor"}}
    assert (tmp_path / "m.mar").read_bytes() == before


@pytest.mark.parametrize(
    "models", [{}, {"a": "missing.mar"}, {"a": "text.mar"}, {"../a": "m.mar"}, {"a b": "m.mar"}, {"a": "bad.mar"}]
)
def test_what_is_no_archive_is_told(tmp_path: Path, models: Mapping[str, str]) -> None:
    archive(tmp_path / "m.mar")
    archive(tmp_path / "bad.mar", "a: [")
    (tmp_path / "text.mar").write_text("text")
    with pytest.raises(ServingError, match="expected"):
        stage_store(tmp_path, models, ServerOptions(workers=1), tmp_path / "store")


def test_ports_are_free_and_different() -> None:
    ports = pick_ports(ServerOptions())
    assert len(set(ports.values())) == 5
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        with pytest.raises(ServingError, match=f"free metrics port, got {number}"):
            pick_ports(ServerOptions(metrics_port=number))


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ServingError, match="expected Java 11"):
        find_java({"JAVA_HOME": "/nowhere"})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"torchserve.*backdoor-guard\[torchserve\]"):
        find_java({})


def test_workers_run_this_code_in_private_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TS_CONFIG_FILE", "other")
    variables = environment(tmp_path, "/java/bin/java", {"PYTHONPATH": "mine", "EXTRA": "1"})
    root = str(Path(__file__).parent.parent.parent)
    assert variables["PYTHONPATH"].split(os.pathsep) == [root, "mine"]
    assert {variables["TMPDIR"], variables["TEMP"]} == {str(tmp_path / "tmp")}
    assert "TS_CONFIG_FILE" not in variables
    assert variables["EXTRA"] == "1"


def test_a_crash_is_told_with_its_traceback_however_late_that_comes(tmp_path: Path) -> None:
    server = TorchServeProcess(tmp_path, {"m": "m.mar"})
    server._lines.append("Backend worker process died.\n")
    late = threading.Timer(1.0, server._lines.append, ["MODEL_LOG - ModuleNotFoundError: No module named 'x'\n"])
    late.start()
    with pytest.raises(ServingError, match=r"crashed while it loaded its model: .*No module named 'x'"):
        server._check_alive()
    late.join()
