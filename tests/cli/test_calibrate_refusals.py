"""What `guard calibrate` refuses is one line, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.cli.conftest import Command, Files

PROBLEMS: list[tuple[list[str], str]] = [
    (["--frr", "0.0001"], "rate of 0.0001 needs at least 9999 clean images"),
    (["--frr", "0.0001", "--blend", "logit+demeaned"], "0.0001 for 2 blends together needs at least 19999 clean images"),
    (["--frr", "2"], "between 0 and 1"),
    (["--overlays", "597"], "more clean images than the 597 overlays"),
    (["--overlays", "1"], "at least 2 overlays"),
    (["--overlays", "3", "--blend", "logit+demeaned"], "at least 4 overlays for logit+demeaned"),
    (["--alpha", "0"], "expected alpha"),
    (["--alpha", "0.7", "--blend", "logit+demeaned"], "name one, like --blend logit, or drop --alpha"),
    (["--mean", "a,b"], "expected --mean as numbers"),
    (["--mean", "0.5,0.5,0.5", "--std", "1,1,1"], "expected 1 values of mean"),
    (["--mean", "0.5"], "expected --std with --mean, got --mean alone"),
    (["--std", "0.5"], "expected --mean with --std, got --std alone"),
    (["--preprocess", "gym"], "--max-accuracy-drop"),
    (["--tripwire-weights", "w.safetensors"], "expected --tripwire with --tripwire-weights"),
    (["--max-accuracy-drop", "1"], "expected --preprocess or --repair with --max-accuracy-drop"),
    (["--confidence", "1.5"], "expected a confidence between 0 and 1"),
    (["--method", "normal", "--confidence", "0.9"], "conformal method only"),
    (["--blend", "mix", "--alpha", "2"], "alpha in (0, 1] for mix"),
    (["--shape", "1,9,9"], "expected images of shape"),
    (["--shape", "9"], "expected --shape as C,H,W"),
    (["--output", "labels"], "expected"),
    (["--blend", "lighten"], "Invalid value for '--blend': 'lighten' is not one of 'logit', "),
    (["--passes", "fast"], "Invalid value for '--passes': 'fast' is not one of 'exact', 'votes', 'sequential'."),
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
