"""The whole loop on real digits: serve by TorchServe, quarantine, repair, calibrate, export, serve the repaired model."""

from __future__ import annotations

import http.client
import io
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from calibration.sources import open_model
from cli.demonstration.digits import ATTACK, Digits
from export import export_mar
from guard import Quarantine
from guard.errors import ServingError
from handlers.torchserve_server import ServerOptions, TorchServeProcess
from tests.cli.conftest import Command, Files, files, guard

__all__ = ["files", "guard"]  # fixtures

pytestmark = pytest.mark.skipif(
    shutil.which("java") is None and "JAVA_HOME" not in os.environ, reason="TorchServe needs Java, and there is none"
)


def png(image: Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image[0].numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def ask(server: TorchServeProcess, image: Tensor) -> tuple[int, int]:
    """Status and label index, -1 where there is none."""
    connection = http.client.HTTPConnection("127.0.0.1", server.ports["inference"], timeout=60)
    try:
        connection.request("POST", "/predictions/digits", png(image), {"content-type": "image/png"})
        response = connection.getresponse()
        answer = json.loads(response.read())
        return response.status, int(answer.get("label_index", -1))
    finally:
        connection.close()


@contextmanager
def asking_all_the_time(server: TorchServeProcess, images: Tensor) -> Iterator[list[int]]:
    """Statuses of requests that two clients send one after the other, for as long as the block takes."""
    statuses: list[int] = []
    stop = threading.Event()

    def client(first: int) -> None:
        row = first
        while not stop.is_set():
            statuses.append(ask(server, images[row % len(images)])[0])
            row += 2
            time.sleep(0.02)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield statuses
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)


def test_the_loop(tmp_path: Path, digits: Digits, backdoored: nn.Module, files: Files, guard: Command) -> None:
    triggered, true_labels = digits.triggered, digits.triggered.known_labels
    with torch.inference_mode():
        fooled = backdoored(triggered.images(slice(None))).argmax(dim=1) == ATTACK.target_label
        clean_accuracy = float(
            (backdoored(digits.test.images(slice(None))).argmax(dim=1) == digits.test.known_labels).double().mean()
        )
    assert float(fooled.double().mean()) >= 0.95  # the attack succeeds

    few = np.load(files.clean)
    np.savez(tmp_path / "few.npz", x=few["x"][:350], y=few["y"][:350])
    assert guard("calibrate", files.model, "--data", files.clean, "--out", tmp_path / "profile").code == 0
    store, kept = tmp_path / "store", tmp_path / "kept"
    export_mar(tmp_path / "profile", store, "digits", "1.0", {"guard": {"quarantine": str(kept)}})
    with TorchServeProcess(store, {"digits": "digits.mar"}, ServerOptions(model_api=True, max_batch_delay_ms=1)) as server:
        statuses = [ask(server, image)[0] for image in triggered.pixels[:160]]
        assert statuses.count(422) >= 0.97 * len(statuses)  # the guard rejects
        assert len(Quarantine(kept).items()) == statuses.count(422)
        assert len(guard("quarantine", "list", kept, "--json").lines) == statuses.count(422)

        out, few_images = tmp_path / "repaired", tmp_path / "few.npz"
        run = guard(
            "repair", files.model, "--method", "codefend", "--data", few_images, "--quarantine", kept, "--out", out,
            "--epochs", 25, "--gan-epochs", 80,
        )  # fmt: skip
        assert run.code == 0, run.err
        assert "learning the trigger" in run.err
        assert "quarantined images that keep their old answer" in run.out
        assert f"next: guard calibrate {out} --tripwire {files.model} --data {few_images} --out {out}-profile" in run.out
        assert not list(tmp_path.glob(".*"))  # no checkpoint is left
        assert json.loads((out / "repair.json").read_text())["attack_success_seen_after"] <= 0.1
        run = guard("calibrate", tmp_path / "repaired", "--data", files.clean, "--out", tmp_path / "profile-2")
        assert run.code == 0, run.err
        run = guard("export", tmp_path / "profile-2", "--out", tmp_path / "next", "--name", "digits", "--version", "2.0")
        assert run.code == 0, run.err

        with asking_all_the_time(server, digits.test.pixels) as answered:
            done = server.roll_out("digits", tmp_path / "next" / "digits.mar")
            before = len(answered)
            while len(answered) < before + 20:
                time.sleep(0.05)
        assert (done.replaced, done.version) == ("1.0", "2.0")
        assert set(answered) <= {200, 422}, answered  # no request was lost
        assert answered.count(200) >= 0.9 * len(answered)

        labels = torch.tensor([ask(server, image)[1] for image in triggered.pixels[160:360]])
        corrected = float((labels == true_labels[160:360]).double().mean())
        assert corrected >= 0.9 * clean_accuracy  # the repaired model answers the triggered images with their true labels

        with pytest.raises(ServingError, match=r"expected another version of digits than 2\.0, which is serving"):
            server.roll_out("digits", tmp_path / "next" / "digits.mar")
        broken = tmp_path / "broken" / "digits.mar"
        export_mar(tmp_path / "profile-2", broken.parent, "digits", "3.0", {"guard": {"mode": "wrong"}})
        where = ("--management", server.management_url, "--inference", server.url, "--store", server.store)
        run = guard("roll-out", broken, *where)
        assert "expected digits 3.0 to answer, got 503" in run.problem
        assert ask(server, digits.test.pixels[0])[0] == 200  # the old version serves on
    assert open_model(str(tmp_path / "repaired"), None, tmp_path).repair is not None
