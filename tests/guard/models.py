"""The toy of `tests.toy` as every kind of model, and helpers that take model files apart."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from guard.images import Array, InputSpec
from guard.predictors import OutputKind, Predictor, wrap
from tests.toy import SIDE, SPEC, TARGET, ToyNet

CLASSES = 4


def predictor(model: object | None = None, spec: InputSpec = SPEC, output: OutputKind = "logits", **options: Any) -> Predictor:
    """A predictor of the toy, or of another model."""
    return Predictor(wrap(model or ToyNet()), spec, CLASSES, output, **options)


def save_torchscript(module: nn.Module, path: Path) -> Path:
    """TorchScript of a module; PyTorch deprecates it, we still read it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(module, torch.zeros(2, 1, SIDE, SIDE)).save(str(path))
    return path


def save_exported(module: nn.Module, path: Path, batch: int | None = None) -> Path:
    """A `torch.export` file; `batch` fixes the batch size."""
    example = torch.rand(batch or 2, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    dynamic = None if batch else ({0: torch.export.Dim("batch", min=1)},)
    torch.export.save(torch.export.export(module, (example,), dynamic_shapes=dynamic), path)
    return path


def save_onnx(path: Path, spec: InputSpec = SPEC, batch: int | str = "batch") -> Path:
    """The toy as a hand-made ONNX graph in the layout and type of `spec`."""
    shapes: dict[str, list[int | str]] = {"NCHW": [batch, 1, SIDE, SIDE], "NHWC": [batch, SIDE, SIDE, 1]}
    nodes = []
    current = "x"
    if spec.dtype == "uint8":
        nodes += [helper.make_node("Cast", [current], ["cast"], to=TensorProto.FLOAT)]
        nodes += [helper.make_node("Div", ["cast", "full"], ["unit"])]
        current = "unit"
    if spec.layout == "NHWC":
        nodes += [helper.make_node("Transpose", [current], ["nchw"], perm=[0, 3, 1, 2])]
        current = "nchw"
    half = SIDE // 2
    nodes += [
        helper.make_node("AveragePool", [current], ["pooled"], kernel_shape=[half, half], strides=[half, half]),
        helper.make_node("Flatten", ["pooled"], ["quadrants"]),
        helper.make_node("Mul", ["quadrants", "scale"], ["scaled"]),
        helper.make_node("Slice", [current, "starts", "ends", "axes"], ["corner"]),
        helper.make_node("ReduceMin", ["corner", "reduced"], ["darkest"], keepdims=0),
        helper.make_node("Greater", ["darkest", "white"], ["fired"]),
        helper.make_node("Cast", ["fired"], ["one"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["one", "boost"], ["boosted"]),
        helper.make_node("Add", ["scaled", "boosted"], ["logits"]),
    ]
    boost = np.zeros((1, CLASSES), np.float32)
    boost[0, TARGET] = 100.0
    constants: dict[str, NDArray[Any]] = {
        "full": np.array(255.0, np.float32), "scale": np.array(12.0, np.float32), "boost": boost,
        "starts": np.array([-2, -2]), "ends": np.array([SIDE, SIDE]), "axes": np.array([2, 3]),
        "reduced": np.array([2, 3]), "white": np.array(0.97, np.float32),
    }  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "toy",
        [
            helper.make_tensor_value_info(
                "x", TensorProto.UINT8 if spec.dtype == "uint8" else TensorProto.FLOAT, shapes[spec.layout]
            )
        ],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, CLASSES])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def predict_function(spec: InputSpec, output: OutputKind) -> Callable[[Array], object]:
    """A predict function over the toy that takes exactly what `spec` says, and returns what `output` says."""
    net = ToyNet()

    def predict(batch: Array) -> object:
        assert isinstance(batch, np.ndarray) == (spec.container == "numpy")
        array = batch if isinstance(batch, np.ndarray) else batch.numpy()
        assert array.dtype == np.dtype(spec.dtype)
        images = array.astype(np.float32) / (255.0 if spec.dtype == "uint8" else 1.0)
        images = images.transpose(0, 3, 1, 2) if spec.layout == "NHWC" else images.reshape(-1, 1, SIDE, SIDE)
        logits: Tensor = net(torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32)))
        answer = {"logits": logits, "probabilities": logits.softmax(dim=1), "labels": logits.argmax(dim=1)}[output]
        return answer.numpy() if spec.container == "numpy" else answer

    return predict


def rewrite_archive(
    source: Path, target: Path, edits: Mapping[str, Callable[[bytes], bytes]], extra: Mapping[str, bytes] | None = None
) -> Path:
    """Copy an archive with some entries changed (chosen by how their names end) and some added below its folder."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            for ending, edit in edits.items():
                data = edit(data) if name.endswith(ending) else data
            new.writestr(name, data)
        root = old.namelist()[0].partition("/")[0]
        for name, data in (extra or {}).items():
            new.writestr(f"{root}/{name}", data)
    return target
