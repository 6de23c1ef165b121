"""A thin device and an edge server, as two processes with two environments."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import msgspec
import numpy as np
import psutil
import pytest
import torch
from torch import nn

from calibration.repair.record import read_record
from cli.demonstration.digits import ATTACK, Digits
from guard import Guard
from guard.predictors.screening import file_sha256
from handlers.edge_commands import MARK
from handlers.edge_protocol import JobStatus
from tests.cli.conftest import Command, Files, files, guard
from tests.end_to_end.device import make_device
from tests.end_to_end.test_serve import free_port, listen_to_interrupts

__all__ = ["files", "guard"]  # fixtures

TOKEN = "a-token-for-the-tests-0123456789"
TRAINING = ("scipy", "sklearn", "matplotlib", "lightning_fabric", "starlette", "uvicorn", "psutil", "persistqueue", "onnx")
SECONDS = 240.0


class Edge:
    """`guard edge serve`, which can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port, self.log = folder / "edge", free_port(), folder / "edge.log"
        self.url = f"http://127.0.0.1:{self.port}"
        self.token_file = folder / "token"
        self.token_file.write_text(TOKEN + "\n")
        self.process: subprocess.Popen[bytes] | None = None
        self.http = httpx.Client(  # one: to make one costs as much as many questions
            base_url=self.url,
            headers={"authorization": f"Bearer {TOKEN}"},
            timeout=30,
            limits=httpx.Limits(max_keepalive_connections=0),  # the server is killed at times
        )

    def start(self) -> None:
        command = [sys.executable, "-P", "-m", "cli.main", "edge", "serve", "--folder", str(self.folder)]
        command += ["--port", str(self.port), "--token-file", str(self.token_file)]
        with self.log.open("ab") as stream:
            self.process = subprocess.Popen(command, stdout=stream, stderr=stream, preexec_fn=listen_to_interrupts)
        until(self.answers, self.said)

    def answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.said()
        try:
            return self.http.get("/ping").is_success
        except httpx.TransportError:
            return False

    def end(self, sign: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(sign)
        self.process.wait(30)

    def said(self) -> str:
        return self.log.read_text()

    def job(self) -> JobStatus | None:
        """The only one."""
        ids = [path.parent.name for path in self.folder.glob("jobs/*/job.json")]
        answer = self.http.get(f"/v1/jobs/{ids[0]}") if ids else None
        return None if answer is None or not answer.is_success else msgspec.json.decode(answer.content, type=JobStatus)

    def commands(self) -> list[psutil.Process]:
        """What runs for its jobs."""
        return [process for process in psutil.process_iter() if _works_in(process, self.folder)]

    def clean_up(self) -> None:
        self.http.close()
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for process in self.commands():
            process.kill()


def _works_in(process: psutil.Process, folder: Path) -> bool:
    try:
        return str(process.environ().get(MARK, "")).startswith(str(folder))
    except psutil.Error:
        return False


def until(reached: Callable[[], bool], said: Callable[[], str]) -> None:
    deadline = time.monotonic() + SECONDS
    while not reached():
        assert time.monotonic() < deadline, said()
        time.sleep(0.1)


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A thin device's Python."""
    return make_device(tmp_path_factory.mktemp("device") / "environment")


@pytest.fixture
def edge(tmp_path: Path) -> Iterator[Edge]:
    server = Edge(tmp_path)
    try:
        server.start()
        yield server
    finally:
        server.clean_up()


def on_device(device: Path, *arguments: object) -> subprocess.Popen[str]:
    """`guard ARGUMENTS` there, with nothing of this environment."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "GUARD", "VIRTUAL"))}
    return subprocess.Popen(
        [str(device), "-I", "-m", "cli.main", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=kept,
        preexec_fn=listen_to_interrupts,
    )


def outcome(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
        process.wait()
    return process.returncode, out, err


def quarantined(digits: Digits, path: Path) -> Path:
    """Half of the triggered images, as a guard would have rejected them."""
    np.savez(path, x=digits.triggered.pixels[::2, 0].numpy())
    return path


def test_the_device_has_nothing_that_trains(device: Path) -> None:
    code = (
        "import importlib.util, sys\n"
        "import calibration.sources, cli.main, guard, httpx, torch\n"
        f"print([name for name in {TRAINING} if importlib.util.find_spec(name)])"
    )
    done = subprocess.run([str(device), "-I", "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


@pytest.mark.slow
def test_a_job_survives_a_killed_server(
    tmp_path: Path, digits: Digits, backdoored: nn.Module, files: Files, device: Path, edge: Edge
) -> None:
    out = tmp_path / "repaired"
    process = on_device(
        device, "repair", files.model, "--method", "codefend", "--data", files.clean, "--out", out, "--gan-epochs", 6,
        "--epochs", 6, "--quarantine", quarantined(digits, tmp_path / "q.npz"), "--edge", edge.url,
        "--edge-token-file", edge.token_file, "--json",
    )  # fmt: skip
    try:
        until(lambda: _learning(edge.job()) >= 2, edge.said)
        reached = _learning(edge.job())
        (orphan,) = edge.commands()
        edge.end(signal.SIGKILL)
        assert orphan.is_running()
        assert process.poll() is None
        edge.start()
        until(lambda: _learning(edge.job()) >= 1, edge.said)
        assert _learning(edge.job()) >= reached  # from its checkpoint, not from the start
        assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE
    finally:
        code, answer, err = outcome(process)
    assert code == 0, err + edge.said()
    assert "ended 1 processes of an earlier run" in edge.said()
    assert TOKEN not in edge.said() + err + answer

    record = read_record(out)
    assert record.original_sha256 == file_sha256(files.model)
    assert json.loads(answer)["profile"] == str(out / "profile")
    guard = Guard.load(out / "profile")
    triggered = digits.triggered.images(slice(1, None, 2))
    labels = digits.triggered.known_labels[1::2]
    with torch.inference_mode():
        assert float((backdoored(triggered).argmax(dim=1) == ATTACK.target_label).float().mean()) > 0.9
    assert float((guard.answer(triggered).argmax(dim=1) == labels).float().mean()) > 0.9
    rejected = [not verdict.accepted for verdict in guard(triggered)]
    assert sum(rejected) > 0.9 * len(rejected)  # the tripwire goes on detecting
    for name in ("model.pt2", "profile/tripwire.pt2"):
        with zipfile.ZipFile(out / name) as archive:
            assert not [entry for entry in archive.infolist() if "sample_inputs" in entry.filename and entry.file_size]
    assert list(edge.folder.glob("jobs/*")) == []  # nothing of the device's stays there
    edge.end(signal.SIGTERM)
    assert "Traceback" not in edge.said()


def test_an_interrupted_device_fetches_later_and_trusts_nothing_that_changed(
    tmp_path: Path, files: Files, device: Path, edge: Edge, guard: Command
) -> None:
    out, few = tmp_path / "repaired", tmp_path / "few.npz"
    with np.load(files.clean) as clean:
        np.savez(few, x=clean["x"][:150], y=clean["y"][:150])
    asked = ["repair", files.model, "--method", "gym", "--data", few, "--out", out, "--epochs", 1]
    asked += ["--max-accuracy-drop", 100, "--edge", edge.url, "--edge-token-file"]

    process = on_device(device, *asked, edge.token_file)
    try:
        until(lambda: (job := edge.job()) is not None and job.state == "running", edge.said)
        process.send_signal(signal.SIGINT)
    finally:
        code, _, err = outcome(process)
    assert code == 130, err
    (later,) = set(re.findall(r"--edge-job ([0-9a-f]{32})", err))
    until(lambda: (job := edge.job()) is not None and job.state == "done", edge.said)

    model = edge.folder / "jobs" / later / "result" / "model.pt2"
    good = model.read_bytes()
    model.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    fetch = [*asked, edge.token_file, "--edge-job", later]
    assert "model.pt2 differs from its checksum" in guard(*fetch).problem  # here, not on the device: that starts sooner
    assert not out.exists()
    model.write_bytes(good)
    fetched = guard(*fetch)
    assert fetched.code == int(bool(read_record(out).forgotten_labels)), fetched.err  # as it may after one epoch
    Guard.load(out / "profile")
    assert "Traceback" not in edge.said()


def _learning(job: JobStatus | None) -> int:
    """Epochs of the CycleGAN that a job has shown."""
    progress = None if job is None or job.state != "running" else job.progress
    return progress.done if progress is not None and progress.what.startswith("learning") else 0
