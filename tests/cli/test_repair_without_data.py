"""`guard repair --method dhbe`: without any image, or with images that measure it."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest

from calibration.repair.dhbe_settings import Dhbe
from calibration.repair.drawn import Drawn
from tests.calibration.repair.test_dhbe import TINY
from tests.calibration.repair.test_drawn import TINY as DRAWN
from tests.cli.conftest import Command
from tests.toy import toy_images

MODEL = "tests.toy:LearningToy"


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A game of a moment, of images smaller than any that the real one takes."""

    def suited(*_: object) -> Dhbe:
        return msgspec.structs.replace(TINY, batch=64)

    monkeypatch.setattr(Dhbe, "suited", suited)
    monkeypatch.setattr(Drawn, "suited", lambda *_: DRAWN)


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    images, labels = toy_images(60)
    np.savez(tmp_path / "clean.npz", x=(images[:, 0] * 255).round().numpy().astype(np.uint8), y=labels.numpy())
    return tmp_path / "clean.npz"


@pytest.mark.usefixtures("tiny")
def test_nothing_but_the_model(tmp_path: Path, guard: Command) -> None:
    out = tmp_path / "repaired"
    run = guard("repair", MODEL, "--method", "dhbe", "--shape", "1,8,8", "--epochs", 2, "--out", out)
    assert run.code == 0, run.err
    assert "looking for patches 4/4" in run.err
    assert "erasing backdoors 0/2" in run.err
    assert "Small patches move the original most to label" in run.err
    assert "No accuracy was measured" in run.err
    assert "The model is believed to normalise images for itself" in run.err
    assert "agreement on generated samples" in run.out
    assert "clean accuracy" not in run.out
    assert f"next: guard calibrate {out} --tripwire {MODEL} --data CLEAN --out {out}-profile" in run.out
    assert sorted(path.name for path in out.iterdir()) == ["learnt.json", "model.safetensors", "repair.json", "report.html"]
    assert [path.name for path in tmp_path.iterdir()] == ["repaired"]  # no checkpoint is left
    assert json.loads((out / "repair.json").read_text())["clean_accuracy_after"] is None
    run = guard("repair", out, "--method", "dhbe", "--out", tmp_path / "again")
    assert "expected a model that was not repaired yet" in run.problem


@pytest.mark.usefixtures("tiny")
def test_as_published(tmp_path: Path, guard: Command) -> None:
    out = tmp_path / "repaired"
    run = guard("repair", MODEL, "--method", "dhbe", "--recipe", "paper", "--shape", "1,8,8", "--epochs", 2, "--out", out)
    assert run.code == 0, run.err
    assert "looking for patches" not in run.err
    assert "The copy learnt for 2 epochs, at first at a rate of 0.001" in run.err
    assert json.loads((out / "repair.json").read_text())["settings"]["recipe"] == "paper"


@pytest.mark.usefixtures("tiny")
def test_images_measure_it_and_none_is_learnt_from(tmp_path: Path, clean: Path, guard: Command) -> None:
    out = tmp_path / "repaired"
    run = guard(
        "repair", MODEL, "--method", "dhbe", "--data", clean, "--mean", 0.5, "--std", 0.5, "--max-accuracy-drop", 100,
        "--out", out, "--json",
    )  # fmt: skip
    assert run.code == 0, run.err
    record = run.lines[0]
    assert record["clean_accuracy_before"] == 1.0
    assert record["held_out_clean"] == record["clean_images"] == 60
    assert record["input"]["mean"] == [0.5]
    assert json.loads((out / "learnt.json").read_text()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "gym"), "expected --data CLEAN with --method gym, which learns from clean images, got none: add it"),
        (("--method", "gdm"), "expected --data CLEAN with --method gdm"),
        (("--method", "dhbe"), "expected --shape C,H,W without --data, as the model does not say what images it takes"),
        (("--method", "dhbe", "--shape", "1,8,8"), "expected images of 28 to 64 pixels a side for dhbe, got 8x8: use another"),
        (("--method", "dhbe", "--shape", "3,8,8"), "on which it does not run (1 tried"),
        (("--method", "dhbe", "--scan", "there"), "expected --data CLEAN with --scan"),
        (("--method", "dhbe", "--edge", "http://127.0.0.1:1"), "expected --method gym or codefend with --edge, got dhbe"),
    ],
)
def test_what_is_missing_is_told_in_one_line(options: tuple[str, ...], message: str, tmp_path: Path, guard: Command) -> None:
    run = guard("repair", MODEL, "--out", tmp_path / "out", *options)
    assert message in run.problem
    assert list(tmp_path.iterdir()) == []
