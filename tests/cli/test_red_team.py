"""`guard red-team`: the table says what was measured, the next command works, and what can't be done is one line."""

from __future__ import annotations

import shlex
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from calibration import RedTeam
from tests.cli.conftest import Command
from tests.guard.models import save_exported, save_onnx
from tests.toy import LearningToy, ToyNet, toy_images

TOY = "tests.toy:LearningToy"


def predict(images: Tensor) -> object:
    return ToyNet()(images)


def make_predict() -> object:
    return predict


def save_toy_images(path: Path, count: int) -> Path:
    images, labels = toy_images(count)
    np.savez(path, x=(images[:, 0] * 255).round().numpy().astype(np.uint8), y=labels.numpy())
    return path


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy_images(tmp_path_factory.mktemp("toy") / "clean.npz", 440)


def test_the_table_the_page_and_the_next_command(tmp_path: Path, guard: Command, clean: Path) -> None:
    page = tmp_path / "new" / "page.html"
    run = guard("red-team", TOY, "--data", clean, "--overlays", 16, "--report", page)
    assert run.code == 0
    for name in ("white square", "checkerboard", "white bar", "faint blend", "square, all to all"):
        assert name in run.out
    (chosen,) = [line for line in run.out.splitlines() if line.startswith("* recommended: ")]
    assert sum(line.startswith(chosen.removeprefix("* recommended: ").join(("* ", " "))) for line in run.out.splitlines()) == 1
    assert "no guarantee for other attacks" in run.out
    assert "planting triggers 5/5" in run.err
    assert f"report: {page}" in run.err
    assert page.read_text().count("data:image/png;base64,") == 1
    follow = {
        line.split(": ")[0].strip(): shlex.split(line.split(": guard ")[1])
        for line in run.out.splitlines()
        if ": guard" in line
    }
    assert set(follow) == {"next", "or"}
    for name, arguments in follow.items():
        folder = tmp_path / name
        arguments = [{"PROFILE": str(folder), "OTHER": str(clean)}.get(part, part) for part in arguments]
        assert guard(*arguments).code == 0
        assert (folder / "red_team.json").exists() == (name == "or")


def test_equal_images_count_once(tmp_path: Path, guard: Command) -> None:
    """Also where the next command is told: twice 220 are too few to be cut in two."""
    loaded = np.load(save_toy_images(tmp_path / "few.npz", 220))
    np.savez(tmp_path / "twice.npz", x=np.concatenate([loaded["x"]] * 2), y=np.concatenate([loaded["y"]] * 2))
    run = guard("red-team", TOY, "--data", tmp_path / "twice.npz", "--overlays", 8, "--frr", 0.1)
    assert run.code == 0, run.err
    assert "of 440 clean images equal others, and were left out" in run.err
    assert "--data CLEAN" in run.out


def test_json_is_what_was_found_and_the_file_stays(tmp_path: Path, guard: Command, clean: Path) -> None:
    model = save_exported(LearningToy(), tmp_path / "toy.pt2")
    before = model.read_bytes()
    run = guard("red-team", model, "--data", clean, "--overlays", 8, "--seed", 3, "--json")
    found = msgspec.json.decode(run.out, type=RedTeam)
    assert len(found.planted) == 5
    assert found.chosen in [item.setting for item in found.planted[0].figures]
    assert found.tuning_images + found.choosing_images == 432
    assert model.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["toy.pt2"]


def test_unreadable_files_are_listed_and_model_options_repeated(tmp_path: Path, guard: Command) -> None:
    images, labels = toy_images(220)
    for row, label in enumerate(labels.tolist()):
        folder = tmp_path / "clean" / "abcd"[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((images[row, 0] * 255).round().numpy().astype(np.uint8)).save(folder / f"{row}.png")
    (tmp_path / "clean" / "a" / "notes.png").write_text("no picture")
    options = ("--overlays", 8, "--mean", "0.0", "--std", "1.0", "--shape", "1,8,8")
    assert "1 of 221 files can't be read" in guard("red-team", TOY, "--data", tmp_path / "clean", *options).problem
    run = guard("red-team", TOY, "--data", tmp_path / "clean", *options, "--skip-unreadable")
    assert run.code == 0
    assert "skipped a/notes.png" in run.err
    assert "--mean 0.0 --std 1.0 --shape 1,8,8" in run.out
    assert "--data CLEAN --overlays 8 --red-team" in run.out  # 220 images are too few to be cut in two
    assert "CLEAN, at least 416 images," in run.out


def test_help_teaches(guard: Command) -> None:
    out = " ".join(guard("red-team", "--help").out.split())
    for text in ("false rejection rate", "no guarantee", "is not changed", "Example: guard red-team model.pt2"):
        assert text in out


def test_models_that_cannot_be_trained_are_one_line(tmp_path: Path, guard: Command, clean: Path) -> None:
    cases = {
        str(save_onnx(tmp_path / "toy.onnx")): "got a model of kind onnx",
        "tests.cli.test_red_team:make_predict": "got a model of kind callable",
        "tests.toy:ToyNet": "got one without weights",
    }
    for model, message in cases.items():
        problem = guard("red-team", model, "--data", clean, "--overlays", 8).problem
        assert "expected a model that can be fine-tuned" in problem
        assert message in problem
    few = save_toy_images(tmp_path / "few.npz", 150)  # more images would not help
    problem = guard("calibrate", tmp_path / "toy.onnx", "--data", few, "--out", tmp_path / "profile", "--red-team").problem
    assert "got a model of kind onnx" in problem


def test_the_report_never_overwrites_what_is_no_page(tmp_path: Path, guard: Command, clean: Path) -> None:
    model = save_exported(LearningToy(), tmp_path / "toy.pt2")
    before = model.read_bytes()
    (tmp_path / "folder.html").mkdir()
    for place, message in (
        (model, "a file whose name ends in .html"),
        (tmp_path / "folder.html", "a file whose name ends in .html"),
        (model / "page.html", "can't write --report"),
    ):
        run = guard("red-team", model, "--data", clean, "--overlays", 8, "--report", place)
        assert message in run.problem
        assert "planting" not in run.err  # before the long work
    assert model.read_bytes() == before


def test_blends_that_calibration_cannot_use_are_named_as_left_out(tmp_path: Path, guard: Command, clean: Path) -> None:
    options = ("--overlays", 8, "--frr", 0.05, "--confidence", 0.999, "--red-team")
    run = guard("calibrate", TOY, "--data", clean, "--out", tmp_path / "profile", *options)
    assert run.code == 0
    assert "Left out, for want of clean images: logit+demeaned" in run.out


PROBLEMS: list[tuple[list[str], str]] = [
    (["--overlays", "300"], "needs at least 500 clean images, got 440"),
    (["--overlays", "1"], "at least 4 overlays"),
    (["--frr", "0.001"], "needs at least 1199 clean images"),
    (["--frr", "1.5"], "between 0 and 1"),
    (["--frr", "1e-320"], "between 0 and 1"),
    (["--mean", "a"], "expected --mean as numbers"),
    (["--shape", "9"], "expected --shape as C,H,W"),
    (["--blend", "add"], "--blend"),
]


@pytest.mark.parametrize(("options", "message"), PROBLEMS)
def test_bad_options_are_one_line(guard: Command, clean: Path, options: list[str], message: str) -> None:
    assert message in guard("red-team", TOY, "--data", clean, *options).problem
