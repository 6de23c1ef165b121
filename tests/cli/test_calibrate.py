"""`guard calibrate`: what it takes, and that what it writes works."""

from __future__ import annotations

import json
import os
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
from tests.toy import toy_images

FEW = ("--overlays", 20)
"""Where their number is no matter."""


def test_profile_moves_between_folders_and_guards(tmp_path: Path, guard: Command, files: Files, digits: Digits) -> None:
    run = guard("calibrate", files.model, "--data", files.clean, "--out", tmp_path / "profile", "--json")
    assert run.code == 0
    summary = run.lines[0]
    assert summary["images"] == 497
    assert summary["frr_low"] < 0.01 < summary["frr_high"]
    assert (summary["frr"], summary["overlays"]) == (0.01, 100)
    (only,) = summary["detectors"]
    assert (only["name"], only["blend"], only["alpha"], only["overlays"], only["frr"]) == ("strip", "logit", 3.5, 100, 0.01)
    same = ("entropy_threshold", "frr_low", "frr_high")
    assert [summary[key] for key in same] == [only[key] for key in same]
    assert 2 < summary["mean_passes"] < 100
    assert summary["clean_accuracy"] > 0.9
    assert "superimposing clean images" in run.err  # progress
    shutil.move(tmp_path / "profile", tmp_path / "moved")
    verdicts = Guard.load(tmp_path / "moved")(digits.triggered.images(slice(0, 50)))
    assert not any(verdict.accepted for verdict in verdicts)


