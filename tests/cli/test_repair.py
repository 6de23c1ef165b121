"""`guard repair`, and what the other commands make of its folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from calibration import Hints
from calibration.repair.gdm import Gdm
from calibration.repair.mesa import Mesa
from calibration.sources import ModelSource
from cli.demonstration.digits import ATTACK, Digits, digit_net, save_exported
from guard import Guard, Quarantine
from guard.errors import RepairError
from guard.predictors import Backend, load_backend
from guard.predictors.screening import file_sha256
from tests.cli.conftest import Command, Files
from tests.guard.models import save_onnx
from tests.scans import corner, write_scan
from tests.toy import SPEC


@pytest.fixture(scope="module")
def rejected(tmp_path_factory: pytest.TempPathFactory, digits: Digits) -> Path:
    """A quarantine of 120 triggered digits."""
    folder = tmp_path_factory.mktemp("rejected")
    quarantine = Quarantine(folder)
    for image in digits.triggered.images(slice(0, 120)):
        quarantine.add(image, detector="strip", score=-0.01, threshold=-0.1, label_index=7, label="7")
    return folder


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory, digits: Digits) -> Path:
    """120 clean digits."""
    path = tmp_path_factory.mktemp("few") / "few.npz"
    np.savez(path, x=digits.clean.pixels[:120, 0].numpy(), y=digits.clean.known_labels[:120].numpy())
    return path


def test_gdm_goes_by_a_scan(tmp_path: Path, files: Files, guard: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = write_scan(tmp_path / "scan", load_backend(str(files.model)), {7: corner()})
    short = Gdm(mesa=Mesa(levels=(0.9,), steps=60, batch=32))
    monkeypatch.setattr("calibration.repair.methods.Gdm", lambda: short)
    run = guard(
        "repair", files.model, "--method", "gdm", "--scan", scan, "--data", files.clean, "--epochs", 5,
        "--out", tmp_path / "repaired",
    )  # fmt: skip
    assert run.code == 0, run.err
    assert "modelled triggers work on the original" in run.out
    assert "Label 7: triggers were modelled in the 4x4 pixels from row 4, column 4" in " ".join(run.err.split())
    record = json.loads((tmp_path / "repaired" / "repair.json").read_text())
    assert record["generated_triggers_work"] >= 0.8
    assert record["recovered_success_before"] >= 0.95
    assert record["recovered_success_after"] <= 0.3


def test_images_of_some_classes_alone_are_refused_unless_that_is_allowed(
    tmp_path: Path, files: Files, digits: Digits, guard: Command
) -> None:
    some = torch.nonzero(digits.clean.known_labels < 2).squeeze(1)
    np.savez(tmp_path / "two.npz", x=digits.clean.pixels[some, 0].numpy(), y=digits.clean.known_labels[some].numpy())
    arguments = ("repair", files.model, "--method", "fine-tune", "--data", tmp_path / "two.npz", "--out", tmp_path / "r")
    run = guard(*arguments, "--epochs", 1)
    assert (
        "expected clean images of all 10 classes, got none of 8 (2, 3, 4, 5, 6 ...): the copy may forget these" in run.problem
    )
    run = guard(*arguments, "--epochs", 1, "--allow-missing-classes", "--max-accuracy-drop", 100)
    assert (tmp_path / "r" / "repair.json").is_file(), run.err
    assert "hold none of 8 (2, 3, 4, 5, 6 ...): what the copy makes of these, nothing here tells" in " ".join(run.err.split())
    for method in ("auto", "unlearn"):
        run = guard("repair", files.model, "--method", method, "--data", tmp_path / "two.npz", "--out", tmp_path / method)
        assert "expected clean images of all 10 classes" in run.problem


def test_a_scan_measures_repairs_that_do_not_work_by_it(tmp_path: Path, files: Files, guard: Command) -> None:
    scan = write_scan(tmp_path / "scan", load_backend(str(files.model)), {7: corner()})
    run = guard(
        "repair", files.model, "--method", "fine-tune", "--epochs", 1, "--scan", scan, "--data", files.clean,
        "--out", tmp_path / "tuned", "--max-accuracy-drop", 100, "--json",
    )  # fmt: skip
    assert run.lines, run.err
    record = run.lines[0]
    assert record["recovered_success_before"] >= 0.95
    assert record["recovered_success_after"] is not None
    assert run.code == (0 if record["recovered_success_after"] <= 0.25 else 1)
    assert not record["recovered_triggers"]  # none was unlearnt


def test_gym_brings_its_preprocessor_along(tmp_path: Path, files: Files, guard: Command) -> None:
    out = tmp_path / "repaired"
    run = guard(
        "repair", files.model, "--method", "gym", "--data", files.clean, "--out", out, "--epochs", 20, "--views", 2, "--json"
    )
    assert run.code == 0, run.err
    record = run.lines[0]
    assert record["method"] == "gym"
    assert record["preprocessor"]["name"] == "gym"
    assert record["attack_success_seen_after"] is None
    run = guard("calibrate", out, "--data", files.clean, "--out", tmp_path / "profile", "--overlays", 20, "--frr", 0.02)
    assert run.code == 0, run.err
    assert "left out, which the repair has seen" in run.out
    assert "gym, no median, 2 views" in run.out
    assert "with --tripwire ORIGINAL the original goes on detecting" in run.err
    assert json.loads((tmp_path / "profile" / "guard.json").read_text())["preprocessor"]["views"] == 2
    run = guard(
        "calibrate", out, "--data", files.clean, "--out", tmp_path / "bare", "--preprocess", "none", "--overlays", 20,
        "--frr", 0.02, "--json",
    )  # fmt: skip
    assert json.loads((tmp_path / "bare" / "guard.json").read_text())["preprocessor"] is None


def test_repair_and_calibrate_in_one_go(tmp_path: Path, files: Files, digits: Digits, guard: Command) -> None:
    out = tmp_path / "profile"
    run = guard(
        "calibrate", files.model, "--data", files.clean, "--out", out, "--repair", "gym", "--overlays", 50, "--frr", 0.02,
        "--max-accuracy-drop", 30,
    )  # fmt: skip
    assert run.code == 0, run.err
    assert "clean accuracy after" in run.out
    assert str(out / "repair.html") in run.out
    assert "the original detects, the repaired model answers" in run.out
    names = {path.name for path in out.iterdir()}
    assert names == {
        "guard.json",
        "arrays.safetensors",
        "report.html",
        "model.pt2",
        "tripwire.pt2",
        "repair.json",
        "repair.html",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["profile"]
    run = guard("calibrate", out, "--data", files.clean, "--out", tmp_path / "again")
    assert "expected a model, got a profile" in run.problem
    loaded = Guard.load(out)
    assert loaded.preprocessor is not None
    verdicts = loaded(digits.triggered.images(slice(0, 60)))
    assert sum(verdict.suspicious for verdict in verdicts) >= 57
    assert sum(verdict.label_index == ATTACK.target_label for verdict in verdicts) <= 6
    assert guard("calibrate", files.model, "--data", files.clean, "--out", out).code == 0  # such a profile is replaced
    assert not (out / "tripwire.pt2").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("--method", "codefend"), "expected --quarantine DIR with --method codefend"),
        (("--method", "codefend", "--quarantine", "nowhere"), "expected a quarantine folder, got nowhere"),
        (("--method", "gym", "--epochs", "1", "--max-accuracy-drop", "-100"), "more than --max-accuracy-drop -100"),
        (("--method", "magic"), "'magic' is not one of 'auto', 'gym', 'codefend'"),
        (("--method", "gym", "--shape", "1,9,9"), "expected images of shape (1, 9, 9), got (1, 8, 8)"),
        (("--method", "gym", "--mean", "zero"), "expected --mean as numbers"),
        (("--method", "fine-tune", "--scan", "nowhere"), "expected a scan's folder with scan.json, got nowhere"),
        (("--method", "gdm", "--scan", "nowhere"), "expected a scan's folder with scan.json, got nowhere"),
        (("--method", "gym", "--insecure-edge"), "expected --edge URL with --edge-job"),
        (("--method", "gym", "--edge", "http://127.0.0.1:1", "--devices", "2"), "expected --devices without --edge"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(
    wrong: tuple[str, ...], message: str, tmp_path: Path, files: Files, guard: Command
) -> None:
    run = guard("repair", files.model, "--data", files.clean, "--out", tmp_path / "out", *wrong)
    assert message in run.problem
    assert not (tmp_path / "out").exists()


def test_after_a_repair_that_left_the_attack_nothing_is_recommended(
    tmp_path: Path, files: Files, rejected: Path, guard: Command
) -> None:
    run = guard(
        "repair", files.model, "--method", "gym", "--data", files.clean, "--quarantine", rejected, "--epochs", 1,
        "--max-accuracy-drop", 100, "--out", tmp_path / "out",
    )  # fmt: skip
    record = json.loads((tmp_path / "out" / "repair.json").read_text())
    good = record["attack_success_seen_after"] <= 0.25 and not record["forgotten_labels"]
    assert ("next:" in run.out) == good == ("Don't rely on this repair" not in run.err)
    assert run.code == (0 if good else 1), run.err


def test_in_one_go_no_clean_image_of_either_half_is_learnt_from_the_quarantine(
    tmp_path: Path, files: Files, digits: Digits, guard: Command
) -> None:
    mixed = torch.cat([digits.triggered.pixels[:25], digits.clean.pixels[:20]])
    np.savez(tmp_path / "mixed.npz", x=mixed[:, 0].numpy())
    run = guard(
        "calibrate", files.model, "--data", files.clean, "--out", tmp_path / "profile", "--repair", "codefend",
        "--quarantine", tmp_path / "mixed.npz", "--overlays", 50, "--frr", 0.02,
    )  # fmt: skip
    assert "expected at least 30 quarantined images to learn the trigger from, got 25" in run.problem


def test_the_only_copy_of_the_original_is_not_replaced(tmp_path: Path, files: Files, guard: Command) -> None:
    (tmp_path / "out").mkdir()
    model = tmp_path / "out" / "model.pt2"
    model.write_bytes(files.model.read_bytes())
    (tmp_path / "out" / "repair.json").write_text("{}")
    run = guard("repair", model, "--method", "fine-tune", "--data", files.clean, "--epochs", 1, "--out", tmp_path / "out")
    assert "which holds model.pt2: pick another --out" in run.problem
    assert model.read_bytes() == files.model.read_bytes()


def test_models_that_can_not_be_repaired(tmp_path: Path, files: Files, guard: Command) -> None:
    model = save_onnx(tmp_path / "toy.onnx", SPEC)
    run = guard("repair", model, "--method", "gym", "--data", files.clean, "--out", tmp_path / "out")
    assert "expected a model that can be fine-tuned (a factory of an nn.Module, a TorchScript .pt or a .pt2 file" in run.problem
    run = guard("repair", tmp_path, "--method", "gym", "--data", files.clean, "--out", tmp_path / "out")
    assert "expected a model file, a folder that guard repair wrote" in run.problem
    few = tmp_path / "few.npz"
    loaded = np.load(files.clean)
    np.savez(few, x=loaded["x"][:30], y=loaded["y"][:30])
    run = guard("repair", files.model, "--method", "gym", "--data", few, "--out", tmp_path / "out")
    assert "expected at least 50 clean images to repair with, got 30" in run.problem
    for options, message in (
        (("--repair", "codefend"), "expected --quarantine DIR for codefend"),
        (("--quarantine", tmp_path), "expected --repair with --quarantine"),
        (("--repair", "gym", "--red-team"), "expected --repair without --red-team"),
        (("--repair", "gym"), "--repair takes 15 of 30 clean images for itself and leaves 15, which is too few"),
    ):
        run = guard("calibrate", files.model, "--data", few, "--out", tmp_path / "out", "--overlays", 5, "--frr", 0.3, *options)
        assert message in run.problem


@pytest.mark.parametrize("sign", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_an_interrupted_repair_leaves_nothing_half_written_and_is_gone_on_with(
    sign: signal.Signals, tmp_path: Path, files: Files, few: Path, rejected: Path, guard: Command
) -> None:
    out = tmp_path / "repaired"
    arguments = [
        sys.executable, "-m", "cli.main", "repair", str(files.model), "--method", "codefend", "--data", str(few),
        "--quarantine", str(rejected), "--out", str(out), "--epochs", "1", "--gan-epochs", "4", "--max-accuracy-drop", "100",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    checkpoint = tmp_path / ".repaired.checkpoint" / "cyclegan.safetensors"
    process = subprocess.Popen(
        arguments,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background shell may ignore it
    )
    deadline = time.monotonic() + 60
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(sign)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "interrupted: the same command goes on" in err
    assert [path.name for path in tmp_path.iterdir()] == [".repaired.checkpoint"]
    done = guard(*arguments[3:])
    assert done.code in (0, 1), done.err  # so few epochs may learn no trigger that works
    assert "learning the trigger 1/4" not in done.err  # it went on where it was
    assert "quarantined images that keep their old answer" in done.out
    assert (out / "repair.json").is_file()
    assert not checkpoint.exists()


@pytest.mark.slow
def test_two_devices_give_one_model(tmp_path: Path, files: Files, few: Path) -> None:
    out = tmp_path / "repaired"
    arguments = [
        sys.executable, "-m", "cli.main", "repair", str(files.model), "--method", "gym", "--data", str(few),
        "--out", str(out), "--devices", "2", "--epochs", "3", "--max-accuracy-drop", "100", "--json",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip().splitlines()) == 1  # only one of the two processes shows anything
    assert done.stderr.count("fine-tuning 3/3") == 1
    assert json.loads(done.stdout)["method"] == "gym"
    assert torch.export.load(out / "model.pt2") is not None
    failed = [*arguments[:-1], "--max-accuracy-drop", "-100"]
    done = subprocess.run(failed, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 2
    assert done.stderr.count("guard: ") == 1
    assert "more than --max-accuracy-drop -100" in done.stderr


def test_with_a_tripwire_the_red_team_attacks_what_the_detectors_look_at(
    tmp_path: Path, files: Files, digits: Digits, guard: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_exported(digit_net().eval(), digits.train.images(slice(0, 2)), tmp_path / "repaired.pt2")
    seen: list[str | None] = []

    def red_teamed(watched: tuple[Backend, Hints], answering: tuple[ModelSource, Hints], *_: object) -> None:
        seen.extend([watched[0].fingerprint(), answering[0].backend.fingerprint()])
        raise RepairError("far enough")

    monkeypatch.setattr("cli.calibrate._red_team", red_teamed)
    run = guard(
        "calibrate", tmp_path / "repaired.pt2", "--tripwire", files.model, "--red-team", "--data", files.clean,
        "--out", tmp_path / "profile",
    )  # fmt: skip
    assert "far enough" in run.problem
    assert seen == [file_sha256(files.model), file_sha256(tmp_path / "repaired.pt2")]  # a preprocessor stands before the latter


@pytest.mark.parametrize(
    ("method", "option", "said"),
    [
        ("prune", ("--epochs", 3), "expected --epochs with --method gym, codefend, unlearn, gdm, fine-prune, fine-tune"),
        ("dhbe", ("--rounds", 3), "expected --rounds with --method unlearn, got dhbe, which does not look at it: drop it"),
        ("unlearn", ("--views", 1), "expected --views with --method gym, got unlearn"),
        ("gym", ("--gan-epochs", 200), "expected --gan-epochs with --method codefend, got gym"),
        ("nad", ("--recipe", "paper"), "expected --recipe with --method gym or dhbe, got nad"),
    ],
)
def test_an_option_of_another_method_is_refused(
    tmp_path: Path, files: Files, guard: Command, method: str, option: tuple[str, object], said: str
) -> None:
    run = guard("repair", files.model, "--method", method, "--data", files.clean, "--out", tmp_path / "out", *option)
    assert run.code == 2
    assert said in run.problem
