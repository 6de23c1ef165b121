"""`guard roll-out` as far as it goes without a server; with one: tests/end_to_end."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from urllib.parse import parse_qsl

import pytest

from handlers import torchserve_api
from tests.cli.conftest import Command

SERVING = {"modelVersion": "1.0", "workers": [], "minWorkers": 2, "maxWorkers": 2, "batchSize": 8, "maxBatchDelay": 2}


def archive(path: Path, config: str | None) -> Path:
    model = {"modelVersion": "2.0"} if config is None else {"modelVersion": "2.0", "configFile": "c.yaml"}
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("MAR-INF/MANIFEST.json", json.dumps({"model": model}))
        made.writestr("c.yaml", config or "")
    return path


@pytest.mark.parametrize(
    ("options", "config", "expected"),
    [
        ([], None, (2, 8, 2)),  # the version's that is replaced
        ([], "batchSize: 16\nmaxBatchDelay: 0", (2, 16, 0)),
        (["--workers", 3, "--batch-size", 4, "--batch-delay", 5], "batchSize: 16", (3, 4, 5)),
    ],
)
def test_options_go_before_the_archives_and_these_before_the_old_versions(
    options: list[object],
    config: str | None,
    expected: tuple[int, int, int],
    tmp_path: Path,
    guard: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registered: dict[str, str] = {}

    def request(_: str, __: object, method: str, path: str, ___: float, ____: bytes) -> tuple[int, bytes]:
        if method == "POST":
            registered.update(parse_qsl(path.partition("?")[2]))
            return 500, b"far enough"
        return (200, json.dumps([SERVING]).encode()) if path == "/models/m" else (404, b"{}")

    monkeypatch.setattr(torchserve_api, "_request", request)
    assert "far enough" in guard("roll-out", archive(tmp_path / "m.mar", config), *options).problem
    assert tuple(int(registered[key]) for key in ("initial_workers", "batch_size", "max_batch_delay")) == expected


@pytest.mark.parametrize("config", [None, "guard: {mode: monitor}"])
def test_it_says_what_the_new_version_guards_with(config: str | None, tmp_path: Path, guard: Command) -> None:
    """Before it does anything; here there is no server."""
    run = guard("roll-out", archive(tmp_path / "m.mar", config), "--management", "http://127.0.0.1:1")
    assert "is it running?" in run.problem
    options = "none" if config is None else '{"mode": "monitor"}'
    assert f"guard options of m 2.0: {options}; else its profile's policy, no quarantine, default limits" in run.err


@pytest.mark.parametrize("config", ["guard: [", "guard: !!python/object/apply:os.getcwd []"])
def test_a_model_config_that_can_not_be_read_is_one_line(config: str, tmp_path: Path, guard: Command) -> None:
    run = guard("roll-out", archive(tmp_path / "m.mar", config))
    assert "expected YAML in the model-config of" in run.problem
    assert len(run.err.strip().splitlines()) == 1


def test_a_roll_out_that_is_refused_leaves_the_archive_of_what_serves(
    tmp_path: Path, guard: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the same version, and another content."""
    store = tmp_path / "store"
    store.mkdir()
    (store / "m-2.0.mar").write_bytes(b"what serves")
    answer = json.dumps([{**SERVING, "modelVersion": "2.0"}]).encode()
    monkeypatch.setattr(torchserve_api, "_request", lambda *_: (200, answer))
    run = guard("roll-out", archive(tmp_path / "m.mar", None), "--store", store)
    assert "expected another version of m than 2.0, which is serving" in run.problem
    assert {item.name: item.read_bytes() for item in store.iterdir()} == {"m-2.0.mar": b"what serves"}
