"""`guard scan --method deep-inspect`: no data, exit codes, what is refused, and what other commands say to its folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import pytest
import torch
from torch import nn

from calibration.inspection import work
from calibration.repair.record import RepairRecord
from cli.demonstration.digits import ATTACK, Digits, save_exported
from guard import InputSpec
from guard.predictors.screening import file_sha256
from guard.profile import ModelRecord
from tests.cli.conftest import Command, Files

BLIND = ("--method", "deep-inspect")
SHAPE = ("--shape", "1,8,8")


@pytest.fixture(scope="module")
def clean_model(tmp_path_factory: pytest.TempPathFactory, digits: Digits, clean_twin: nn.Module) -> Path:
    path = tmp_path_factory.mktemp("clean") / "model.pt2"
    save_exported(clean_twin, digits.train.images(slice(0, 2)), path)
    return path


def test_an_infected_model_and_what_others_say_to_its_scan(tmp_path: Path, files: Files, guard: Command) -> None:
    out = tmp_path / "scan"
    run = guard("scan", files.model, *BLIND, "--out", out, "--steps", 240)  # its file says the shape
    assert run.code == 1, run.err
    assert f"The model is backdoored: label {ATTACK.target_label}." in run.out
    assert "deviation factor" in run.out
    for said in ("recovering images", "looking for triggers", "believed to normalise for itself", "This need not be all"):
        assert said in run.err
    told = f"next: guard repair {files.model} --method auto --data CLEAN --out {out}-repaired"
    assert told in run.out.replace("\n", "")  # so small images are none for dhbe
    record = json.loads((out / "scan.json").read_text())
    assert [item["label_index"] for item in record["labels"] if item["infected"]] == [ATTACK.target_label]
    assert (record["method"], record["clean_images"], record["reference_agreement"]) == ("deep-inspect", 0, None)
    assert record["settings"]["search"]["steps"] == 240
    assert [path.name for path in tmp_path.iterdir()] == ["scan"]  # no checkpoint is left

    problem = "expected a scan by neural-cleanse, whose triggers can be worked by, got one by deep-inspect"
    given = ("--data", files.clean, "--scan", out, "--out", tmp_path / "next")
    for command in (("repair", "--method", "unlearn"), ("repair", "--method", "prune"), ("calibrate",)):
        run = guard(command[0], files.model, *command[1:], *given)
        assert problem in run.problem
        assert not (tmp_path / "next").exists()


def test_a_clean_model_ends_with_0(tmp_path: Path, clean_model: Path, guard: Command) -> None:
    given = ("--mean", "0", "--std", "1", "--steps", 240, "--json")
    run = guard("scan", clean_model, *BLIND, *SHAPE, "--out", tmp_path / "scan", *given)
    assert run.code == 0, run.err
    (record,) = run.lines
    assert record["infected"] is False
    assert (record["input"]["mean"], record["said"]) == ([0.0], [])


def test_a_repaired_model_knows_its_shape(tmp_path: Path, clean_model: Path, guard: Command) -> None:
    folder = tmp_path / "repaired"
    folder.mkdir()
    shutil.copy(clean_model, folder / "model.pt2")
    sha256 = file_sha256(clean_model)
    record = RepairRecord(
        clean_accuracy_before=None, clean_accuracy_after=None, agreement=1.0, attack_success_seen_before=None,
        attack_success_seen_after=None, generated_triggers_work=None, rounds=1, clean_images=1, quarantined_images=0,
        held_out_clean=1, held_out_quarantined=0, seconds=1.0, schema=1, created="2026-01-01T00:00:00Z", method="fine-tune",
        model=ModelRecord(kind="torch-export", output="logits", num_classes=10, file="model.pt2", sha256=sha256),
        original_sha256=None, input=InputSpec(channels=1, height=8, width=8, mean=(0.0,), class_names=tuple("abcdefghij")),
        preprocessor=None, settings={}, max_accuracy_drop=3.0, libraries={},
    )  # fmt: skip
    (folder / "repair.json").write_bytes(msgspec.json.encode(record))
    run = guard("scan", folder, *BLIND, "--out", tmp_path / "scan", "--steps", 64, "--json")
    assert run.code in (0, 1), run.err
    assert [item["label"] for item in run.lines[0]["labels"]] == list("abcdefghij")
    assert (run.lines[0]["input"]["mean"], run.lines[0]["model_sha256"]) == ([0.0], sha256)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ((), "expected --data CLEAN with --method neural-cleanse, which puts triggers on clean images, got none: add it"),
        ((*BLIND, *SHAPE, "--data", "DATA"), "expected --data with --method neural-cleanse alone, got deep-inspect"),
        ((*BLIND, *SHAPE, "--pairs", "--plain"), "expected --pairs and --plain with --method neural-cleanse alone, got"),
        ((*BLIND, *SHAPE, "--skip-unreadable"), "expected --skip-unreadable with --method neural-cleanse alone, got"),
        ((*BLIND, "--shape", "3,9,9"), "as the model's file declares, got (3, 9, 9): check the images and --shape"),
        ((*BLIND, *SHAPE, "--mean", "0.5,0.5,0.5", "--std", "1,1,1"), "expected 1 values of mean, one per channel, got 3"),
        ((*BLIND, *SHAPE, "--steps", 15), "'--steps'"),
        (("--method", "magic"), "'magic' is not one of 'neural-cleanse', 'deep-inspect'"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, files: Files, guard: Command, given: tuple[object, ...], problem: str) -> None:
    given = tuple(files.clean if item == "DATA" else item for item in given)
    assert problem in guard("scan", files.model, "--out", tmp_path / "scan", *given).problem
    assert not any(tmp_path.iterdir())


def test_a_factory_does_not_say_the_shape(tmp_path: Path, guard: Command) -> None:
    run = guard("scan", "tests.toy:LearningToy", *BLIND, "--out", tmp_path / "scan")
    assert "expected --shape C,H,W with --method deep-inspect, for a model that does not say what images" in run.problem


def test_two_labels_are_too_few(tmp_path: Path, guard: Command) -> None:
    last = nn.Linear(64, 2)
    nn.init.constant_(last.weight, 1.0)  # logits that are no probabilities
    save_exported(nn.Sequential(nn.Flatten(), last).eval(), torch.rand(2, 1, 8, 8), tmp_path / "two.pt2")
    run = guard("scan", tmp_path / "two.pt2", *BLIND, *SHAPE, "--out", tmp_path / "scan")
    assert "expected a model with at least 5 labels" in run.problem


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, files: Files, guard: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(work, "deep_scan", interrupted)
    run = guard("scan", files.model, *BLIND, *SHAPE, "--out", tmp_path / "scan")
    assert run.code == 130
    assert "interrupted: the same command goes on from there" in run.err
    assert not (tmp_path / "scan").exists()
