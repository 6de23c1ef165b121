"""Profiles of the toy model in every kind of file."""

from __future__ import annotations

import warnings
from pathlib import Path

import msgspec
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from guard import Predictor, load_profile
from guard.predictors import BackendKind, wrap
from guard.predictors.module import state_sha256
from guard.predictors.screening import file_sha256
from guard.profile import ModelRecord, array_to_overlays, save_profile
from tests.toy import SIDE, SPEC, ToyNet, save_toy_profile


class Branches(ToyNet):
    """No tracer can follow this one."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images if float(images.mean()) < 2 else images + 1)


class Drifts(ToyNet):
    """Its export answers differently."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * (0.5 if torch.compiler.is_exporting() else 1.0)


def module_profile(folder: Path, net: nn.Module | None = None) -> Path:
    """A profile whose model a factory in this package makes, with weights in safetensors."""
    net = net or ToyNet()
    weights = folder.parent / f"{folder.name}.safetensors"
    save_toy_profile(folder)
    save_file(dict(net.state_dict()), weights)
    factory = f"{type(net).__module__}:{type(net).__name__}"
    record = ModelRecord(
        kind="module", output="logits", num_classes=4, file="weights.safetensors", factory=factory,
        sha256=state_sha256(net.state_dict()),
    )  # fmt: skip
    return _rewrite(folder, record, weights, net)


def torchscript_profile(folder: Path) -> Path:
    save_toy_profile(folder)
    file = folder.parent / f"{folder.name}.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(ToyNet(), torch.zeros(2, 1, SIDE, SIDE)).save(str(file))
    return _rewrite(folder, _file_record("torchscript", file), file)


def onnx_profile(folder: Path, model: Path) -> Path:
    save_toy_profile(folder)
    return _rewrite(folder, _file_record("onnx", model), model)


def callable_profile(folder: Path) -> Path:
    save_toy_profile(folder)
    return _rewrite(folder, ModelRecord(kind="callable", output="logits", num_classes=4), None)


def answers(folder: Path, model: Predictor) -> tuple[Tensor, Tensor]:
    """The original toy's answers to a profile's overlays, and those of another model."""
    overlays = array_to_overlays(load_profile(folder)[1]["strip.overlays"])
    return Predictor(wrap(ToyNet()), SPEC, 4, "logits")(overlays), model(overlays)


def _file_record(kind: BackendKind, file: Path) -> ModelRecord:
    return ModelRecord(kind=kind, output="logits", num_classes=4, file=file.name, sha256=file_sha256(file))


def _rewrite(folder: Path, record: ModelRecord, file: Path | None, net: nn.Module | None = None) -> Path:
    profile, arrays = load_profile(folder)
    overlays = array_to_overlays(arrays["strip.overlays"])
    arrays["probe.probabilities"] = Predictor(wrap(net or ToyNet()), SPEC, 4, "logits")(overlays[:8])
    save_profile(msgspec.structs.replace(profile, model=record), arrays, folder, file)
    return folder
