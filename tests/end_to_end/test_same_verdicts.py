"""One model, wrapped in every way: the verdicts are the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from calibration import Calibration, Settings, calibrate
from calibration.sources import open_model
from cli.demonstration.digits import Digits, save_exported
from export import export_onnx
from guard.verdict import Verdict

SETTINGS = Settings(overlays=40)


def seen(calibration: Calibration, images: Tensor) -> list[tuple[str, int | None, int]]:
    verdicts: tuple[Verdict, ...] = calibration.guard()(images)
    return [(verdict.verdict, verdict.label_index, verdict.passes) for verdict in verdicts]


@pytest.fixture(scope="module")
def calibration(digits: Digits, backdoored: nn.Module) -> Calibration:
    return calibrate(backdoored, digits.clean, SETTINGS)


@pytest.fixture(scope="module")
def images(digits: Digits) -> Tensor:
    return torch.cat([digits.test.images(slice(None)), digits.triggered.images(slice(0, 200))])


@pytest.fixture(scope="module")
def expected(calibration: Calibration, images: Tensor) -> list[tuple[str, int | None, int]]:
    found = seen(calibration, images)
    assert 200 <= sum(verdict == "rejected" for verdict, _, _ in found) <= 215
    return found


def test_a_plain_function_of_uint8_nhwc(
    digits: Digits, backdoored: nn.Module, calibration: Calibration, images: Tensor, expected: list[tuple[str, int | None, int]]
) -> None:
    def predict(batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        assert batch.dtype == np.uint8
        assert batch.shape[1:] == (8, 8, 1)
        with torch.inference_mode():
            answers: NDArray[np.float32] = (
                backdoored(torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 255).softmax(dim=1).numpy()
            )
        return answers

    around = calibrate(predict, digits.clean, SETTINGS)
    spec = around.profile.input
    assert (spec.container, spec.layout, spec.dtype, around.profile.model.output) == ("numpy", "NHWC", "uint8", "probabilities")
    # its blends are rounded to 8 bits
    limits = [threshold.value for threshold in calibration.thresholds]
    assert [threshold.value for threshold in around.thresholds] == pytest.approx(limits, abs=1e-3)
    assert [item[:2] for item in seen(around, images)] == [item[:2] for item in expected]


def test_an_onnx_file(
    tmp_path: Path, digits: Digits, backdoored: nn.Module, images: Tensor, expected: list[tuple[str, int | None, int]]
) -> None:
    save_exported(backdoored, digits.train.images(slice(0, 2)), tmp_path / "model.pt2")
    source = open_model(str(tmp_path / "model.pt2"), None, tmp_path)
    exported = calibrate(source.backend, digits.clean, SETTINGS, record=source.record)
    assert [item[:2] for item in seen(exported, images)] == [item[:2] for item in expected]
    exported.save(tmp_path / "profile", source.file)
    file = export_onnx(tmp_path / "profile", tmp_path / "model.onnx")
    onnx = calibrate(open_model(str(file), None, tmp_path).backend, digits.clean, SETTINGS)
    assert onnx.predictor.backend.kind == "onnx"
    assert [item[:2] for item in seen(onnx, images)] == [item[:2] for item in expected]