def test_the_report_shows_the_distribution(tmp_path: Path, guard: Command, files: Files) -> None:
    run = guard("calibrate", files.model, "--data", files.clean, "--out", tmp_path / "p", *FEW)
    assert run.code == 0
    assert "next: guard check" in run.out
    assert "guard red-team estimates it" in run.err
    page = (tmp_path / "p" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    for said in ("bits", "superimposed by logit", "logit, alpha 3.5", "1.00%"):
        assert said in page
    assert "strip-" not in page


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
    given = ("calibrate", files.model, "--data", tmp_path / "clean", "--out", tmp_path / "p", *FEW)
    run = guard(*given, "--skip-unreadable", "--json")
    assert run.lines[0]["skipped"][0]["file"] == "3/notes.png"
    assert json.loads((tmp_path / "p" / "guard.json").read_text())["input"]["class_names"][3] == "3"


def test_factory_with_weights(tmp_path: Path, guard: Command, files: Files, backdoored: nn.Module, digits: Digits) -> None:
    save_file(backdoored.state_dict(), tmp_path / "w.safetensors")
    name = "cli.demonstration.digits:digit_net"
    out = tmp_path / "p"
    given = ("calibrate", name, "--weights", tmp_path / "w.safetensors", "--data", files.clean, "--out", out)
    assert guard(*given, *FEW).code == 0
    (tmp_path / "w.safetensors").unlink()
    verdicts = Guard.load(out)(digits.triggered.images(slice(0, 20)))
    assert not any(verdict.accepted for verdict in verdicts)


def test_normalisation_is_recorded(tmp_path: Path, guard: Command, files: Files) -> None:
    run = guard("calibrate", files.model, "--data", files.clean, "--out", tmp_path / "p", *FEW, "--mean", "0.1", "--std", "0.9")
    assert run.code == 0
    stored = json.loads((tmp_path / "p" / "guard.json").read_text())["input"]
    assert (stored["mean"], stored["std"]) == ([0.1], [0.9])


def test_wrong_normalisation_warns(tmp_path: Path, guard: Command, files: Files) -> None:
    run = guard("calibrate", files.model, "--data", files.clean, "--out", tmp_path / "p", *FEW, "--mean", "-40", "--std", "9")
    assert run.code == 2 or "near chance" in run.err


def test_labels_that_are_often_wrong_are_worth_a_word(tmp_path: Path, guard: Command, files: Files) -> None:
    """Half of the labels are of another order: far from chance, and no model that anybody deploys."""
    clean = np.load(files.clean)
    labels = np.where(clean["y"] < 5, 4 - clean["y"], clean["y"])
    np.savez(tmp_path / "clean.npz", x=clean["x"], y=labels)
    said = "note: if the model is known to be right on more than 5"
    for data, told in ((tmp_path / "clean.npz", True), (files.clean, False)):
        run = guard("calibrate", files.model, "--data", data, "--out", tmp_path / "p", *FEW)
        assert (run.code, said in run.err) == (0, told)


def test_equal_images_count_once(tmp_path: Path, guard: Command, digits: Digits, files: Files) -> None:
    """Or a rate would be set by fewer images than it says."""
    clean = digits.clean.select(torch.arange(300))
    twice, once = (tmp_path / name for name in ("twice.npz", "once.npz"))
    np.savez(once, x=clean.pixels.numpy(), y=clean.known_labels.numpy())
    np.savez(twice, x=clean.pixels.repeat(2, 1, 1, 1).numpy(), y=clean.known_labels.repeat(2).numpy())
    options = ("--overlays", 20, "--json")
    first, second = (
        guard("calibrate", files.model, "--data", data, "--out", tmp_path / data.stem, *options) for data in (once, twice)
    )
    assert first.lines[0]["images"] == second.lines[0]["images"] == 280
    assert "300 of 600 clean images equal others" in second.err
    few = guard("calibrate", files.model, "--data", twice, "--out", tmp_path / "p", "--frr", 0.003, "--overlays", 20)
    assert "needs at least 333 clean images besides the overlays, got 280" in few.problem


def test_calibrating_again_replaces_the_profile(tmp_path: Path, guard: Command, files: Files) -> None:
    for frr in ("0.01", "0.02"):
        assert guard("calibrate", files.model, "--data", files.clean, "--out", tmp_path / "p", *FEW, "--frr", frr).code == 0
    assert json.loads((tmp_path / "p" / "guard.json").read_text())["detectors"][0]["threshold"]["frr"] == 0.02
    assert [item.name for item in tmp_path.iterdir()] == ["p"]


NO_WEIGHTS = "tests.toy:ToyNet"


def toy_folder(path: Path, side: int = 8) -> Path:
    """The toy's images, the first one `side` wide."""
    images, labels = toy_images(60)
    for row, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        (path / str(label)).mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray((image[0] * 255).round().to(torch.uint8).numpy())
        (picture.resize((side, 8)) if row == 0 else picture).save(path / str(label) / f"{row}.png")
    return path


QUICK = ("--overlays", 8, "--frr", 0.05)


def test_resized_images_are_told(tmp_path: Path, guard: Command) -> None:
    data, out = toy_folder(tmp_path / "clean", side=11), tmp_path / "p"
    remark = "1 of 60 images were of another size than 8x8 and were resized: serving and guard check refuse such images unless"
    shaped = ("calibrate", NO_WEIGHTS, "--data", data, "--out", out, "--shape", "1,8,8", *QUICK, "--json")
    run = guard(*shaped)
    assert remark in run.err
    assert len(run.lines) == 1
    assert remark in guard("evaluate", out, "--data", data, "--json").err
    assert "another size" not in guard(*shaped, "--resize").err
    assert "another size" not in guard("evaluate", out, "--data", data, "--json").err


def test_names_that_are_not_utf_8(tmp_path: Path, guard: Command) -> None:
    data, odd = toy_folder(tmp_path / "clean"), os.fsdecode(b"caf\xe9")
    (data / "0" / f"{odd}.png").write_bytes(b"nothing")
    given = ("calibrate", NO_WEIGHTS, "--data", data, *QUICK, "--skip-unreadable", "--out")
    run = guard(*given, tmp_path / "p", "--json")
    assert run.lines[0]["skipped"][0]["file"] == "0/caf\\xe9.png"
    assert "expected a folder whose name is UTF-8" in guard(*given, tmp_path / odd, "--json").problem
    (data / odd).mkdir()
    assert "expected class folders with names in UTF-8" in guard(*given, tmp_path / "p").problem
    assert sorted(item.name for item in tmp_path.iterdir()) == ["clean", "p"]


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


@pytest.mark.slow
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
