"""`guard calibrate`: what it writes works, and what it refuses is one line."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from cli.demonstration.digits import Digits
from guard import Guard
from tests.cli.conftest import Command, Files


def test_profile_moves_between_folders_and_guards(tmp_path: Path, guard: Command, files: Files, digits: Digits) -> None:
    run = guard("calibrate", files.model, "--data", files.clean, "--out", tmp_path / "profile", "--json")
    assert run.code == 0
    summary = run.lines[0]
    assert summary["images"] == 497
    assert summary["frr_low"] < 0.01 < summary["frr_high"]
    assert summary["clean_accuracy"] > 0.9
    assert "superimposing clean images" in run.err  # progress
    shutil.move(tmp_path / "profile", tmp_path / "moved")
    verdicts = Guard.load(tmp_path / "moved")(digits.triggered.images(slice(0, 50)))
    assert not any(verdict.accepted for verdict in verdicts)


def test_the_report_shows_the_distribution(tmp_path: Path, guard: Command, files: Files) -> None:
    run = guard("calibrate", files.model, "--data", files.clean, "--out", tmp_path / "p")
    assert run.code == 0
    assert "next: guard check" in run.out
    page = (tmp_path / "p" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "bits" in page


def test_a_folder_of_images_does_as_well(tmp_path: Path, guard: Command, files: Files, digits: Digits) -> None:
    labels = digits.clean.known_labels.tolist()
    for row, label in enumerate(labels):
        folder = tmp_path / "clean" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits.clean.pixels[row, 0].numpy()).save(folder / f"{row:04d}.png")
    (tmp_path / "clean" / "3" / "notes.png").write_text("no picture")
    refused = guard("calibrate", files.model, "--data", tmp_path / "clean", "--out", tmp_path / "p")
    assert "1 of 598 files can't be read, first 3/notes.png" in refused.problem
    assert not (tmp_path / "p").exists()
    run = guard("calibrate", files.model, "--data", tmp_path / "clean", "--out", tmp_path / "p", "--skip-unreadable", "--json")
    assert run.lines[0]["skipped"][0]["file"] == "3/notes.png"
    assert json.loads((tmp_path / "p" / "guard.json").read_text())["input"]["class_names"][3] == "3"


def test_factory_with_weights(tmp_path: Path, guard: Command, files: Files, backdoored: nn.Module, digits: Digits) -> None:
    save_file(backdoored.state_dict(), tmp_path / "w.safetensors")
    name = "cli.demonstration.digits:digit_net"
    out = tmp_path / "p"
    assert guard("calibrate", name, "--weights", tmp_path / "w.safetensors", "--data", files.clean, "--out", out).code == 0
    (tmp_path / "w.safetensors").unlink()
    verdicts = Guard.load(out)(digits.triggered.images(slice(0, 20)))
    assert not any(verdict.accepted for verdict in verdicts)


def test_normalisation_is_recorded(tmp_path: Path, guard: Command, files: Files) -> None:
    run = guard("calibrate", files.model, "--data", files.clean, "--out", tmp_path / "p", "--mean", "0.1", "--std", "0.9")
    assert run.code == 0
    stored = json.loads((tmp_path / "p" / "guard.json").read_text())["input"]
    assert (stored["mean"], stored["std"]) == ([0.1], [0.9])


def test_wrong_normalisation_warns(tmp_path: Path, guard: Command, files: Files) -> None:
    run = guard("calibrate", files.model, "--data", files.clean, "--out", tmp_path / "p", "--mean", "-40", "--std", "9")
    assert run.code == 2 or "near chance" in run.err


PROBLEMS: list[tuple[list[str], str]] = [
    (["--frr", "0.0001"], "needs at least 9999 clean images"),
    (["--frr", "2"], "between 0 and 1"),
    (["--overlays", "597"], "more clean images than the 597 overlays"),
    (["--overlays", "1"], "at least 2 overlays"),
    (["--mean", "a,b"], "expected --mean as numbers"),
    (["--mean", "0.5,0.5,0.5"], "expected 1 values of mean"),
    (["--preprocess", "gym"], "--max-accuracy-drop"),
    (["--confidence", "1.5"], "expected a confidence between 0 and 1"),
    (["--method", "normal", "--confidence", "0.9"], "conformal method only"),
    (["--blend", "mix", "--alpha", "2"], "alpha in (0, 1] for mix"),
    (["--shape", "1,9,9"], "expected images of shape"),
    (["--shape", "9"], "expected --shape as C,H,W"),
    (["--output", "labels"], "expected"),
    (["--blend", "lighten"], "lighten"),
]


@pytest.mark.parametrize(("options", "message"), PROBLEMS)
def test_bad_options_are_one_line(tmp_path: Path, guard: Command, files: Files, options: list[str], message: str) -> None:
    run = guard("calibrate", files.model, "--data", files.clean, "--out", tmp_path / "p", *options)
    assert message in run.problem
    assert not (tmp_path / "p").exists()


def test_bad_models_are_one_line(tmp_path: Path, guard: Command, files: Files) -> None:
    torch.save({"a": torch.zeros(3)}, tmp_path / "checkpoint.pt")
    (tmp_path / "empty.onnx").write_bytes(b"")
    (tmp_path / "model.h5").write_bytes(b"x")
    cases = {
        tmp_path / "none.onnx": "no such file",
        tmp_path / "checkpoint.pt": "nothing is unpickled",
        tmp_path / "empty.onnx": "does not load",
        tmp_path / "model.h5": "nothing else is loaded",
        "no.such.package:thing": "importable",
    }
    for model, message in cases.items():
        assert message in guard("calibrate", model, "--data", files.clean, "--out", tmp_path / "p").problem


def test_other_peoples_folders_are_not_overwritten(tmp_path: Path, guard: Command, files: Files) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("hello")
    run = guard("calibrate", files.model, "--data", files.clean, "--out", tmp_path / "letters")
    assert "holds something else" in run.problem
    assert (tmp_path / "letters" / "dear.txt").read_text() == "hello"


def test_calibrating_again_replaces_the_profile(tmp_path: Path, guard: Command, files: Files) -> None:
    for frr in ("0.01", "0.02"):
        assert guard("calibrate", files.model, "--data", files.clean, "--out", tmp_path / "p", "--frr", frr).code == 0
    assert json.loads((tmp_path / "p" / "guard.json").read_text())["detectors"][0]["threshold"]["frr"] == 0.02
    assert [item.name for item in tmp_path.iterdir()] == ["p"]


class SmallConvNet(nn.Sequential):
    """An MNIST-sized network with random weights; only its cost matters here."""

    def __init__(self) -> None:
        generator = torch.random.get_rng_state()
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
            nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 49, 10),
        )  # fmt: skip
        torch.random.set_rng_state(generator)


def test_a_thousand_images_take_less_than_thirty_seconds(tmp_path: Path, guard: Command) -> None:
    rng = np.random.default_rng(0)
    for row in range(1000):
        folder = tmp_path / "clean" / str(row % 10)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (28, 28), dtype=np.uint8)).save(folder / f"{row}.png")
    started = time.monotonic()
    run = guard("calibrate", "tests.cli.test_calibrate:SmallConvNet", "--data", tmp_path / "clean", "--out", tmp_path / "p")
    assert run.code == 0
    assert time.monotonic() - started < 30
    assert "1000/1000" in run.err
    assert "900/900" in run.err
