"""`guard check`: one JSON object a line, with the agreed fields, in the order of the inputs."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from cli.demonstration.digits import Digits
from guard import Quarantine
from tests.cli.conftest import Command
from tests.toy import SIDE, save_toy_profile

FIELDS = {"image", "verdict", "label", "label_index", "probability", "entropy", "entropy_exact", "threshold", "passes"}


@pytest.fixture
def pictures(tmp_path: Path, digits: Digits) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for row in range(4):
        Image.fromarray(digits.test.pixels[row, 0].numpy()).save(folder / f"a-clean-{row}.png")
        Image.fromarray(digits.triggered.pixels[row, 0].numpy()).save(folder / f"b-triggered-{row}.png")
    return folder


def test_json_lines(guard: Command, profile: Path, pictures: Path, digits: Digits) -> None:
    run = guard("check", profile, pictures, "--json")
    assert run.code == 0
    assert all(set(line) >= FIELDS for line in run.lines)
    clean, triggered = run.lines[:4], run.lines[4:]
    assert [line["verdict"] for line in clean] == ["accepted"] * 4
    assert [line["label_index"] for line in clean] == digits.test.known_labels[:4].tolist()
    assert all(not line["entropy_exact"] and line["entropy"] > line["threshold"] for line in clean)
    assert all(0 < line["passes"] < 100 for line in clean)
    assert [line["verdict"] for line in triggered] == ["rejected"] * 4
    assert all(line["entropy_exact"] and line["entropy"] <= line["threshold"] for line in triggered)
    assert [(line["label"], line["passes"]) for line in triggered] == [("7", 100)] * 4
    assert all([item["detector"] for item in line["findings"]] == ["strip"] for line in run.lines)
    assert {line["detector"] for line in triggered} == {"strip"}


def test_a_pair_tells_what_each_found(guard: Command, pair_profile: Path, pictures: Path) -> None:
    triggered = [line for line in guard("check", pair_profile, pictures, "--json").lines[4:] if line["verdict"] == "rejected"]
    assert len(triggered) >= 3
    assert all(50 < line["passes"] == sum(item["passes"] for item in line["findings"]) for line in triggered)
    assert all([item["detector"] for item in line["findings"]] == ["strip-logit", "strip-demeaned"] for line in triggered)
    assert [[item["suspicious"] for item in line["findings"]] for line in triggered] == [[True, False]] * len(triggered)
    assert {line["detector"] for line in triggered} == {"strip-logit"}  # only one sees it
    assert guard("check", pair_profile, pictures).out.count("bits (suspicious), strip-demeaned at least") == len(triggered)


def test_npz_folder_and_file_agree(guard: Command, profile: Path, pictures: Path, tmp_path: Path) -> None:
    files = sorted(pictures.iterdir())
    stack = np.stack([np.asarray(Image.open(file)) for file in files])
    np.savez(tmp_path / "a.npz", x=stack)
    np.savez(tmp_path / "b.npz", x=(stack[..., None] / 255.0).astype(np.float32))
    runs = [
        guard("check", profile, *inputs, "--json") for inputs in ([pictures], files, [tmp_path / "a.npz"], [tmp_path / "b.npz"])
    ]
    verdicts = [[(line["verdict"], line["label_index"], line["passes"]) for line in run.lines] for run in runs]
    assert verdicts[0] == verdicts[1] == verdicts[2] == verdicts[3]
    assert runs[2].lines[3]["image"].endswith("a.npz[3]")


def test_bad_inputs_are_rejected_named_and_do_not_stop_the_rest(guard: Command, profile: Path, pictures: Path) -> None:
    png = (pictures / "a-clean-0.png").read_bytes()
    huge = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(huge, format="PNG")
    bad = {
        "c-text.png": b"hello",
        "d-cut.png": png[:-30],
        "e-empty.png": b"",
        "f-huge.png": huge.getvalue(),
    }
    for name, data in bad.items():
        (pictures / name).write_bytes(data)
    run = guard("check", profile, pictures, "--json")
    assert "4 of 12 inputs could not be read" in run.problem
    reasons = {Path(line["image"]).name: line["reason"] for line in run.lines if line["label"] is None}
    assert reasons == {
        "c-text.png": "not-an-image",
        "d-cut.png": "not-an-image",
        "e-empty.png": "not-an-image",
        "f-huge.png": "too-large",
    }
    assert all(line["verdict"] == "rejected" for line in run.lines if line["label"] is None)
    assert sum(line["verdict"] == "accepted" for line in run.lines) == 4


def test_missing_files_and_broken_npz(guard: Command, profile: Path, tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04")
    (tmp_path / "empty").mkdir()
    run = guard("check", profile, tmp_path / "none.png", tmp_path / "a.npz", tmp_path / "empty", "--json")
    assert "3 of 3" in run.problem
    assert [line["verdict"] for line in run.lines] == ["rejected"] * 3
    run = guard("check", profile, tmp_path / "none.png")
    assert run.out.startswith(f"{tmp_path / 'none.png'}: rejected as unreadable, expected an image file")


def test_rows_of_an_npz_fail_one_by_one(guard: Command, profile: Path, digits: Digits, tmp_path: Path) -> None:
    x = digits.test.images(slice(0, 3))[:, 0].numpy().copy()
    x[1, 0, 0] = np.nan
    np.savez(tmp_path / "a.npz", x=x)
    run = guard("check", profile, tmp_path / "a.npz", "--json")
    assert [line["message"] is None for line in run.lines] == [True, False, True]
    assert "NaN" in run.lines[1]["message"]


def test_quarantine_keeps_what_was_rejected(guard: Command, profile: Path, pictures: Path, tmp_path: Path) -> None:
    run = guard("check", profile, pictures, "--quarantine", tmp_path / "q", "--json")
    kept = Quarantine(tmp_path / "q").items()
    assert [line["quarantined"] for line in run.lines if line["verdict"] == "rejected"] == [item.id for item in kept]
    assert len(kept) == 4


def test_a_quarantine_that_cannot_be_written_does_not_stop_the_answers(
    guard: Command, profile: Path, pictures: Path, tmp_path: Path
) -> None:
    (tmp_path / "q").write_text("a file where the folder should be")
    run = guard("check", profile, pictures, "--quarantine", tmp_path / "q", "--json")
    assert "4 rejected images could not be written" in run.problem
    assert len(run.lines) == 8


def test_monitor_accepts_and_tells(guard: Command, profile: Path, pictures: Path) -> None:
    run = guard("check", profile, pictures, "--mode", "monitor", "--json")
    assert {line["verdict"] for line in run.lines} == {"accepted"}
    assert [line["reason"] for line in run.lines[4:]] == ["backdoor-suspected"] * 4


def test_table_for_people(guard: Command, profile: Path, pictures: Path) -> None:
    run = guard("check", profile, pictures)
    assert run.code == 0
    assert run.out.count("rejected") == 4
    assert run.out.count(", entropy at least") == 4
    assert "strip" not in run.out


def test_what_could_not_be_judged_is_told_and_no_success(
    guard: Command, profile: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("guard.predictors.predictor.to_probabilities", fails)
    monkeypatch.setattr("guard.loading._check_probe", lambda *_: None)
    monkeypatch.setattr("cli.check.settle_threads", lambda _: None)
    run = guard("check", profile, pictures)
    assert "8 of 8 inputs could not be judged" in run.problem
    assert run.out.count(": rejected, model-failed, 0 passes") == 8
    assert "nan" not in run.out


def test_no_profile(guard: Command, tmp_path: Path) -> None:
    assert "make one with guard calibrate" in guard("check", tmp_path, tmp_path).problem


def test_no_cuda(guard: Command, profile: Path, pictures: Path) -> None:
    assert "without CUDA" in guard("check", profile, pictures, "--device", "cuda").problem


@pytest.fixture(scope="module")
def toy_profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy_profile(tmp_path_factory.mktemp("toy") / "profile")


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((SIDE, SIDE), 90, np.uint8)).save(path)


def test_names_that_are_not_utf_8_are_escaped(guard: Command, toy_profile: Path, tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    picture(odd / os.fsdecode(b"\xe9.png"))
    (odd / "empty").mkdir()
    (odd / "bad.npz").write_bytes(b"PK")
    inputs = (odd, odd / "empty", odd / "none.png", odd / "bad.npz")
    run = guard("check", toy_profile, *inputs, "--json")
    assert "3 of 4 inputs could not be read" in run.problem
    names = ["\\xe9.png", "empty", "none.png", "bad.npz"]
    assert [line["image"] for line in run.lines[1:]] == [f"{tmp_path}/caf\\xe9/{name}" for name in names[1:]]
    assert run.lines[0]["image"] == f"{tmp_path}/caf\\xe9/\\xe9.png"
    assert guard("check", toy_profile, *inputs).out.count("/caf\\xe9/") >= 4


def test_an_npz_without_images_is_no_success(guard: Command, toy_profile: Path, tmp_path: Path) -> None:
    for x in (np.zeros((0, SIDE, SIDE), np.uint8), np.zeros((), np.uint8)):
        np.savez(tmp_path / "a.npz", x=x)
        run = guard("check", toy_profile, tmp_path / "a.npz")
        assert "1 of 1 inputs could not be read" in run.problem
        assert f"a.npz: rejected as unreadable, expected images in x, got none in a.npz, of shape {x.shape}" in run.out


def test_names_do_not_steer_the_terminal(guard: Command, toy_profile: Path, tmp_path: Path) -> None:
    picture(tmp_path / "a\n\x1b[2Jb.png")
    run = guard("check", toy_profile, tmp_path)
    assert len(run.out.splitlines()) == 1
    assert r"a\n\x1b[2Jb.png: " in run.out
    assert guard("check", toy_profile, tmp_path, "--json").lines[0]["image"].endswith("a\n\x1b[2Jb.png")


def test_folders_are_searched_as_for_calibration(guard: Command, toy_profile: Path, tmp_path: Path) -> None:
    for name in ("set/a.png", "set/.checkpoints/b.png", "elsewhere/c.png"):
        picture(tmp_path / name)
    (tmp_path / "set" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "link" / "up").symlink_to(tmp_path / "set")
    run = guard("check", toy_profile, tmp_path / "set", "--json")
    assert [Path(line["image"]).relative_to(tmp_path / "set") for line in run.lines] == [Path("a.png"), Path("link/c.png")]
