"""The demo by ASGI: its figures, what it leaves behind, and what follows, up to its models in TorchServe."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from cli.demonstration import run as demonstration
from cli.demonstration.digits import Digits
from cli.main import main
from export import export_mar
from guard import Guard, Quarantine
from guard.errors import RepairError, ServingError
from handlers.torchserve_server import ServerOptions, TorchServeProcess
from tests.cli.conftest import Command, Files, files, guard

__all__ = ["files", "guard"]  # fixtures


@dataclass(frozen=True)
class Demo:
    """Its folder, and what it said."""

    folder: Path
    said: str


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """Run once: it trains, serves and repairs."""
    place = tmp_path_factory.mktemp("demo")
    command = ["guard", "demo", "--engine", "asgi", "--out", str(place / "demo"), "--model-store", str(place / "store")]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code in (0, None)
    return Demo(place / "demo", said.getvalue())


def test_the_demo_reaches_its_figures(demo: Demo, guard: Command) -> None:
    result = json.loads((demo.folder / "result.json").read_text())
    assert result["attack_success_unguarded"] >= 0.95
    assert result["attack_success_guarded"] <= 0.02
    assert result["clean_rejected"] <= 0.03
    assert result["median_passes_clean"] < 50 < result["median_passes_triggered"] <= 100
    assert result["repair"]["old_answer_kept"] <= 0.05
    assert result["repair"]["clean_accuracy_after"] >= result["repair"]["clean_accuracy_before"] - 0.03
    assert "attack success" in demo.said
    assert "rejected images that keep their old answer" in demo.said
    for name in (
        "report.html",
        "entropy.png",
        "profile/guard.json",
        "clean.npz",
        "images/triggered-0.png",
        "repaired-profile/guard.json",
    ):
        assert (demo.folder / name).stat().st_size > 0
    checked = guard("check", demo.folder / "profile", demo.folder / "images", "--json")
    by_kind = {kind: [line["verdict"] for line in checked.lines if kind in line["image"]] for kind in ("clean", "triggered")}
    assert by_kind["triggered"] == ["rejected"] * 5
    assert by_kind["clean"].count("accepted") >= 4


def test_what_the_other_commands_make_of_its_repair(
    demo: Demo, tmp_path: Path, files: Files, digits: Digits, guard: Command
) -> None:
    model, repaired = demo.folder / "model.pt2", demo.folder / "repaired"
    assert sorted(path.name for path in repaired.iterdir()) == ["learnt.json", "model.pt2", "repair.json", "report.html"]
    assert b"The trigger that was learnt" in (repaired / "report.html").read_bytes()
    run = guard("calibrate", model, "--tripwire", repaired, "--data", files.clean, "--out", tmp_path / "swapped")
    assert "swap the two: MODEL is the repaired one" in run.problem  # it would detect nothing
    run = guard("calibrate", repaired, "--tripwire", model, "--data", files.clean, "--out", tmp_path / "profile", "--json")
    assert run.code == 0, run.err
    assert run.lines[0]["clean_accuracy"] >= 0.9
    assert run.lines[0]["tripwire"] is True
    record = json.loads((repaired / "repair.json").read_text())
    learnt = record["clean_images"] - record["held_out_clean"]
    assert 0.5 * learnt <= run.lines[0]["learnt_images"] <= learnt  # the others have become overlays of the tripwire
    answers = Guard.load(tmp_path / "profile").answer(digits.triggered.images(slice(None))).argmax(dim=1)
    assert float((answers == digits.triggered.known_labels).double().mean()) >= 0.8
    run = guard("evaluate", tmp_path / "profile", "--data", files.test, "--triggered", files.triggered, "--target", 7, "--json")
    assert run.lines[0]["far"]["value"] <= 0.05  # the original goes on detecting
    assert run.lines[0]["attack_success_rate"]["value"] <= 0.05  # and the repaired model answers
    sparing = ("--overlays", 20, "--frr", 0.2)
    run = guard("calibrate", repaired, "--red-team", "--data", files.clean, "--out", tmp_path / "p", *sparing, "--json")
    assert "--red-team takes 59 of 119 clean images" in run.problem  # that the repair has not seen


@pytest.mark.parametrize("name", ["images/holiday.png", "rejected/note.txt", "model.pt2"])
def test_what_is_not_the_demos_is_left_alone(name: str, tmp_path: Path, guard: Command) -> None:
    kept = tmp_path / "mine" / name
    kept.parent.mkdir(parents=True)
    kept.write_text("precious")
    run = guard("demo", "--engine", "asgi", "--out", tmp_path / "mine", "--model-store", tmp_path / "store")
    assert f"which holds something else ({Path(name).parts[0]}): pick another --out" in run.problem
    assert kept.read_text() == "precious"


def test_it_may_run_again(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    class StartedError(Exception):
        pass

    def started(_: int) -> None:
        raise StartedError

    monkeypatch.setattr(demonstration, "load_digits", started)
    with pytest.raises(StartedError):
        demonstration.run(demo.folder, demo.folder.parent / "store", "asgi", 0)


def test_a_repair_that_is_refused_spoils_nothing_else(
    digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: object) -> None:
        raise RepairError("the repair costs 4.0 points")

    monkeypatch.setattr(demonstration, "repair_digits", refused)
    assert demonstration._repair(digits, tmp_path, tmp_path, 0) is None
    assert "no repair: the repair costs 4.0 points" in capsys.readouterr().err


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


@pytest.mark.skipif(
    shutil.which("java") is None and "JAVA_HOME" not in os.environ, reason="TorchServe needs Java, and there is none"
)
@pytest.mark.slow
def test_its_models_by_torchserve_from_one_to_the_other(
    demo: Demo, tmp_path: Path, digits: Digits, files: Files, guard: Command
) -> None:
    """The other half of the loop: what TorchServe rejects is quarantined, and the repaired model takes over under load."""
    triggered, true_labels = digits.triggered, digits.triggered.known_labels
    store, kept = tmp_path / "store", tmp_path / "kept"
    export_mar(demo.folder / "profile", store, "digits", "1.0", {"guard": {"quarantine": str(kept)}})
    with TorchServeProcess(store, {"digits": "digits.mar"}, ServerOptions(model_api=True, max_batch_delay_ms=1)) as server:
        statuses = [ask(server, image)[0] for image in triggered.pixels[:160]]
        assert statuses.count(422) >= 0.97 * len(statuses)  # the guard rejects
        assert len(Quarantine(kept).items()) == statuses.count(422)
        assert len(guard("quarantine", "list", kept, "--json").lines) == statuses.count(422)

        sparing = ("--overlays", 20)  # few images has the repair not learnt from
        run = guard("calibrate", demo.folder / "repaired", "--data", files.clean, "--out", tmp_path / "profile-2", *sparing)
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
        assert corrected >= 0.85  # the repaired model answers the triggered images with their true labels

        with pytest.raises(ServingError, match=r"expected another version of digits than 2\.0, which is serving"):
            server.roll_out("digits", tmp_path / "next" / "digits.mar")
        broken = tmp_path / "broken" / "digits.mar"
        export_mar(tmp_path / "profile-2", broken.parent, "digits", "3.0", {"guard": {"mode": "wrong"}})
        where = ("--management", server.management_url, "--inference", server.url, "--store", server.store)
        run = guard("roll-out", broken, *where)
        assert "expected digits 3.0 to answer, got 503" in run.problem, run.err + server.log()[-4000:]
        assert ask(server, digits.test.pixels[0])[0] == 200  # the old version serves on
