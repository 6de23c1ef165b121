from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch

from export import export_onnx
from guard import Predictor
from guard.errors import ExportError
from guard.predictors.onnx import OnnxBackend
from tests.export.profiles import (
    Branches,
    Drifts,
    answers,
    callable_profile,
    module_profile,
    onnx_profile,
    torchscript_profile,
)
from tests.toy import SPEC, save_toy_profile


@pytest.mark.parametrize("make", [module_profile, save_toy_profile, torchscript_profile])
def test_an_exported_model_answers_like_the_original_for_any_batch(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    folder = make(tmp_path / "p")
    path = export_onnx(folder, tmp_path / "out" / "model.onnx")
    backend = OnnxBackend.load(path)
    assert backend.input_shape[0] is None
    expected, found = answers(folder, Predictor(backend, SPEC, 4, "logits"))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert [item.name for item in path.parent.iterdir()] == ["model.onnx"]
    onnx.checker.check_model(str(path))


def test_an_onnx_model_is_copied(tmp_path: Path) -> None:
    first = export_onnx(save_toy_profile(tmp_path / "p"), tmp_path / "model.onnx")
    second = export_onnx(onnx_profile(tmp_path / "q", first), tmp_path / "copy.onnx")
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("net", [Branches(), Drifts()])
def test_a_failed_export_leaves_nothing_behind(tmp_path: Path, net: torch.nn.Module) -> None:
    folder = module_profile(tmp_path / "p", net)
    with pytest.raises(ExportError, match=r"can't convert|differ by"):
        export_onnx(folder, tmp_path / "out" / "model.onnx")
    assert list((tmp_path / "out").iterdir()) == []


def test_what_can_not_be_exported_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="in memory"):
        export_onnx(callable_profile(tmp_path / "function"), tmp_path / "model.onnx")
    with pytest.raises(ExportError, match=r"ends in \.onnx"):
        export_onnx(save_toy_profile(tmp_path / "p"), tmp_path / "model.bin")


def test_a_disk_that_refuses_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="could not write"):
        export_onnx(save_toy_profile(tmp_path / "p"), tmp_path / "file" / "model.onnx")
