"""`guard serve` as a user starts it: it answers, and a signal ends it with everything that it started."""

from __future__ import annotations

import http.client
import io
import json
import logging
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image
from torch import Tensor

from handlers.torchserve_rollout import archive_config
from tests.cli.conftest import Command, guard
from tests.toy import save_toy_profile, toy_images, toy_trigger

__all__ = ["guard"]  # a fixture

COMMAND = [sys.executable, "-c", "from cli.main import main; main()", "serve"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def png(image: Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray((image[0] * 255).round().byte().numpy()).save(buffer, format="PNG")
    return buffer.getvalue()


def post(port: int, body: bytes) -> tuple[int, dict[str, object]] | None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request("POST", "/predictions/toy", body)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    except (OSError, ValueError):
        return None
    finally:
        connection.close()


def listen_to_interrupts() -> None:
    """A shell that runs the tests in the background, or nohup, has them ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("engine", "number"),
    [
        ("asgi", signal.SIGTERM),
        pytest.param("asgi", signal.SIGHUP, marks=pytest.mark.slow),
        ("torchserve", signal.SIGHUP),  # whose processes would outlive a closed terminal
        pytest.param("torchserve", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_it_answers_and_a_signal_ends_it_all(tmp_path: Path, engine: str, number: signal.Signals) -> None:
    if engine == "torchserve" and shutil.which("java") is None:
        pytest.skip("TorchServe needs Java")
    port = free_port()
    options = ["--engine", engine, "--port", str(port), "--quarantine", str(tmp_path / "q"), "--latency-budget", "30"]
    log = tmp_path / "log"
    with log.open("wb") as stream:
        command = [*COMMAND, str(save_toy_profile(tmp_path / "toy")), *options]
        server = subprocess.Popen(command, stderr=stream, stdout=stream, preexec_fn=listen_to_interrupts)
    try:
        images, labels = toy_images(4, seed=2)
        deadline = time.monotonic() + 60
        while (answer := post(port, png(images[1]))) is None or answer[0] == 404:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        assert (answer[0], answer[1]["label_index"]) == (200, int(labels[1]))
        rejected = post(port, png(toy_trigger(images)[1]))
        assert rejected is not None
        assert (rejected[0], rejected[1]["reason"]) == (422, "backdoor-suspected")
        assert len(list((tmp_path / "q").glob("*.png"))) == 1
        family = psutil.Process(server.pid).children(recursive=True)
        server.send_signal(number)
        assert server.wait(timeout=30) == 0  # a supervisor takes anything else for a failure
        _, alive = psutil.wait_procs(family, timeout=10)
        assert not alive
        assert "Traceback" not in log.read_text()
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()
    lines = [json.loads(line[line.index("{") :]) for line in log.read_text().splitlines() if '"event": "request"' in line]
    assert [line["outcome"] for line in lines if line["outcome"] != "invalid"] == ["accepted", "rejected"]


def test_a_port_in_use_is_one_line(tmp_path: Path, guard: Command) -> None:
    profile = save_toy_profile(tmp_path / "toy")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for engine in ("asgi", "torchserve"):
            if engine == "torchserve" and shutil.which("java") is None:
                continue
            root = logging.getLogger()
            before = root.level, root.handlers.copy()
            done = guard("serve", profile, "--engine", engine, "--port", port)
            assert (root.level, root.handlers) == before  # which a server sets for its whole process
            assert port in done.problem
            assert len(done.err.strip().splitlines()) == 1


def test_torchserve_stays_on_loopback(tmp_path: Path, guard: Command) -> None:
    profile = save_toy_profile(tmp_path / "toy")
    assert "expected --host 127.0.0.1" in guard("serve", profile, "--engine", "torchserve", "--host", "0.0.0.0").problem


def test_the_commands_that_it_prints_make_a_version_that_guards_as_it_does(
    tmp_path: Path, guard: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its mode, its quarantine and its limits are on no other file than the server's own."""
    if shutil.which("java") is None:
        pytest.skip("TorchServe needs Java")
    profile, port, log = save_toy_profile(tmp_path / "toy"), free_port(), tmp_path / "log"
    options = ["--mode", "monitor", "--quarantine", str(tmp_path / "q"), "--max-bytes", "2000", "--expose-scores"]
    command = [*COMMAND, str(profile), "--engine", "torchserve", "--updates", "--port", str(port), *options]
    with log.open("wb") as stream:
        server = subprocess.Popen(command, stderr=stream, stdout=stream, preexec_fn=listen_to_interrupts)
    monkeypatch.chdir(tmp_path)
    try:
        deadline = time.monotonic() + 60
        while not (printed := re.findall(r"^(?:new versions|then): guard (.+)$", log.read_text(), re.MULTILINE))[1:]:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        for line in printed:
            words = shlex.split(line.replace("PROFILE", shlex.quote(str(profile))).replace("VERSION", "2.0"))
            done = guard(*words)
            assert done.code == 0, done.err
        assert "toy 2.0 serves now; 1.0 ended" in done.out
        answer = post(port, png(toy_trigger(toy_images(4, seed=2)[0])[1]))
        assert answer is not None
        assert (answer[0], answer[1]["verdict"]) == (200, "accepted")
        assert "scores" in answer[1]
        assert len(list((tmp_path / "q").glob("*.png"))) == 1
        too_large = post(port, bytes(3000))
        assert too_large is not None
        assert too_large[0] == 413
        management = re.findall(r"--management http://127\.0\.0\.1:(\d+)", printed[1])
        connection = http.client.HTTPConnection("127.0.0.1", int(management[0]), timeout=20)
        connection.request("GET", "/models/toy")
        (described,) = json.loads(connection.getresponse().read())
        connection.close()
        assert [described[key] for key in ("modelVersion", "batchSize", "maxBatchDelay")] == ["2.0", 8, 2]
        assert "on_error" not in str(archive_config(tmp_path / "model-store" / "toy.mar"))  # which its profile decides
    finally:
        server.send_signal(signal.SIGINT)
        code = server.wait(timeout=30)
    assert code == 0
