"""`guard scan`: exit codes, what is written, and what an interrupted scan keeps."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from calibration.inspection.record import read_scan
from cli.demonstration.digits import Digits, save_exported
from cli.repaired import calibrate_with_tripwire
from tests.cli.conftest import Command, Files
from tests.guard.models import save_onnx
from tests.nets import SMALL


@pytest.fixture(scope="module")
def infected(tmp_path_factory: pytest.TempPathFactory, digits: Digits, small_trigger: nn.Module) -> Path:
    path = tmp_path_factory.mktemp("infected") / "model.pt2"
    save_exported(small_trigger, digits.train.images(slice(0, 2)), path)
    return path


@pytest.mark.usefixtures("known_reference")
def test_an_infected_model_ends_with_1(
    tmp_path: Path, files: Files, infected: Path, guard: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "scan"
    given = ("scan", infected, "--data", files.clean, "--plain", "--steps", 128, "--output", "logits", "--out", out)
    run = guard(*given)
    assert run.code == 1, run.err
    assert "looking for triggers" in run.err
    written = json.loads((out / "scan.json").read_text())
    assert written["infected"] is True
    assert [item["label_index"] for item in written["labels"] if item["infected"]] == [SMALL.target_label]
    assert (out / "report.html").stat().st_size > 10_000
    assert [path.name for path in tmp_path.iterdir()] == ["scan"]  # no checkpoint is left
    said = f"next: guard repair {infected} --output logits --method auto --scan {out} --data {files.clean} --out {out}-repaired"
    assert said in run.out.replace("\n", "")
    assert "This need not be all. A scan like this one does not see" in " ".join(run.err.split())
    assert "infected" in run.out

    record = read_scan(out)
    monkeypatch.setattr("calibration.inspection.work.scan_into", lambda *_: record)
    again = guard(*given, "--skip-unreadable").out.replace("\n", "")
    assert f"--output logits --skip-unreadable --method auto --scan {out}" in again
    assert " --data clean --skip-unreadable --out p-profile" in calibrate_with_tripwire(
        Path("p"), "m", None, Path("clean"), True
    )
    run = guard(*given, "--json")
    assert run.code == 1, run.err
    assert run.lines == [{**written, "out": str(out)}]  # and no next command


def test_a_clean_model_ends_with_0(tmp_path: Path, files: Files, digits: Digits, clean_twin: nn.Module, guard: Command) -> None:
    save_exported(clean_twin, digits.train.images(slice(0, 2)), tmp_path / "clean.pt2")
    out = tmp_path / "scan"
    run = guard("scan", tmp_path / "clean.pt2", "--data", files.clean, "--plain", "--steps", 128, "--patches", "--out", out)
    assert run.code == 0, run.err
    assert re.search(r"Patches\s+label .*works on others", run.out)
    assert "looking for patches" in run.err
    assert "No label needs a trigger so small" in run.out
    assert "no proof that a model is clean" in run.err
    assert "The smallest triggers of labels" in run.out
    assert f"next: guard calibrate {tmp_path / 'clean.pt2'} --data {files.clean} --out {out}-profile" in run.out


@pytest.mark.slow
def test_an_interrupted_scan_goes_on(tmp_path: Path, files: Files, infected: Path, guard: Command) -> None:
    out = tmp_path / "scan"
    arguments = ("scan", infected, "--data", files.clean, "--out", out, "--plain", "--steps", 256)
    command = [sys.executable, "-m", "cli.main", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background shell may ignore it
    ) as process:
        deadline = time.monotonic() + 60.0
        while not (tmp_path / ".scan.checkpoint" / "labels-0.safetensors").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert "interrupted: the same command goes on from there" in process.stderr.read()
    assert process.returncode == 130
    assert not out.exists()
    assert (tmp_path / ".scan.checkpoint").is_dir()
    run = guard(*arguments)
    assert run.code == 1, run.err
    assert "going on from .scan.checkpoint" in run.err
    assert [path.name for path in tmp_path.iterdir()] == ["scan"]


def test_what_can_not_be_scanned(tmp_path: Path, files: Files, digits: Digits, guard: Command) -> None:
    out = tmp_path / "scan"
    save_onnx(tmp_path / "model.onnx")
    run = guard("scan", tmp_path / "model.onnx", "--data", files.clean, "--out", out)
    assert ".pt2" in run.problem
    assert "got a model of kind onnx: use the one that it was exported from" in run.problem
    np.savez(tmp_path / "few.npz", x=digits.clean.pixels[:40, 0].numpy())
    run = guard("scan", files.model, "--data", tmp_path / "few.npz", "--out", out)
    assert "at least 50 clean images to scan with, got 40" in run.problem
    assert not out.exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    run = guard("scan", files.model, "--data", files.clean, "--out", tmp_path / "mine")
    assert "holds something else (thesis.txt)" in run.problem
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_one_class_of_images_is_not_enough(tmp_path: Path, files: Files, digits: Digits, guard: Command) -> None:
    sevens = torch.nonzero(digits.train.known_labels == 7).squeeze(1)[:60]
    np.savez(tmp_path / "sevens.npz", x=digits.train.pixels[sevens, 0].numpy())
    run = guard("scan", files.model, "--data", tmp_path / "sevens.npz", "--out", tmp_path / "scan")
    assert "add images of every class" in run.problem


@pytest.mark.parametrize("steps", ["0", "15"])
def test_too_few_steps_are_refused(tmp_path: Path, files: Files, guard: Command, steps: str) -> None:
    run = guard("scan", files.model, "--data", files.clean, "--out", tmp_path / "scan", "--steps", steps)
    assert run.code == 2
    assert "--steps" in run.problem
