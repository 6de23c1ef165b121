from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from guard.errors import GuardError, MissingExtraError, ModelError
from guard.images import Array
from guard.predictors import Backend, Predictor, load_backend
from guard.predictors.chunks import run_in_chunks
from guard.predictors.onnx import OnnxBackend
from guard.predictors.predictor import bytes_per_image
from guard.predictors.screening import file_sha256
from tests.guard.models import predictor, save_onnx
from tests.toy import SPEC, ToyNet, toy_images


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 8])
def test_fixed_batch_sizes_are_cut_and_filled_up(batch: int, count: int, tmp_path: Path) -> None:
    backend = OnnxBackend.load(save_onnx(tmp_path / "toy.onnx", batch=batch))
    assert backend.input_shape == (batch, 1, 8, 8)
    images, _ = toy_images(count)
    torch.testing.assert_close(predictor_of(backend)(images), ToyNet()(images).softmax(dim=1), atol=1e-5, rtol=0)


def predictor_of(backend: Backend) -> Predictor:
    return Predictor(backend, SPEC, 4, "logits")


@pytest.mark.parametrize(("limit", "rows"), [(1, 32), (3, 96), (4, 128)])
def test_no_forward_pass_is_filled_up_but_the_last(
    limit: int, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A memory limit of as many of its batches; on a CPU a forward pass takes 128 small images at most."""
    ran, run = list[int](), OnnxBackend.__call__

    def counted(backend: OnnxBackend, batch: Array) -> object:
        ran.append(len(batch))
        return run(backend, batch)

    predictor = predictor_of(OnnxBackend.load(save_onnx(tmp_path / "toy.onnx", batch=32)))
    bounded = replace(predictor, memory_limit=limit * 32 * bytes_per_image(SPEC) + 7)
    assert bounded.max_rows == limit * 32
    monkeypatch.setattr(OnnxBackend, "__call__", counted)
    bounded(toy_images(100)[0])
    assert ran == [min(rows, 100 - start) for start in range(0, 100, rows)]


@pytest.mark.parametrize("tensors", [False, True])
def test_chunks_hold_the_fixed_number_of_rows(tensors: bool) -> None:
    seen: list[list[float]] = []

    def run(batch: Array) -> object:
        assert isinstance(batch, Tensor) == tensors
        seen.append([float(value) for value in batch[:, 0]])
        return batch * 2

    rows = np.arange(5, dtype=np.float32)[:, None]
    answer = run_in_chunks(run, torch.from_numpy(rows) if tensors else rows, 2)
    assert seen == [[0, 1], [2, 3], [4, 4]]
    assert torch.as_tensor(answer).flatten().tolist() == [0, 2, 4, 6, 8]


def test_one_bad_row_does_not_spoil_its_chunk(tmp_path: Path) -> None:
    model = predictor_of(OnnxBackend.load(save_onnx(tmp_path / "toy.onnx", batch=4)))
    images, _ = toy_images(6)
    images[5] = torch.nan
    answers = model(images)
    assert torch.isnan(answers).any(dim=1).tolist() == [False] * 5 + [True]


def test_its_fingerprint_is_its_files(model_files: dict[str, Path]) -> None:
    backend = load_backend(model_files["onnx"])
    assert backend.kind == "onnx"
    assert backend.fingerprint() == file_sha256(model_files["onnx"])


def test_a_model_for_other_inputs_fails_as_a_model(tmp_path: Path, clean: Tensor) -> None:
    nhwc = msgspec.structs.replace(SPEC, layout="NHWC")
    for made, asked in ((nhwc, SPEC), (SPEC, nhwc), (SPEC, msgspec.structs.replace(SPEC, dtype="uint8"))):
        backend = OnnxBackend.load(save_onnx(tmp_path / "toy.onnx", made))
        with pytest.raises(ModelError, match="the model failed on a batch"):
            Predictor(backend, asked, 4, "logits")(clean)


def two_inputs(path: Path) -> Path:
    names = ("a", "b")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 4]) for name in names]
    result = helper.make_tensor_value_info("c", TensorProto.FLOAT, [None, 4])
    graph = helper.make_graph([helper.make_node("Add", names, ["c"])], "two", values, [result])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def of_type(path: Path, kind: int, shape: list[int | str | None]) -> Path:
    values = [helper.make_tensor_value_info(name, kind, shape) for name in ("a", "c")]
    graph = helper.make_graph([helper.make_node("Identity", ["a"], ["c"])], "same", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def test_models_of_other_inputs_are_refused(tmp_path: Path) -> None:
    for path in (
        two_inputs(tmp_path / "two.onnx"),
        of_type(tmp_path / "int.onnx", TensorProto.INT64, ["n", 4]),
        of_type(tmp_path / "double.onnx", TensorProto.DOUBLE, ["n", 4]),
        of_type(tmp_path / "text.onnx", TensorProto.STRING, ["n", 4]),
        of_type(tmp_path / "vector.onnx", TensorProto.FLOAT, [4]),
    ):
        with pytest.raises(ModelError, match="expected one float or uint8 input of image batches"):
            OnnxBackend.load(path)


@pytest.mark.parametrize("data", [b"", b"garbage", b"\x08\x09" * 50])
def test_damaged_files(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    with pytest.raises(GuardError, match=r"expected an ONNX model, got model\.onnx"):
        OnnxBackend.load(path)


def test_truncated_files(tmp_path: Path) -> None:
    path = save_onnx(tmp_path / "toy.onnx")
    data = path.read_bytes()
    for share in (0.3, 0.6, 0.95):
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(ModelError):
            OnnxBackend.load(path)


@pytest.mark.parametrize("beside", ["model", "elsewhere"])
def test_weights_in_further_files_are_not_read(beside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ONNX file may name files of the host as its weights, and no checksum would tell when they change."""
    monkeypatch.chdir(tmp_path)
    secret = tmp_path / "secret"
    secret.write_bytes(np.arange(4, dtype=np.float32).tobytes())
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "secret").write_bytes(secret.read_bytes())
    weights = TensorProto(name="b", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    weights.external_data.add(key="location", value="secret" if beside == "model" else "../secret")
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in ("a", "c")]
    graph = helper.make_graph([helper.make_node("Add", ["a", "b"], ["c"])], "reads", info[:1], info[1:], [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    for current in (tmp_path, folder):
        monkeypatch.chdir(current)
        with pytest.raises(ModelError, match="export it again, as one file"):
            OnnxBackend.load(path)


def test_without_onnxruntime(monkeypatch: pytest.MonkeyPatch, model_files: dict[str, Path]) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"backdoor-guard\[onnx\]"):
        load_backend(model_files["onnx"])


def test_the_toys_stay_alike(clean: Tensor, triggered: Tensor, model_files: dict[str, Path]) -> None:
    images = torch.cat([clean, triggered])
    backend = load_backend(model_files["onnx"])
    torch.testing.assert_close(predictor_of(backend)(images), predictor()(images), atol=1e-5, rtol=0)
